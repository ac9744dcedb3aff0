//! What one may ask over the socket: method, path and body become one value, and the value says who may ask for it.
//!
//! Invariant: a [`ControlRequest`] is handled only inside a [`super::auth::Permit`], and each names its role: the matches below
//! have no arm for the rest.

use hyper::Method;
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use crate::daemon::access::Role;
use crate::daemon::audit::Weight;
use crate::daemon::jobs::JobId;
use crate::daemon::jobs::restore::RestoreAsked;
use crate::daemon::jobs::verify::VerifyAsked;
use crate::daemon::service::TargetAsked;
use crate::error::{Code, Failure};
use crate::util::nearest::nearest;
use crate::util::percent;

/// Acts that `audit` shows when nobody says how many.
const AUDIT_SHOWN: usize = 1000;
const NAME_CHARACTERS_MAX: usize = 64;
const PIN_CHARACTERS_MAX: usize = 200;

/// A request, with everything that it says.
#[derive(Debug, Clone, PartialEq)]
pub enum ControlRequest {
    Status,
    Backups { environment: String },
    Plan { environment: String, target: TargetAsked },
    Backup { environment: String, asked: Asked<NoMore> },
    Restore { environment: String, asked: Asked<RestoreAsked> },
    Verify { environment: String, asked: Asked<VerifyAsked> },
    Prune { environment: String, asked: Asked<NoMore> },
    PrunePlan { environment: String },
    Pins { environment: String },
    PinAdd { environment: String, body: Value },
    PinRemove { environment: String, pin: String },
    Audit { environment: String, shown: usize },
    Jobs { environment: Option<String> },
    Job { job: JobId },
    JobFollow { job: JobId },
    JobCancel { job: JobId },
    Sandboxes,
    SandboxOpen { environment: String, asked: Asked<Value> },
    SandboxConnect { job: JobId, superuser: bool },
    SandboxStop { job: JobId },
    SandboxStart { job: JobId },
    SandboxDestroy { job: JobId },
    SandboxExtend { job: JobId, body: Value },
    SandboxRelease { job: JobId, body: Value },
    Incidents { environment: String },
    IncidentOpen { environment: String, asked: Asked<Value> },
    Incident { environment: String, ticket: String },
    IncidentClose { environment: String, ticket: String, body: Value },
    Reload,
}

/// What every request for a job may carry besides its own words.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Asked<T> {
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub ticket: Option<String>,
    /// The same key again begins nothing twice.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idempotency_key: Option<String>,
    pub words: T,
}

/// A request without words of its own.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NoMore {}

