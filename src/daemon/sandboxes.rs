//! The sandboxes of this host: their area, and the task that looks after it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio::io::{AsyncRead, AsyncWrite};
use tokio_util::sync::CancellationToken;
use tracing::{debug, error, info, warn};

use super::jobs::JobId;
use super::jobs::sandbox::life;
use super::service::Shown;
use crate::error::{Code, Failure};
use crate::operations::sandbox::proxy::{Entry, proxy};
use crate::operations::sandbox::{Area, Event, Found, Record, Settings, State};
use crate::util::clock;
use crate::util::units::show_duration;

/// Between two looks at all sandboxes: a server that ended is missed for so long, and one that is over stays for so long.
const LOOK_EVERY: Duration = Duration::from_secs(10);

/// A cheap copy of the way to the sandboxes.
#[derive(Debug, Clone)]
pub struct Sandboxes(Arc<Mutex<Inner>>);

#[derive(Debug)]
struct Inner {
    settings: Settings,
    /// Once it is open.
    area: Option<Area>,
}

impl Sandboxes {
    pub fn new(settings: &Settings) -> Sandboxes {
        Sandboxes(Arc::new(Mutex::new(Inner { settings: settings.clone(), area: None })))
    }

    /// Takes over other settings. What is being made goes on under the old ones.
    pub fn replace(&self, settings: &Settings) {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if !inner.area.as_ref().is_some_and(|area| area.replace(settings)) {
            inner.area = None;
        }
        inner.settings = settings.clone();
    }

    /// The area, opened when it is not.
    ///
    /// # Errors
    /// As [`Area::open`].
    pub fn area(&self) -> Result<Area, Failure> {
        let mut inner = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(area) = &inner.area {
            return Ok(area.clone());
        }
        let area = Area::open(&inner.settings)?;
        inner.area = Some(area.clone());
        Ok(area)
    }

    /// Looks after the sandboxes until `cancel` fires. Their servers go on then.
    ///
    /// Cancel safety: what a drop interrupts is done by the next daemon.
    pub async fn run(self, cancel: CancellationToken) {
        let mut troubled = false;
        loop {
            let pass = async {
                match self.look().await {
                    Ok(()) => troubled = false,
                    Err(failure) if troubled => {
                        debug!(error = %failure, "sandboxes are still not looked after")
                    }
                    Err(failure) => {
                        troubled = true;
                        warn!(error = %failure, hint = failure.hint, "sandboxes are not looked after, will try again");
                    }
                }
                tokio::time::sleep(LOOK_EVERY).await;
            };
            tokio::select! {
                biased;
                () = cancel.cancelled() => return,
                () = pass => {}
            }
        }
    }

    async fn look(&self) -> Result<(), Failure> {
        if self.0.lock().unwrap_or_else(PoisonError::into_inner).settings.directory.is_none() {
            return Ok(());
        }
        self.area()?.keep(clock::now().into()).await?.iter().for_each(report);
        Ok(())
    }
}

fn report(event: &Event) {
    match event {
        Event::StartedAgain(record) => {
            warn!(sandbox = %record.id, environment = record.environment, "the server of a sandbox had ended, and was started again");
        }
        Event::NotStarted(record, failure) => {
            warn!(sandbox = %record.id, environment = record.environment, error = %failure, "the server of a sandbox had ended, and does not start yet");
        }
        Event::Failed(record, failure) => {
            error!(sandbox = %record.id, environment = record.environment, error = %failure, "a sandbox has failed");
        }
        Event::Warned(record) => {
            let left = record.time_left(clock::now().into()).unwrap_or_default();
            let (user, left) = (&record.asked_by.user, show_duration(left));
            warn!(sandbox = %record.id, environment = record.environment, user, left, "a sandbox ends soon");
        }
        Event::Expired(record) => {
            info!(sandbox = %record.id, environment = record.environment, "the time of a sandbox was over: it is removed");
        }
        Event::Removed(record) => {
            info!(sandbox = %record.id, environment = record.environment, "a sandbox that was never finished is removed");
        }
        Event::NotRemoved(record, failure) => {
            warn!(sandbox = %record.id, environment = record.environment, error = %failure, "a sandbox cannot be removed, will try again");
        }
    }
}

