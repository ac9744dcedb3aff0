//! What the daemon does for a request that may be asked.

mod cases;

use std::sync::Arc;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::sync::watch;

use super::auth::Permit;
use super::protocol::{JobReport, Jobs, Status};
use super::request::{Asked, ControlRequest};
use crate::daemon::jobs::backup::BackupWork;
use crate::daemon::jobs::prune::PruneWork;
use crate::daemon::jobs::restore::{RestoreAsked, RestoreWork};
use crate::daemon::jobs::verify::VerifyWork;
use crate::daemon::jobs::{Asker, JobId, JobKind, JobRecord, JobSpec, JobState, Via, Work};
use crate::daemon::sandboxes::Passage;
use crate::daemon::service::wal_get_words;
use crate::daemon::service::{Service, Shown};
use crate::error::{Code, Failure};

/// So long a job may need to come to be on record before its id is given without it.
const ON_RECORD_WAIT: Duration = Duration::from_secs(10);

/// What is sent back.
pub enum Answer {
    Document(Value),
    /// A job was begun, or is the one that the idempotency key stands for.
    Accepted(Value),
    Follow(watch::Receiver<JobRecord>),
    /// The connection itself becomes one to a sandbox.
    Passage(Box<Passage>),
}

/// Answers; `job` is the id of the job that the request begins.
///
/// # Errors
/// As what was asked for says.
pub async fn answer(permit: &Permit, service: &Service, job: Option<JobId>) -> Result<Answer, Failure> {
    use ControlRequest as R;
    let desk = Desk { permit, service, job };
    match permit.request() {
        R::Status => Ok(document(&desk.status())),
        R::Backups { environment } => service.backups(environment).await.map(shown),
        R::Plan { environment, target } => service.plan(environment, target).await.map(shown),
        R::Backup { environment, asked } => desk.backup(environment, asked).await,
        R::Restore { environment, asked } => desk.restore(environment, asked).await,
        R::Verify { environment, asked } => {
            let work = Arc::new(VerifyWork(asked.words.clone()));
            desk.begin(environment, JobKind::Verify, asked.ticket.as_deref(), work).await
        }
        R::Audit { environment, shown } => service.recorded(environment, *shown).await.map(|record| document(&record)),
        R::Jobs { environment } => Ok(document(&desk.jobs(environment.as_deref()))),
        R::Job { job } => desk.find(job).map(|record| document(&JobReport::from(&record))),
        R::JobFollow { job } => {
            let record = service.jobs.follow(job).ok_or_else(|| gone(job))?;
            Ok(Answer::Follow(record))
        }
        R::JobCancel { job } => {
            service.jobs.cancel(job)?;
            desk.find(job).map(|record| document(&JobReport::from(&record)))
        }
        R::Reload => service.reload().await.map(shown),
        R::Pins { environment } => service.pins(environment).await.map(shown),
        R::PinAdd { environment, body } => service.add_pin(environment, body, &permit.caller().user).await.map(shown),
        R::PinRemove { environment, pin } => service.remove_pin(environment, pin).await.map(shown),
        R::Prune { environment, asked } => {
            // Refused at once where the job could only fail.
            service.handle.watch(environment)?;
            let work = Arc::new(PruneWork(service.handle.clone()));
            desk.begin(environment, JobKind::Prune, asked.ticket.as_deref(), work).await
        }
        R::PrunePlan { environment } => service.prune_plan(environment).await.map(shown),
        R::Sandboxes
        | R::SandboxOpen { .. }
        | R::SandboxConnect { .. }
        | R::SandboxStop { .. }
        | R::SandboxStart { .. }
        | R::SandboxDestroy { .. }
        | R::SandboxExtend { .. }
        | R::SandboxRelease { .. }
        | R::Incidents { .. }
        | R::IncidentOpen { .. }
        | R::Incident { .. }
        | R::IncidentClose { .. } => desk.case().await?.ok_or_else(|| not_available(permit)),
    }
}