/// What a request is about, as far as rights go.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subject<'r> {
    /// Whatever the caller may see.
    Visible,
    Environment(&'r str),
    /// The environment of this job.
    Job(&'r JobId),
    /// As a job, but only whoever asked for it, or an admin.
    OwnJob(&'r JobId),
    /// The daemon itself.
    Daemon,
}

impl ControlRequest {
    pub fn required_role(&self) -> Role {
        use ControlRequest as R;
        match self {
            R::Status
            | R::Backups { .. }
            | R::Plan { .. }
            | R::PrunePlan { .. }
            | R::Pins { .. }
            | R::Jobs { .. }
            | R::Job { .. }
            | R::JobFollow { .. }
            | R::Sandboxes
            | R::Incidents { .. }
            | R::Incident { .. } => Role::Viewer,
            R::Backup { .. }
            | R::Verify { .. }
            // Of a restore or a prune only an admin: see `auth`.
            | R::JobCancel { .. }
            | R::SandboxOpen { .. }
            | R::SandboxConnect { superuser: false, .. }
            | R::SandboxStop { .. }
            | R::SandboxStart { .. }
            | R::SandboxDestroy { .. }
            | R::SandboxExtend { .. }
            | R::IncidentOpen { .. }
            | R::IncidentClose { .. } => Role::Operator,
            // A restore writes wherever the daemon's user may.
            R::Restore { .. }
            | R::Prune { .. }
            | R::PinAdd { .. }
            | R::PinRemove { .. }
            | R::Audit { .. }
            | R::SandboxConnect { superuser: true, .. }
            | R::SandboxRelease { .. }
            | R::Reload => Role::Admin,
        }
    }

    pub fn subject(&self) -> Subject<'_> {
        use ControlRequest as R;
        match self {
            R::Status | R::Jobs { environment: None } | R::Sandboxes => Subject::Visible,
            R::Jobs { environment: Some(environment) }
            | R::Backups { environment }
            | R::Plan { environment, .. }
            | R::Backup { environment, .. }
            | R::Restore { environment, .. }
            | R::Verify { environment, .. }
            | R::Prune { environment, .. }
            | R::PrunePlan { environment }
            | R::Pins { environment }
            | R::PinAdd { environment, .. }
            | R::PinRemove { environment, .. }
            | R::Audit { environment, .. }
            | R::SandboxOpen { environment, .. }
            | R::Incidents { environment }
            | R::IncidentOpen { environment, .. }
            | R::Incident { environment, .. }
            | R::IncidentClose { environment, .. } => Subject::Environment(environment),
            R::Job { job } | R::JobFollow { job } | R::JobCancel { job } => Subject::Job(job),
            R::SandboxConnect { job, .. }
            | R::SandboxStop { job }
            | R::SandboxStart { job }
            | R::SandboxDestroy { job }
            | R::SandboxExtend { job, .. }
            | R::SandboxRelease { job, .. } => Subject::OwnJob(job),
            R::Reload => Subject::Daemon,
        }
    }

    /// Words for a job, when it begins one: those that every job has.
    pub fn idempotency_key(&self) -> Option<&str> {
        use ControlRequest as R;
        match self {
            R::Backup { asked, .. } | R::Prune { asked, .. } => asked.idempotency_key.as_deref(),
            R::Restore { asked, .. } => asked.idempotency_key.as_deref(),
            R::Verify { asked, .. } => asked.idempotency_key.as_deref(),
            R::SandboxOpen { asked, .. } | R::IncidentOpen { asked, .. } => asked.idempotency_key.as_deref(),
            _ => None,
        }
    }

    /// Whether it begins a job.
    pub fn begins_job(&self) -> bool {
        use ControlRequest as R;
        matches!(
            self,
            R::Backup { .. }
                | R::Restore { .. }
                | R::Verify { .. }
                | R::Prune { .. }
                | R::SandboxOpen { .. }
                | R::IncidentOpen { .. }
        )
    }

    /// The environment that the request names; a job's is known to the daemon alone.
    pub fn environment(&self) -> Option<&str> {
        match self.subject() {
            Subject::Environment(environment) => Some(environment),
            Subject::Visible | Subject::Job(_) | Subject::OwnJob(_) | Subject::Daemon => None,
        }
    }

    /// Whether it can be taken back.
    pub fn weight(&self) -> Weight {
        use ControlRequest as R;
        match self {
            R::Prune { .. } | R::PinRemove { .. } | R::SandboxDestroy { .. } | R::SandboxRelease { .. } => {
                Weight::Irreversible
            }
            _ => Weight::Reversible,
        }
    }

    /// How the request is named on record and in messages.
    pub fn name(&self) -> &'static str {
        use ControlRequest as R;
        match self {
            R::Status => "status",
            R::Backups { .. } => "backups",
            R::Plan { .. } => "plan",
            R::Backup { .. } => "backup",
            R::Restore { .. } => "restore",
            R::Verify { .. } => "verify",
            R::Prune { .. } => "prune",
            R::PrunePlan { .. } => "prune-plan",
            R::Pins { .. } => "pins",
            R::PinAdd { .. } => "pin-add",
            R::PinRemove { .. } => "pin-remove",
            R::Audit { .. } => "audit",
            R::Jobs { .. } => "jobs",
            R::Job { .. } => "job",
            R::JobFollow { .. } => "job-follow",
            R::JobCancel { .. } => "job-cancel",
            R::Sandboxes => "sandboxes",
            R::SandboxOpen { .. } => "sandbox",
            R::SandboxConnect { superuser: false, .. } => "sandbox-connect",
            R::SandboxConnect { superuser: true, .. } => "sandbox-connect-superuser",
            R::SandboxStop { .. } => "sandbox-stop",
            R::SandboxStart { .. } => "sandbox-start",
            R::SandboxDestroy { .. } => "sandbox-destroy",
            R::SandboxExtend { .. } => "sandbox-extend",
            R::SandboxRelease { .. } => "sandbox-release",
            R::Incidents { .. } => "incidents",
            R::IncidentOpen { .. } => "incident-open",
            R::Incident { .. } => "incident",
            R::IncidentClose { .. } => "incident-close",
            R::Reload => "reload",
        }
    }

    /// Its words, for the record.
    pub fn detail(&self) -> Value {
        use ControlRequest as R;
        match self {
            R::Plan { target, .. } => document(target),
            R::Restore { asked, .. } => document(&asked.words),
            R::Verify { asked, .. } => document(&asked.words),
            R::SandboxOpen { asked, .. } | R::IncidentOpen { asked, .. } => asked.words.clone(),
            R::PinAdd { body, .. }
            | R::SandboxExtend { body, .. }
            | R::SandboxRelease { body, .. }
            | R::IncidentClose { body, .. } => body.clone(),
            R::PinRemove { pin, .. } => serde_json::json!({ "pin": pin }),
            _ => Value::Null,
        }
    }

    /// The job that it names.
    pub fn job(&self) -> Option<&JobId> {
        match self.subject() {
            Subject::Job(job) | Subject::OwnJob(job) => Some(job),
            Subject::Visible | Subject::Environment(_) | Subject::Daemon => None,
        }
    }

    pub fn ticket(&self) -> Option<&str> {
        use ControlRequest as R;
        match self {
            R::Backup { asked, .. } | R::Prune { asked, .. } => asked.ticket.as_deref(),
            R::Restore { asked, .. } => asked.ticket.as_deref(),
            R::Verify { asked, .. } => asked.ticket.as_deref(),
            R::SandboxOpen { asked, .. } | R::IncidentOpen { asked, .. } => asked.ticket.as_deref(),
            R::Incident { ticket, .. } | R::IncidentClose { ticket, .. } => Some(ticket),
            _ => None,
        }
    }
}

