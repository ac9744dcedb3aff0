//! Making a sandbox: put down, restore, promote, make the role.

use std::path::{Path, PathBuf};
use std::time::Duration;

use serde::Serialize;
use tokio_util::sync::CancellationToken;

use super::record::{Asked, Record, State, role_of};
use super::{Area, Settings, end_of, make_private, role};
use crate::error::{Code, Failure};
use crate::operations::restore::{self, Check, Observer, RestoreReport, RestoreRequest};
use crate::repository::{JobId, Repository};
use crate::restore::Plan;
use crate::restore::recovery::{Finish, PORT};
use crate::restore::target::TablespacePlaces;
use crate::util::clock;
use crate::util::units::{show_bytes, show_duration};

/// What is restored.
pub struct Source<'a> {
    pub repository: &'a Repository,
    pub plan: Plan,
}

/// What is wanted of a sandbox.
#[derive(Debug, Clone)]
pub struct CreateRequest {
    pub id: JobId,
    pub asked_by: Asked,
    pub ticket: Option<String>,
    /// The target, as it was asked for.
    pub target: String,
    /// The role may write.
    pub writable: bool,
    /// How long it lives, when somebody said so.
    pub expires_in: Option<Duration>,
    /// As for a restore: the words of the command that serves WAL.
    pub wal_get: Vec<String>,
    pub postgres_bin_dirs: Vec<PathBuf>,
}

/// A sandbox that is ready.
#[derive(Debug, Clone, Serialize)]
pub struct Created {
    pub sandbox: Record,
    pub restore: RestoreReport,
}

impl Area {
    /// Makes a sandbox. A failure leaves nothing behind.
    ///
    /// Cancel safety: fire `cancel`. After a drop of the future, as after a kill, [`Area::keep`] removes what was begun.
    ///
    /// # Errors
    /// When there is no room in the area, and as a restore.
    pub async fn create(
        &self,
        source: Source<'_>,
        request: &CreateRequest,
        observer: &mut dyn Observer,
        cancel: CancellationToken,
    ) -> Result<Created, Failure> {
        let life = self.life(request.expires_in)?;
        let claim = self.claim(&request.id)?;
        let record = self.put_down(&source.plan, request, life).await?;
        let made = self.make(source, request, record.clone(), (observer, cancel)).await;
        let made = match made {
            Ok((record, restore)) => {
                let ends = end_of(clock::now().into(), life);
                let record = Record { state: State::Running, expires_at: Some(ends), ..record };
                record
                    .save(&self.place_of(&record))
                    .map(|()| Created { sandbox: record, restore })
                    .map_err(Failure::from)
            }
            Err(failure) => Err(failure),
        };
        if made.is_err()
            && let Err(error) = self.remove(&record, &claim).await
        {
            tracing::warn!(sandbox = %record.id, error = %error, "a sandbox that failed is not removed yet, will try again");
        }
        made
    }

    /// How long a sandbox lives.
    pub(super) fn life(&self, asked: Option<Duration>) -> Result<Duration, Failure> {
        let Settings { expiry, expiry_max: max, .. } = self.settings();
        match asked {
            None => Ok(expiry.min(max)),
            Some(asked) if asked <= max && !asked.is_zero() => Ok(asked),
            Some(asked) => {
                let message = format!(
                    "let a sandbox live for {}: it may be {} at most",
                    show_duration(asked),
                    show_duration(max)
                );
                Err(Failure::new(Code::Usage, message)
                    .hint("Ask for less and extend it later, or set `expiry_max` in [sandbox]."))
            }
        }
    }