struct Desk<'a> {
    permit: &'a Permit,
    service: &'a Service,
    job: Option<JobId>,
}

impl Desk<'_> {
    /// What the caller may see of it.
    fn status(&self) -> Status {
        let mut snapshot = self.service.handle.snapshot();
        snapshot.environments.retain(|environment| self.permit.caller().role_in(&environment.name).is_some());
        let unfinished = self.jobs(None).jobs.into_iter().filter(|job| !job.is_final);
        let jobs = unfinished.map(|job| JobReport { log: Vec::new(), ..job }).collect();
        Status { jobs, ..Status::from(&snapshot) }
    }

    fn jobs(&self, environment: Option<&str>) -> Jobs {
        let records = self.service.jobs.list(environment).into_iter();
        let seen = records.filter(|record| self.permit.caller().role_in(&record.spec.environment).is_some());
        Jobs { jobs: seen.map(|record| JobReport::from(&record)).collect() }
    }

    fn find(&self, job: &JobId) -> Result<JobRecord, Failure> {
        self.service.jobs.get(job).ok_or_else(|| gone(job))
    }

    async fn backup<T>(&self, environment: &str, asked: &Asked<T>) -> Result<Answer, Failure> {
        // Refused at once where the job could only fail.
        self.service.handle.watch(environment)?;
        let (handle, name) = (self.service.handle.clone(), environment.to_owned());
        let work = BackupWork { ask: Box::new(move |unwanted| handle.start_backup(&name, unwanted)) };
        self.begin(environment, JobKind::Backup, asked.ticket.as_deref(), Arc::new(work)).await
    }

    async fn restore(&self, environment: &str, asked: &Asked<RestoreAsked>) -> Result<Answer, Failure> {
        asked.words.check()?;
        let work = RestoreWork {
            environment: self.service.repositories.environment(environment)?,
            asked: asked.words.clone(),
            wal_get: wal_get_words(&self.service.config_path)?,
        };
        self.begin(environment, JobKind::Restore, asked.ticket.as_deref(), Arc::new(work)).await
    }

    /// Submits a job and waits until it is on record.
    async fn begin(
        &self,
        environment: &str,
        kind: JobKind,
        ticket: Option<&str>,
        work: Arc<dyn Work>,
    ) -> Result<Answer, Failure> {
        let (request, caller) = (self.permit.request(), self.permit.caller());
        let spec = JobSpec {
            environment: environment.to_owned(),
            kind,
            asked_by: Asker { uid: Some(caller.uid), user: caller.user.clone(), via: Via::Socket },
            request: request.detail(),
            ticket: ticket.map(str::to_owned),
            idempotency_key: request.idempotency_key().map(str::to_owned),
        };
        let jobs = &self.service.jobs;
        let id = self.job.clone().ok_or_else(|| Failure::new(Code::Internal, "begin a job: it was given no id"))?;
        let id = jobs.submit_as(id, spec, work)?;
        if let Some(mut record) = jobs.follow(&id) {
            let on_record = record.wait_for(|record| record.state != JobState::Accepted);
            let _ = tokio::time::timeout(ON_RECORD_WAIT, on_record).await;
        }
        let record = self.find(&id)?;
        Ok(Answer::Accepted(json!({ "job": id.as_str(), "state": record.state.as_str() })))
    }
}

fn document<T: serde::Serialize>(value: &T) -> Answer {
    Answer::Document(serde_json::to_value(value).expect("our own types are representable in JSON"))
}

fn shown(shown: Shown) -> Answer {
    Answer::Document(shown.into_result())
}

fn gone(job: &JobId) -> Failure {
    Failure::new(Code::NotFound, format!("find job {job}"))
}

fn not_available(permit: &Permit) -> Failure {
    Failure::new(Code::NotFound, format!("answer {}: not available here", permit.request().name()))
}