fn document<T: Serialize>(words: &T) -> Value {
    serde_json::to_value(words).unwrap_or(Value::Null)
}

/// Why method, path and body are no request.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum ParseError {
    NoSuchPath(Failure),
    OtherMethod(Failure),
    Malformed(Failure),
}

/// The first words of paths below `/v1/` and below an environment, for hints.
const PLACES: [&str; 6] = ["status", "environments", "jobs", "sandboxes", "reload", "metrics"];
const OF_ENVIRONMENT: [&str; 10] =
    ["backups", "plan", "backup", "restore", "verify", "prune", "pins", "audit", "sandboxes", "incidents"];

/// Reads a request.
///
/// # Errors
/// Which names what is wrong, and never repeats more of the input than one segment of the path.
pub fn parse(method: &Method, path: &str, query: Option<&str>, body: &[u8]) -> Result<ControlRequest, ParseError> {
    use ControlRequest as R;
    let parts: Vec<&str> = path.strip_prefix('/').unwrap_or_default().split('/').collect();
    let input = Input { method, query, body };
    let ("v1", rest) = parts.split_first().map_or(("", &[][..]), |(first, rest)| (*first, rest)) else {
        return Err(no_such(parts.first().copied().unwrap_or_default(), &["v1"]));
    };
    match rest {
        ["status"] => input.get(R::Status),
        ["reload"] => input.post(R::Reload),
        ["sandboxes"] => input.get(R::Sandboxes),
        ["jobs"] => {
            let environment = input.query("environment")?.map(str::to_owned);
            input.get(R::Jobs { environment })
        }
        ["jobs", job] => input.get(R::Job { job: job_id(job)? }),
        ["jobs", job, "follow"] => input.get(R::JobFollow { job: job_id(job)? }),
        ["jobs", job, "cancel"] => input.post(R::JobCancel { job: job_id(job)? }),
        ["sandboxes", job, verb] => parse_sandbox(&input, job_id(job)?, verb),
        ["environments", environment, rest @ ..] => parse_of_environment(&input, name(environment)?, rest),
        [place, ..] => Err(no_such(place, &PLACES)),
        [] => Err(no_such("", &PLACES)),
    }
}

