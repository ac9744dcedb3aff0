use std::collections::BTreeMap;
use std::path::Path;
use std::sync::Arc;

use async_trait::async_trait;
use tokio_util::sync::CancellationToken;

use super::super::request::tests::every;
use super::*;
use crate::config::{Config, Limits};
use crate::daemon::jobs::{Asker, JobContext, JobSpec, Via, Work};
use crate::daemon::repositories::Repositories;

/// What each request needs, as `docs/control-socket.md` says: written down here once more, so that a slip in the code shows.
const NEEDS: [(&str, Role); 30] = [
    ("status", Role::Viewer),
    ("backups", Role::Viewer),
    ("plan", Role::Viewer),
    ("backup", Role::Operator),
    ("restore", Role::Admin),
    ("verify", Role::Operator),
    ("prune", Role::Admin),
    ("prune-plan", Role::Viewer),
    ("pins", Role::Viewer),
    ("pin-add", Role::Admin),
    ("pin-remove", Role::Admin),
    ("audit", Role::Admin),
    ("jobs", Role::Viewer),
    ("job", Role::Viewer),
    ("job-follow", Role::Viewer),
    ("job-cancel", Role::Operator),
    ("sandboxes", Role::Viewer),
    ("sandbox", Role::Operator),
    ("sandbox-connect", Role::Operator),
    ("sandbox-connect-superuser", Role::Admin),
    ("sandbox-stop", Role::Operator),
    ("sandbox-start", Role::Operator),
    ("sandbox-destroy", Role::Operator),
    ("sandbox-extend", Role::Operator),
    ("sandbox-release", Role::Admin),
    ("incidents", Role::Viewer),
    ("incident-open", Role::Operator),
    ("incident", Role::Viewer),
    ("incident-close", Role::Operator),
    ("reload", Role::Admin),
];
const DAEMON_WIDE: [&str; 1] = ["reload"];
/// Answered with what the caller may see.
const OF_ALL: [&str; 2] = ["status", "sandboxes"];

struct Ends;

#[async_trait]
impl Work for Ends {
    async fn run(&self, _: &JobContext) -> Result<serde_json::Value, Failure> {
        Ok(serde_json::Value::Null)
    }
}

struct World {
    _dir: tempfile::TempDir,
    jobs: Jobs,
}

impl World {
    fn new() -> World {
        let dir = tempfile::tempdir().expect("temporary directory");
        let place = dir.path().display();
        let text = format!("[defaults]\nrepository = \"file://{place}\"\n[environment.shop]\n[environment.billing]\n");
        let config = Config::parse(&text, Path::new("c")).expect("a configuration");
        let repositories = Repositories::new(&config);
        let jobs = Jobs::start(repositories, "here".into(), Limits::default(), CancellationToken::new());
        World { _dir: dir, jobs }
    }

    /// A job of shop that `uid` asked for.
    fn job(&self, kind: JobKind, uid: u32) -> JobId {
        let spec = JobSpec {
            environment: "shop".into(),
            kind,
            asked_by: Asker { uid: Some(uid), user: "ada".into(), via: Via::Socket },
            request: serde_json::Value::Null,
            ticket: None,
            idempotency_key: None,
        };
        self.jobs.submit(spec, Arc::new(Ends)).expect("accepted")
    }

    fn ask(&self, request: &ControlRequest, caller: &Caller) -> Result<Role, Failure> {
        Permit::check(request.clone(), caller.clone(), &self.jobs).map(|permit| permit.role()).map_err(|r| r.failure)
    }
}

fn caller(everywhere: Option<Role>, shop: Option<Role>, billing: Option<Role>) -> Caller {
    let named = [("shop", shop.max(everywhere)), ("billing", billing.max(everywhere))];
    let environments = named.into_iter().filter_map(|(name, role)| Some((name.to_owned(), role?)));
    Caller::new(1000, "ada", everywhere, environments.collect::<BTreeMap<_, _>>())
}

/// The request, about this job where it is about one.
fn about(request: ControlRequest, id: &JobId) -> ControlRequest {
    use ControlRequest as R;
    let job = id.clone();
    match request {
        R::Job { .. } => R::Job { job },
        R::JobFollow { .. } => R::JobFollow { job },
        R::JobCancel { .. } => R::JobCancel { job },
        R::SandboxConnect { superuser, .. } => R::SandboxConnect { job, superuser },
        R::SandboxStop { .. } => R::SandboxStop { job },
        R::SandboxStart { .. } => R::SandboxStart { job },
        R::SandboxDestroy { .. } => R::SandboxDestroy { job },
        R::SandboxExtend { body, .. } => R::SandboxExtend { job, body },
        R::SandboxRelease { body, .. } => R::SandboxRelease { job, body },
        other => other,
    }
}

