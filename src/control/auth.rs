//! Who may ask for what. Nothing is handled that did not come through [`Permit::check`].
//!
//! An environment that the caller may not see is answered like one that does not exist, and so are its jobs.

use crate::daemon::access::{Caller, Role};
use crate::daemon::jobs::{JobId, JobKind, JobRecord, Jobs};
use crate::daemon::repositories::not_found;
use crate::error::{Code, Failure};

use super::request::{ControlRequest, Subject};

/// A request whose caller may ask for it.
#[derive(Debug)]
pub struct Permit {
    request: ControlRequest,
    caller: Caller,
    role: Role,
    environment: Option<String>,
}

/// Why somebody may not.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refusal {
    /// What the caller hears.
    pub failure: Failure,
    /// The environment that it was about, if the daemon has it.
    pub environment: Option<String>,
    pub role: Option<Role>,
}

impl Permit {
    /// Decides.
    ///
    /// # Errors
    /// What the caller is told, and what is put on record.
    pub fn check(request: ControlRequest, caller: Caller, jobs: &Jobs) -> Result<Permit, Box<Refusal>> {
        let needed = request.required_role();
        if caller.highest().is_none() {
            let environment = request.environment().map(str::to_owned);
            return Err(refusal(nobody(), environment, None));
        }
        let (environment, role) = match request.subject() {
            Subject::Visible => (None, caller.highest()),
            Subject::Daemon => (None, caller.everywhere),
            Subject::Environment(name) => (Some(name.to_owned()), caller.role_in(name)),
            Subject::Job(id) | Subject::OwnJob(id) => match jobs.get(id) {
                None => return Err(refusal(no_such_job(id), None, caller.highest())),
                Some(job) => {
                    let environment = job.spec.environment.clone();
                    let role = caller.role_in(&environment);
                    let Some(seen) = role else { return Err(refusal(no_such_job(id), Some(environment), None)) };
                    if let Some(failure) = of_job(&request, &caller, seen, &job) {
                        return Err(refusal(failure, Some(environment), role));
                    }
                    (Some(environment), role)
                }
            },
        };
        match role {
            Some(role) if role >= needed => Ok(Permit { request, caller, role, environment }),
            Some(role) => Err(refusal(denied(&request, needed, role), environment, Some(role))),
            None => {
                let unseen = |name: &String| not_found(name, caller.visible());
                let failure = environment.as_ref().map_or_else(nobody_here, unseen);
                Err(refusal(failure, environment, None))
            }
        }
    }

    pub fn request(&self) -> &ControlRequest {
        &self.request
    }

    pub fn caller(&self) -> &Caller {
        &self.caller
    }

    pub fn role(&self) -> Role {
        self.role
    }

    /// What it is about: by name, or as the job's.
    pub fn environment(&self) -> Option<&str> {
        self.environment.as_deref()
    }
}

/// What stands against it besides the role that the request itself names.
fn of_job(request: &ControlRequest, caller: &Caller, role: Role, job: &JobRecord) -> Option<Failure> {
    if let ControlRequest::JobCancel { .. } = request {
        let needed = match job.spec.kind {
            JobKind::Restore | JobKind::Prune => Role::Admin,
            JobKind::Backup | JobKind::Sandbox | JobKind::Verify | JobKind::Incident => Role::Operator,
        };
        return (role < needed).then(|| denied(request, needed, role));
    }
    let Subject::OwnJob(id) = request.subject() else { return None };
    if job.spec.kind != JobKind::Sandbox {
        return Some(Failure::new(Code::NotFound, format!("find sandbox {id}: that job is no sandbox")));
    }
    let is_own = job.spec.asked_by.uid == Some(caller.uid);
    let message = || format!("ask for {} of {id}: it is for {}", request.name(), job.spec.asked_by.user);
    let hint = "Only whoever asked for a sandbox, or an admin of its environment, may.";
    (!is_own && role < Role::Admin).then(|| Failure::new(Code::Denied, message()).hint(hint))
}

fn refusal(failure: Failure, environment: Option<String>, role: Option<Role>) -> Box<Refusal> {
    Box::new(Refusal { failure, environment, role })
}

fn denied(request: &ControlRequest, needed: Role, role: Role) -> Failure {
    let place = request.environment().map_or_else(String::new, |name| format!(" of {name}"));
    let message =
        format!("ask for {}{place}: you are {} there, {} is needed", request.name(), role.as_str(), needed.as_str());
    Failure::new(Code::Denied, message).hint("[access] in the configuration says who may do what.")
}

fn nobody() -> Failure {
    let failure = Failure::new(Code::Denied, "use the control socket: you have no role in any environment");
    failure
        .hint("[access] in the configuration gives roles to users and groups; or run the command as the daemon's user.")
}

fn nobody_here() -> Failure {
    let failure = Failure::new(Code::Denied, "ask the daemon itself: you have a role in some environments only");
    failure.hint("[access] in the configuration, outside of environments, gives roles over the daemon.")
}

fn no_such_job(id: &JobId) -> Failure {
    let failure = Failure::new(Code::NotFound, format!("find job {id}"));
    failure.hint("`pgrecall jobs list` names those that there are.")
}

#[cfg(test)]
mod tests;