fn parse_sandbox(input: &Input<'_>, job: JobId, verb: &str) -> Result<ControlRequest, ParseError> {
    use ControlRequest as R;
    match verb {
        "connect" => {
            let superuser = match input.query("superuser")? {
                None | Some("false") => false,
                Some("true") => true,
                Some(_) => return Err(malformed("superuser is true or false")),
            };
            input.post(R::SandboxConnect { job, superuser })
        }
        "stop" => input.post(R::SandboxStop { job }),
        "start" => input.post(R::SandboxStart { job }),
        "destroy" => input.post(R::SandboxDestroy { job }),
        "extend" => input.post(R::SandboxExtend { job, body: input.object()? }),
        "release" => input.post(R::SandboxRelease { job, body: input.object()? }),
        other => Err(no_such(other, &["connect", "stop", "start", "destroy", "extend", "release"])),
    }
}

fn parse_of_environment(input: &Input<'_>, environment: String, rest: &[&str]) -> Result<ControlRequest, ParseError> {
    use ControlRequest as R;
    let posts = *input.method == Method::POST;
    match rest {
        ["backups"] => input.get(R::Backups { environment }),
        ["plan"] => input.post_with(|target| R::Plan { environment, target }),
        ["backup"] => input.ask(|asked| R::Backup { environment, asked }),
        ["restore"] => input.ask(|asked| R::Restore { environment, asked }),
        ["verify"] => input.ask(|asked| R::Verify { environment, asked }),
        ["prune", "plan"] => input.post_with(|NoMore {}| R::PrunePlan { environment }),
        ["prune"] => input.ask(|asked| R::Prune { environment, asked }),
        ["pins"] if posts => input.post(R::PinAdd { environment, body: input.object()? }),
        ["pins"] => input.get(R::Pins { environment }),
        ["pins", pin] => input.with(&Method::DELETE, R::PinRemove { environment, pin: pin_name(pin)? }),
        ["audit"] => {
            let count = |text: &str| text.parse().map_err(|_| malformed("last is a number of acts"));
            let shown = input.query("last")?.map(count).transpose()?.unwrap_or(AUDIT_SHOWN);
            input.get(R::Audit { environment, shown })
        }
        ["sandboxes"] => input.ask(|asked| R::SandboxOpen { environment, asked }),
        ["incidents"] if posts => input.ask(|asked| R::IncidentOpen { environment, asked }),
        ["incidents"] => input.get(R::Incidents { environment }),
        ["incidents", ticket] => input.get(R::Incident { environment, ticket: name(ticket)? }),
        ["incidents", ticket, "close"] => {
            input.post(R::IncidentClose { environment, ticket: name(ticket)?, body: input.object()? })
        }
        [place, ..] => Err(no_such(place, &OF_ENVIRONMENT)),
        [] => Err(no_such("", &OF_ENVIRONMENT)),
    }
}

struct Input<'i> {
    method: &'i Method,
    query: Option<&'i str>,
    body: &'i [u8],
}