/// What people ask of the sandboxes that are there. Who may ask is decided before.
impl Sandboxes {
    /// Those of the environments that `sees` lets pass.
    ///
    /// # Errors
    /// When no area is configured, or it cannot be listed.
    pub fn list(&self, sees: impl Fn(&str) -> bool) -> Result<Shown, Failure> {
        let mut listing = self.area()?.list()?;
        listing.sandboxes.retain(|found| sees(&found.record.environment));
        let text = match listing.sandboxes.is_empty() {
            true => "no sandbox".to_owned(),
            false => listing.sandboxes.iter().map(show).collect::<Vec<_>>().join("\n"),
        };
        Ok(Shown::new(&serde_json::json!({ "sandboxes": listing.sandboxes }), text))
    }

    /// # Errors
    /// As [`Area::extend`].
    pub async fn extend(&self, id: &JobId, expires: Option<&str>) -> Result<Shown, Failure> {
        let found = self.area()?.extend(id.as_str(), life(expires)?).await?;
        Ok(Shown::new(&found, show(&found)))
    }

    /// # Errors
    /// As [`Area::stop`].
    pub async fn stop(&self, id: &JobId) -> Result<Shown, Failure> {
        let found = self.area()?.stop(id.as_str()).await?;
        Ok(Shown::new(&found, show(&found)))
    }

    /// # Errors
    /// As [`Area::start`].
    pub async fn start(&self, id: &JobId) -> Result<Shown, Failure> {
        let found = self.area()?.start(id.as_str()).await?;
        Ok(Shown::new(&found, show(&found)))
    }

    /// # Errors
    /// As [`Area::destroy`].
    pub async fn destroy(&self, id: &JobId) -> Result<Shown, Failure> {
        let record = self.area()?.destroy(id.as_str()).await?;
        Ok(Shown::new(&record, format!("sandbox {} of {} is removed", record.id, record.environment)))
    }

    /// # Errors
    /// As [`Area::release`].
    pub async fn release(&self, id: &JobId) -> Result<Shown, Failure> {
        let released = self.area()?.release(id.as_str()).await?;
        let text = format!(
            "sandbox {id} is yours: it has no end any more, and its roles have no passwords\nstart it with: {}",
            released.start
        );
        Ok(Shown::new(&released, text))
    }

    /// A connection that may be made.
    ///
    /// # Errors
    /// When there is no such sandbox, or its server is not to run.
    pub fn passage(&self, id: &JobId, superuser: bool) -> Result<Passage, Failure> {
        let record = self.area()?.find(id.as_str())?.record;
        let entry = if superuser { Entry::Superuser } else { Entry::Role };
        if record.state == State::Running {
            return Ok(Passage { record, entry });
        }
        let message = format!("connect to sandbox {id}: it is {}", record.state.as_str());
        Err(Failure::new(Code::Conflict, message)
            .hint("`pgrecall sandbox list` says how it stands; `pgrecall sandbox start` starts one that was stopped."))
    }
}

/// The way of one connection into a sandbox.
#[derive(Debug)]
pub struct Passage {
    record: Record,
    entry: Entry,
}

impl Passage {
    /// Serves the connection to its end.
    ///
    /// Cancel safety: a drop ends both sides.
    pub async fn serve<S: AsyncRead + AsyncWrite + Unpin>(self, stream: S) {
        let sandbox = &self.record.id;
        match proxy(stream, &self.record, self.entry).await {
            Ok(traffic) => debug!(%sandbox, ?traffic, "connection to a sandbox ended"),
            Err(error) => info!(%sandbox, %error, "connection to a sandbox refused"),
        }
    }
}

/// For people, one line.
fn show(found: &Found) -> String {
    let record = &found.record;
    let ticket = record.ticket.as_ref().map_or_else(String::new, |ticket| format!(" {ticket}"));
    let end = match found.seconds_left {
        Some(seconds) => format!("ends in {}", show_duration(Duration::from_secs(seconds))),
        None => "no end".to_owned(),
    };
    format!(
        "{}  {}  {}  {}  to {}{}, for {}{ticket}",
        record.id,
        record.environment,
        record.state.as_str(),
        end,
        record.target,
        if record.writable { ", writable" } else { "" },
        record.asked_by.user
    )
}
