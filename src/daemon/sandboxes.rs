//! The sandboxes of this host: their area, and the task that looks after it.

use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use tokio_util::sync::CancellationToken;
use tracing::{error, info, warn};

use crate::error::Failure;
use crate::operations::sandbox::{Area, Event, Settings};
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
                        tracing::debug!(error = %failure, "sandboxes are still not looked after")
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