impl Input<'_> {
    fn with(&self, method: &Method, request: ControlRequest) -> Result<ControlRequest, ParseError> {
        if self.method == method {
            return Ok(request);
        }
        let message = format!("answer {} as {}: {method} is needed", shortened(self.method.as_str()), request.name());
        Err(ParseError::OtherMethod(Failure::new(Code::Usage, message)))
    }

    fn get(&self, request: ControlRequest) -> Result<ControlRequest, ParseError> {
        self.with(&Method::GET, request)
    }

    fn post(&self, request: ControlRequest) -> Result<ControlRequest, ParseError> {
        self.with(&Method::POST, request)
    }

    fn post_with<T: DeserializeOwned>(
        &self,
        request: impl FnOnce(T) -> ControlRequest,
    ) -> Result<ControlRequest, ParseError> {
        self.post(request(words(self.object()?)?))
    }

    /// A request for a job: its own words, and those of every job beside them.
    fn ask<T: DeserializeOwned>(
        &self,
        request: impl FnOnce(Asked<T>) -> ControlRequest,
    ) -> Result<ControlRequest, ParseError> {
        let mut body = self.object()?;
        let mut take = |key: &str| match body.as_object_mut().and_then(|fields| fields.remove(key)) {
            None | Some(Value::Null) => Ok(None),
            Some(Value::String(text)) => name(&text).map(Some),
            Some(_) => Err(malformed(format!("{key} is a text"))),
        };
        let (ticket, idempotency_key) = (take("ticket")?, take("idempotency_key")?);
        self.post(request(Asked { ticket, idempotency_key, words: words(body)? }))
    }

    /// The body; none is an empty document.
    fn object(&self) -> Result<Value, ParseError> {
        if self.body.iter().all(u8::is_ascii_whitespace) {
            return Ok(Value::Object(serde_json::Map::new()));
        }
        match serde_json::from_slice(self.body) {
            Ok(Value::Object(fields)) => Ok(Value::Object(fields)),
            Ok(_) => Err(malformed("the body is a document in braces")),
            Err(error) => Err(malformed(format!("the body is no JSON: {error}"))),
        }
    }

    fn query(&self, wanted: &str) -> Result<Option<&str>, ParseError> {
        let mut found = None;
        for (key, value) in self.query.iter().flat_map(|query| query.split('&')).filter_map(|pair| pair.split_once('='))
        {
            if key != wanted {
                return Err(malformed(format!("only {wanted}=… may follow the path")));
            }
            found = Some(value);
        }
        Ok(found)
    }
}

fn words<T: DeserializeOwned>(body: Value) -> Result<T, ParseError> {
    serde_json::from_value(body).map_err(|error| malformed(error.to_string()))
}

fn job_id(text: &str) -> Result<JobId, ParseError> {
    text.parse().map_err(|_| {
        let failure =
            Failure::new(Code::Usage, format!("read the request: {:?} is not the id of a job", shortened(text)));
        ParseError::Malformed(failure.hint("An id looks like 20261128t034550z_68e1f7; `pgrecall jobs list` has them."))
    })
}

/// The name of an environment, a pin, a ticket, a key: printable, without what separates parts of a path.
fn name(text: &str) -> Result<String, ParseError> {
    let plain = |c: char| c.is_alphanumeric() || matches!(c, '-' | '_' | '.' | ':' | '+' | '@' | '#');
    let fits = (1..=NAME_CHARACTERS_MAX).contains(&text.chars().count()) && text.chars().all(plain);
    if fits && !matches!(text, "." | "..") {
        return Ok(text.to_owned());
    }
    let rule = format!("1 to {NAME_CHARACTERS_MAX} letters, digits, or - _ . : + @ #");
    Err(malformed(format!("{:?} is not a name ({rule})", shortened(text))))
}

/// The name of a pin, which people choose as they like.
fn pin_name(segment: &str) -> Result<String, ParseError> {
    let fits = |name: &String| (1..=PIN_CHARACTERS_MAX).contains(&name.chars().count());
    percent::decode(segment).filter(fits).ok_or_else(|| {
        malformed(format!("{:?} is not the name of a pin (1 to {PIN_CHARACTERS_MAX} characters)", shortened(segment)))
    })
}

fn malformed(what: impl std::fmt::Display) -> ParseError {
    ParseError::Malformed(Failure::new(Code::Usage, format!("read the request: {what}")))
}

fn no_such(place: &str, known: &[&'static str]) -> ParseError {
    let message = format!("answer a request for {:?}: there is no such path", shortened(place));
    let failure = Failure::new(Code::NotFound, message);
    ParseError::NoSuchPath(match nearest(place, known.iter().copied()) {
        Some(meant) => failure.hint(format!("Did you mean {meant}?")),
        None => failure.hint("The command may be newer than the daemon: restart the daemon."),
    })
}

/// At most one segment's worth of what somebody sent, for a message.
fn shortened(text: &str) -> String {
    text.chars().take(NAME_CHARACTERS_MAX).collect()
}

#[cfg(test)]
pub(super) mod tests;
