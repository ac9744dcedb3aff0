//! What people do with a sandbox: extend, stop, start, release, destroy.

use std::path::Path;
use std::time::Duration;

use super::record::{RECORD_FILE, Record, State};
use super::{Area, Claim, Found, end_of};
use crate::error::{Code, Failure};
use crate::repository::JobId;
use crate::util::clock;

impl Area {
    /// Lets a sandbox live for so long from now on.
    ///
    /// # Errors
    /// When that is longer than a sandbox may live.
    pub async fn extend(&self, id: &str, life: Option<Duration>) -> Result<Found, Failure> {
        let (_claim, mut record) = self.take(id)?;
        check(&record, &[State::Running, State::Stopped, State::Failed], "extend")?;
        record.expires_at = Some(end_of(clock::now().into(), self.life(life)?));
        record.warned = false;
        self.put(record)
    }

    /// Stops the server; the files stay until the sandbox ends.
    pub async fn stop(&self, id: &str) -> Result<Found, Failure> {
        let (_claim, record) = self.take(id)?;
        check(&record, &[State::Running, State::Stopped, State::Failed], "stop")?;
        // The record first: nobody is to start it again meanwhile.
        let found = self.put(Record { state: State::Stopped, ..record })?;
        self.stop_server(&found.record).await?;
        Ok(self.found(found.record))
    }

    /// Starts the server of a sandbox that was stopped or has failed.
    pub async fn start(&self, id: &str) -> Result<Found, Failure> {
        let (_claim, record) = self.take(id)?;
        check(&record, &[State::Running, State::Stopped, State::Failed], "start")?;
        if self.postmaster(&record)?.is_none() {
            self.start_server(&record).await?;
        }
        self.put(Record { state: State::Running, failed_starts: 0, ..record })
    }

    /// Hands a sandbox over to whoever operates the host: its server is stopped, it has no end any more and nobody looks
    /// after it. The role that was made for people goes on being there.
    pub async fn release(&self, id: &str) -> Result<Released, Failure> {
        let (_claim, record) = self.take(id)?;
        check(&record, &[State::Running, State::Stopped, State::Failed], "release")?;
        let record = Record { state: State::Released, expires_at: None, ..record };
        let found = self.put(record)?;
        self.stop_server(&found.record).await?;
        let data = self.data(&found.record);
        Ok(Released { start: how_to_start(&found.record, &data), sandbox: self.found(found.record) })
    }

    /// Stops the server and removes everything.
    ///
    /// # Errors
    /// A released one is not removed: it belongs to somebody else.
    pub async fn destroy(&self, id: &str) -> Result<Record, Failure> {
        let (claim, record) = self.take(id)?;
        let removable = [State::Making, State::Running, State::Stopped, State::Failed, State::Removing];
        check(&record, &removable, "destroy")?;
        self.remove(&record, &claim).await?;
        Ok(record)
    }

    /// Removes everything of a sandbox, its record last. What is left of an interrupted removal is removed by the same call.
    pub(super) async fn remove(&self, record: &Record, _claim: &Claim) -> Result<(), Failure> {
        let place = self.place_of(record);
        Record { state: State::Removing, ..record.clone() }.save(&place)?;
        self.stop_server(record).await?;
        let (sockets, id) = (self.socket_directory(&record.id), record.id.clone());
        let removed = tokio::task::spawn_blocking(move || {
            for directory in [sockets, place.join("data"), place.join("tablespaces")] {
                if_there(std::fs::remove_dir_all(&directory))?;
            }
            if_there(std::fs::remove_file(place.join(RECORD_FILE)))?;
            if_there(std::fs::remove_dir_all(&place))
        });
        let failed = |why: String| Failure::new(Code::Host, format!("remove sandbox {id}: {why}"));
        removed.await.map_err(|error| failed(error.to_string()))?.map_err(|error| failed(error.to_string()))
    }

    fn take(&self, id: &str) -> Result<(Claim, Record), Failure> {
        let known: JobId = self.find(id)?.record.id;
        let claim = self.claim(&known)?;
        // Read again: it may have been changed before it was ours.
        Ok((claim, self.find(id)?.record))
    }

    pub(super) fn put(&self, record: Record) -> Result<Found, Failure> {
        record.save(&self.place_of(&record))?;
        Ok(self.found(record))
    }
}

/// A sandbox that belongs to an operator now.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct Released {
    #[serde(flatten)]
    pub sandbox: Found,
    /// A command.
    pub start: String,
}

fn how_to_start(record: &Record, data: &Path) -> String {
    format!(
        "pg_ctl start -D {} -l {} (PostgreSQL {})",
        data.display(),
        data.join("pgrecall.log").display(),
        record.major
    )
}

fn check(record: &Record, states: &[State], verb: &str) -> Result<(), Failure> {
    if states.contains(&record.state) {
        return Ok(());
    }
    let (message, hint) = match record.state {
        State::Making => ("it is still being made", "Cancel its job instead, or wait for it."),
        State::Released => {
            ("it was released", "It belongs to whoever asked for that; its directory is theirs to remove.")
        }
        _ => ("it is being removed", "Make another one."),
    };
    Err(Failure::new(Code::Conflict, format!("{verb} sandbox {}: {message}", record.id)).hint(hint))
}

/// What is gone already need not be removed.
fn if_there(removed: std::io::Result<()>) -> std::io::Result<()> {
    match removed {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => Err(error),
        _ => Ok(()),
    }
}