#[tokio::test]
async fn every_request_by_every_role_here_and_in_another_environment() {
    let world = World::new();
    let sandbox = world.job(JobKind::Sandbox, 1000);
    let roles = [None, Some(Role::Viewer), Some(Role::Operator), Some(Role::Admin)];
    let requests = every();
    let named: Vec<&str> = requests.iter().map(|(name, _)| *name).collect();
    assert_eq!(named, NEEDS.map(|(name, _)| name), "each request is in the table");
    for (name, request) in requests {
        let request = about(request, &sandbox);
        let needed = NEEDS.iter().find(|(known, _)| *known == name).map(|(_, role)| *role).expect("in the table");
        assert_eq!(request.required_role(), needed, "{name}");
        for role in roles {
            // In the environment that it is about, or over the daemon where it is about that.
            let here = if DAEMON_WIDE.contains(&name) { caller(role, None, None) } else { caller(None, role, None) };
            let answer = world.ask(&request, &here);
            match role {
                Some(role) if role >= needed => assert_eq!(answer, Ok(role), "{name} by {role:?}"),
                _ => {
                    assert_eq!(answer.expect_err("refused").code, Code::Denied, "{name} by {role:?}");
                }
            }
            // The same role in another environment gives nothing here: not even that there is one of that name.
            let elsewhere = caller(None, None, role);
            let answer = world.ask(&request, &elsewhere);
            match (role, OF_ALL.contains(&name)) {
                (Some(role), true) => assert_eq!(answer, Ok(role), "{name} by {role:?} elsewhere"),
                (Some(_), false) if DAEMON_WIDE.contains(&name) => {
                    assert_eq!(answer.expect_err("refused").code, Code::Denied, "{name} by {role:?} elsewhere");
                }
                (Some(_), false) => {
                    assert_eq!(answer.expect_err("unseen").code, Code::NotFound, "{name} by {role:?} elsewhere");
                }
                (None, _) => assert_eq!(answer.expect_err("nobody").code, Code::Denied, "{name} by nobody"),
            }
        }
    }
}

#[tokio::test]
async fn what_one_may_not_see_is_answered_like_what_does_not_exist() {
    let world = World::new();
    let there = world.job(JobKind::Backup, 1);
    let stranger = caller(None, None, Some(Role::Admin));
    let environment = |name: &str| ControlRequest::Backups { environment: name.into() };
    let (unseen, missing) = (world.ask(&environment("shop"), &stranger), world.ask(&environment("shap"), &stranger));
    let text = |answer: Result<Role, Failure>| serde_json::to_string(&answer.expect_err("refused")).expect("JSON");
    assert_eq!(text(unseen).replace("shop", "shap"), text(missing));
    let missing: JobId = "20200101t000000z_000000".parse().expect("an id");
    let ask = |job: &JobId| text(world.ask(&ControlRequest::Job { job: job.clone() }, &stranger));
    assert_eq!(ask(&there).replace(there.as_str(), missing.as_str()), ask(&missing));
}

#[tokio::test]
async fn a_sandbox_is_for_whoever_asked_for_it_and_for_admins() {
    let world = World::new();
    let operator = caller(None, Some(Role::Operator), None);
    let connect = |job: &JobId| ControlRequest::SandboxConnect { job: job.clone(), superuser: false };
    let (own, other) = (world.job(JobKind::Sandbox, 1000), world.job(JobKind::Sandbox, 2000));
    assert!(world.ask(&connect(&own), &operator).is_ok());
    assert_eq!(world.ask(&connect(&other), &operator).expect_err("another's").code, Code::Denied);
    assert!(world.ask(&connect(&other), &caller(None, Some(Role::Admin), None)).is_ok());
    let backup = world.job(JobKind::Backup, 1000);
    assert_eq!(world.ask(&connect(&backup), &operator).expect_err("no sandbox").code, Code::NotFound);
}

#[tokio::test]
async fn cancelling_needs_the_role_that_beginning_needs() {
    let world = World::new();
    let kinds = [
        (JobKind::Backup, Role::Operator),
        (JobKind::Restore, Role::Admin),
        (JobKind::Sandbox, Role::Operator),
        (JobKind::Prune, Role::Admin),
        (JobKind::Verify, Role::Operator),
        (JobKind::Incident, Role::Operator),
    ];
    for (kind, needed) in kinds {
        let cancel = ControlRequest::JobCancel { job: world.job(kind, 1) };
        for role in [Role::Viewer, Role::Operator, Role::Admin] {
            let answer = world.ask(&cancel, &caller(None, Some(role), None));
            assert_eq!(answer.is_ok(), role >= needed, "{kind:?} by {role:?}");
        }
    }
}