    /// Checks that there is room, and writes the record: whatever is made from here on is known to be there.
    async fn put_down(&self, plan: &Plan, request: &CreateRequest, life: Duration) -> Result<Record, Failure> {
        let _reserving = self.0.reserving.lock().await;
        let (area, needed, environment) = (self.clone(), plan.disk_bytes, plan.environment.clone());
        let room = tokio::task::spawn_blocking(move || area.check_room(&environment, needed)).await;
        room.map_err(|error| Failure::new(Code::Internal, format!("measure the sandboxes: {error}")))??;
        let now = clock::now().into();
        let record = Record {
            id: request.id.clone(),
            environment: plan.environment.clone(),
            asked_by: request.asked_by.clone(),
            ticket: request.ticket.clone(),
            target: request.target.clone(),
            timeline: plan.stop.timeline,
            target_lsn: plan.stop.lsn,
            inclusive: plan.stop.inclusive,
            backup: plan.backup.id.to_string(),
            major: plan.backup.major,
            created_at: now,
            expires_at: Some(end_of(now, life)),
            warned: false,
            state: State::Making,
            failed_starts: 0,
            role: role_of(&request.id),
            writable: request.writable,
            superuser: None,
            socket_directory: self.socket_directory(&request.id),
            port: PORT,
            planned_bytes: plan.disk_bytes,
            postgres_bin_dirs: request.postgres_bin_dirs.clone(),
            databases: Vec::new(),
            remarks: Vec::new(),
        };
        let place = self.place_of(&record);
        self.make_place(&place)?;
        record.save(&place)?;
        Ok(record)
    }

    fn check_room(&self, environment: &str, needed: u64) -> Result<(), Failure> {
        let Some(quota) = self.settings().quota_bytes else { return Ok(()) };
        let used = self.used_bytes()?;
        if used.saturating_add(needed) <= quota {
            return Ok(());
        }
        let message = format!(
            "make a sandbox of {environment}: it needs {}, and sandboxes take {} of their {} already",
            show_bytes(needed),
            show_bytes(used),
            show_bytes(quota)
        );
        Err(Failure::new(Code::Host, message)
            .hint("Destroy one that is not needed (`pgrecall sandbox list`), or raise `quota` in [sandbox]."))
    }

    fn make_place(&self, place: &Path) -> Result<(), Failure> {
        let failed = |error: std::io::Error| {
            let message = format!("make {}: {error}", place.display());
            Failure::new(Code::Host, message)
        };
        if place.exists() {
            return Err(Failure::new(Code::Conflict, format!("make {}: it is there already", place.display())));
        }
        place.parent().map_or(Ok(()), make_private).and_then(|()| make_private(place)).map_err(failed)
    }

    async fn make(
        &self,
        source: Source<'_>,
        request: &CreateRequest,
        record: Record,
        (observer, cancel): (&mut dyn Observer, CancellationToken),
    ) -> Result<(Record, RestoreReport), Failure> {
        let place = self.place_of(&record);
        let asked = RestoreRequest {
            into: place.join("data"),
            finish: Finish::Promote,
            check: Check::Quick,
            with_config: false,
            no_start: false,
            tablespaces: TablespacePlaces { moved: Vec::new(), under: Some(place.join("tablespaces")) },
            wal_get: request.wal_get.clone(),
            postgres_bin_dirs: request.postgres_bin_dirs.clone(),
            user: "postgres".to_owned(),
            socket_directory: Some(record.socket_directory.clone()),
        };
        let restored = restore::execute(source.repository, source.plan, &asked, observer, cancel.clone()).await?;
        let made = tokio::select! {
            biased;
            () = cancel.cancelled() => {
                return Err(Failure::new(Code::Cancelled, format!("make sandbox {}: it was cancelled", record.id)));
            }
            made = role::make(&record, &asked.into) => made,
        };
        let made = made.map_err(|error| {
            Failure::new(Code::Postgres, format!("make the role of sandbox {}: {error:#}", record.id))
        })?;
        let mut remarks = restored.remarks.clone();
        remarks.extend(made.remarks);
        let databases = restored.databases.clone();
        Ok((Record { superuser: Some(made.superuser), databases, remarks, ..record }, restored))
    }
}
