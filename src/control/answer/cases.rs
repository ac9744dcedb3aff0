//! Answers about sandboxes and incidents.

use std::sync::Arc;

use serde_json::Value;

use super::{Answer, Desk, shown, wal_get_words};
use crate::control::request::{Asked, ControlRequest};
use crate::daemon::incidents::read_ticket;
use crate::daemon::jobs::JobKind;
use crate::daemon::jobs::incident::{IncidentAsked, IncidentWork};
use crate::daemon::jobs::sandbox::{SandboxAsked, SandboxWork};
use crate::error::{Code, Failure};

impl Desk<'_> {
    /// `None`: it is about something else.
    pub(super) async fn case(&self) -> Result<Option<Answer>, Failure> {
        use ControlRequest as R;
        let (service, caller) = (self.service, self.permit.caller());
        let sandboxes = &service.sandboxes;
        let answer = match self.permit.request() {
            R::Sandboxes => sandboxes.list(|environment| caller.role_in(environment).is_some()).map(shown),
            R::SandboxOpen { environment, asked } => self.open_sandbox(environment, asked).await,
            R::SandboxConnect { job, superuser } => {
                sandboxes.passage(job, *superuser).map(|passage| Answer::Passage(Box::new(passage)))
            }
            R::SandboxStop { job } => sandboxes.stop(job).await.map(shown),
            R::SandboxStart { job } => sandboxes.start(job).await.map(shown),
            R::SandboxDestroy { job } => sandboxes.destroy(job).await.map(shown),
            R::SandboxExtend { job, body } => sandboxes.extend(job, text(body, "expires")?).await.map(shown),
            R::SandboxRelease { job, .. } => sandboxes.release(job).await.map(shown),
            R::Incidents { environment } => service.incidents(environment).await.map(shown),
            R::IncidentOpen { environment, asked } => self.open_incident(environment, asked).await,
            R::Incident { environment, ticket } => service.incident(environment, ticket).await.map(shown),
            R::IncidentClose { environment, ticket, body } => {
                let outcome = text(body, "outcome")?;
                service.close_incident(environment, ticket, &caller.user, outcome).await.map(shown)
            }
            _ => return Ok(None),
        };
        answer.map(Some)
    }

    async fn open_sandbox(&self, environment: &str, asked: &Asked<Value>) -> Result<Answer, Failure> {
        let words: SandboxAsked = words(&asked.words)?;
        words.check()?;
        let work = SandboxWork {
            environment: self.service.repositories.environment(environment)?,
            area: self.service.sandboxes.area()?,
            asked: words,
            wal_get: wal_get_words(&self.service.config_path)?,
        };
        self.begin(environment, JobKind::Sandbox, asked.ticket.as_deref(), Arc::new(work)).await
    }

    async fn open_incident(&self, environment: &str, asked: &Asked<Value>) -> Result<Answer, Failure> {
        let missing = || Failure::new(Code::Usage, format!("open an incident of {environment}: it has no ticket"));
        let work = IncidentWork {
            environment: self.service.repositories.environment(environment)?,
            ticket: read_ticket(asked.ticket.as_deref().ok_or_else(missing)?)?,
            asked: words::<IncidentAsked>(&asked.words)?,
            handle: self.service.handle.clone(),
        };
        self.begin(environment, JobKind::Incident, asked.ticket.as_deref(), Arc::new(work)).await
    }
}

fn words<T: serde::de::DeserializeOwned>(body: &Value) -> Result<T, Failure> {
    serde_json::from_value(body.clone())
        .map_err(|error| Failure::new(Code::Usage, format!("read the request: {error}")))
}

/// The only field that the body may have.
fn text<'b>(body: &'b Value, name: &str) -> Result<Option<&'b str>, Failure> {
    let wrong = |what: String| Err(Failure::new(Code::Usage, format!("read the request: {what}")));
    let fields = body.as_object().into_iter().flatten();
    let mut found = None;
    for (field, value) in fields {
        match value {
            _ if field != name => return wrong(format!("only {name} may be said here")),
            Value::Null => {}
            Value::String(text) => found = Some(text.as_str()),
            _ => return wrong(format!("{name} is a text")),
        }
    }
    Ok(found)
}
