//! Opening an incident as a job: it waits until the restore point is stored.

use async_trait::async_trait;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{JobContext, Work};
use crate::config::Environment;
use crate::daemon::handle::Handle;
use crate::daemon::incidents::shown;
use crate::error::{Code, Failure};
use crate::operations::incident::{self, By, Scene, Tail};
use crate::pg::Lsn;
use crate::repository::Ticket;

/// An incident as it is asked for; the ticket stands beside it, as for every job.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct IncidentAsked {
    #[serde(default)]
    pub reason: Option<String>,
}

/// Opens an incident.
pub struct IncidentWork {
    pub environment: Environment,
    pub ticket: Ticket,
    pub asked: IncidentAsked,
    pub handle: Handle,
}

#[async_trait]
impl Work for IncidentWork {
    async fn run(&self, job: &JobContext) -> Result<Value, Failure> {
        let name = self.environment.name.as_str();
        // Without a server here there is no restore point, and that is said in the log.
        let connect = self.environment.postgres.as_ref().map(|_| self.environment.connect()).transpose()?;
        let tail = Archive { handle: &self.handle, environment: name };
        let scene = Scene { environment: name, repository: &job.repository, connect: connect.as_ref(), tail: &tail };
        let by = By(&job.spec.asked_by.user);
        let opened = tokio::select! {
            biased;
            () = job.cancel.cancelled() => return Err(Failure::new(Code::Cancelled, "open the incident: it was cancelled")),
            opened = incident::open(&scene, &self.ticket, by, self.asked.reason.as_deref()) => opened?,
        };
        opened.entries.iter().for_each(|entry| job.log(&entry.text));
        Ok(shown(name, &opened).into_result())
    }
}

/// The environment's own task.
struct Archive<'a> {
    handle: &'a Handle,
    environment: &'a str,
}

#[async_trait]
impl Tail for Archive<'_> {
    async fn stored(&self, lsn: Lsn) -> Result<(), Failure> {
        let mut watched = self.handle.watch(self.environment)?;
        let stored =
            watched.wait_for(|snapshot| snapshot.archive.as_ref().is_some_and(|archive| archive.stored_lsn >= lsn));
        let stopped =
            |_| Failure::new(Code::Cancelled, format!("wait for the WAL of {}: its task has ended", self.environment));
        stored.await.map(|_| ()).map_err(stopped)
    }
}
