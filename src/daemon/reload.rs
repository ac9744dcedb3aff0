//! What a changed configuration changes in a running service.
//!
//! An environment that reads the same as before, with the same secrets, goes on untouched. One that changed stores its tail, ends
//! and begins anew; one that is gone ends the same way, and what it leaves behind is named. A configuration with a mistake changes
//! nothing.

use std::collections::BTreeMap;
use std::net::SocketAddr;
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio_util::sync::CancellationToken;
use tracing::{info, warn};

use super::access::AccessRules;
use super::environment::EnvironmentBody;
use super::jobs::{self, Jobs};
use super::repositories::Repositories;
use super::sandboxes::Sandboxes;
use super::supervisor::Pauses;
use super::{Daemon, Planned, slots};
use crate::archive::Budget;
use crate::config::{Access, Config, Environment, Limits};
use crate::error::Failure;
use crate::telemetry;
use crate::util::digest::Digest;
use crate::util::throttle::Throttle;

/// What a reload came to.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct ReloadReport {
    pub added: Vec<String>,
    pub changed: Vec<String>,
    pub removed: Vec<Removed>,
    pub unchanged: usize,
    /// Keys whose change takes effect only when the service is started again.
    pub needs_restart: Vec<String>,
}

/// An environment that is not looked after any more.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Removed {
    pub name: String,
    /// What stays, and how to remove it; a sentence each.
    pub stays: Vec<String>,
}

/// What the running service is made of.
pub struct Service {
    /// As it was read last.
    pub config: Config,
    /// As it was when the service was started: what of it stays until the next start.
    started: Started,
    pub daemon: Daemon,
    pub jobs: Jobs,
    pub repositories: Repositories,
    pub access: AccessRules,
    pub backup_throttle: Option<Arc<Throttle>>,
    pub wal_budget: Arc<Budget>,
    pub sandboxes: Sandboxes,
}

impl Service {
    /// Starts everything; it ends after `cancel` fires.
    pub fn start(config: Config, cancel: &CancellationToken) -> Service {
        let repositories = Repositories::new(&config);
        let name = jobs::daemon_name(&config.control_socket);
        let jobs = Jobs::start(repositories.clone(), name, config.limits, cancel.child_token());
        let backup_throttle = config.limits.backup_throttle();
        let wal_budget = config.limits.wal_budget();
        let planned = plan(&config, &jobs, backup_throttle.as_ref(), &wal_budget, &repositories);
        let daemon = Daemon::start(planned, Pauses::default(), cancel.clone());
        let sandboxes = Sandboxes::new(&config.sandbox);
        let access = AccessRules::new(&config, rustix::process::geteuid().as_raw());
        let started = Started::from(&config);
        Service { config, started, daemon, jobs, repositories, access, backup_throttle, wal_budget, sandboxes }
    }

    /// Reads the configuration again and applies it.
    ///
    /// # Errors
    /// When it cannot be used, or a secret that it names cannot be read; nothing has changed then.
    pub fn reload(&mut self) -> Result<ReloadReport, Failure> {
        let config = Config::load(&self.config.path)?;
        for environment in config.environments.values() {
            environment.secrets_digest()?;
        }
        self.access.replace(&config);
        self.repositories.replace(&config);
        self.sandboxes.replace(&config.sandbox);
        let throttle = self.backup_throttle.as_ref();
        let planned = plan(&config, &self.jobs, throttle, &self.wal_budget, &self.repositories);
        let changes = self.daemon.apply(planned);
        for name in config.environments.keys().filter(|name| !self.config.environments.contains_key(*name)) {
            self.jobs.look_for_earlier(name.to_string());
        }
        let removed = self.config.environments.values().filter_map(|before| removed(before, &config)).collect();
        let report = ReloadReport {
            added: changes.added,
            changed: changes.changed,
            removed,
            unchanged: changes.unchanged,
            needs_restart: self.started.needs_restart(&config),
        };
        self.config = config;
        tell(&report);
        Ok(report)
    }
}

/// Every environment that is archived from here, as a task to run.
fn plan(
    config: &Config,
    jobs: &Jobs,
    backup_throttle: Option<&Arc<Throttle>>,
    wal_budget: &Arc<Budget>,
    repositories: &Repositories,
) -> BTreeMap<String, Planned> {
    let archived = config.environments.values().filter(|environment| environment.postgres.is_some());
    let planned = archived.map(|environment| {
        let body = EnvironmentBody {
            environment: environment.clone(),
            shutdown_grace: config.shutdown_grace,
            owned_slots: slots::owned(config),
            jobs: Some(jobs.clone()),
            backup_throttle: backup_throttle.cloned(),
            wal_budget: Arc::clone(wal_budget),
            store_errors: repositories.store_errors(environment.name.as_str()),
        };
        (environment.name.to_string(), Planned { body: Arc::new(body), fingerprint: fingerprint(environment) })
    });
    planned.collect()
}

/// Changes with anything that the environment's task is made of.
fn fingerprint(environment: &Environment) -> Digest {
    // At the start, an environment whose secret cannot be read says so in its state, and keeps no other from working.
    let secrets = environment.secrets_digest().map_or_else(|failure| failure.to_string(), |digest| digest.to_string());
    // Who may ask is no matter of the task's.
    let environment = Environment { access: Access::default(), ..environment.clone() };
    Digest::sha256(format!("{environment:?} {secrets}").as_bytes())
}

/// What the service is made of once, when it is started.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Started {
    control_socket: PathBuf,
    metrics_listen: Option<SocketAddr>,
    shutdown_grace: Duration,
    limits: Limits,
    log: telemetry::Settings,
}

impl From<&Config> for Started {
    fn from(config: &Config) -> Self {
        // Every key stands here, so that a new one cannot be forgotten: it is applied by a reload, or it is named by one.
        let Config {
            control_socket,
            metrics_listen,
            shutdown_grace,
            limits,
            log,
            // Where it was read from, and is read again.
            path: _,
            // Applied by `Service::reload`.
            sandbox: _,
            access: _,
            environments: _,
        } = config.clone();
        Started { control_socket, metrics_listen, shutdown_grace, limits, log }
    }
}

impl Started {
    /// The keys that say something else now than the service runs with.
    fn needs_restart(&self, now: &Config) -> Vec<String> {
        let Started { control_socket, metrics_listen, shutdown_grace, limits, log } = Started::from(now);
        let keys = [
            ("control_socket", self.control_socket != control_socket),
            ("metrics_listen", self.metrics_listen != metrics_listen),
            ("shutdown_grace", self.shutdown_grace != shutdown_grace),
            ("limits", self.limits != limits),
            ("log", self.log != log),
        ];
        keys.iter().filter(|(_, changed)| *changed).map(|(key, _)| (*key).to_owned()).collect()
    }
}

/// What stays behind of an environment that is not archived from here any more.
fn removed(before: &Environment, now: &Config) -> Option<Removed> {
    let postgres = before.postgres.as_ref()?;
    let kept = now.environments.get(&before.name);
    if kept.is_some_and(|environment| environment.postgres.is_some()) {
        return None;
    }
    let hosts: Vec<String> = postgres.connect.hosts.iter().map(ToString::to_string).collect();
    let (slot, hosts) = (&postgres.slot, hosts.join(", "));
    let mut stays = vec![format!(
        "the replication slot {slot} on {hosts}: it keeps WAL until the disk is full; drop it there with \
         SELECT pg_drop_replication_slot('{slot}')"
    )];
    if kept.is_none() {
        let place = format!("{}/{}", before.location, before.name);
        stays.push(format!(
            "the repository {place}: nothing is added or removed any more, and a configuration that names it can restore from \
             it; once nobody needs it, delete what lies there"
        ));
    }
    Some(Removed { name: before.name.to_string(), stays })
}

fn tell(report: &ReloadReport) {
    let ReloadReport { added, changed, removed, unchanged, needs_restart } = report;
    info!(?added, ?changed, removed = removed.len(), unchanged, "the configuration was read again");
    for Removed { name, stays } in removed {
        for what in stays {
            warn!(environment = name, "not looked after any more; what stays: {what}");
        }
    }
    if !needs_restart.is_empty() {
        warn!(keys = ?needs_restart, "some changes take effect only when the service is started again");
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::util::durable_fs;

    fn read(lines: &str) -> Config {
        let text = format!("{lines}\n[environment.shop]\nrepository = \"file:///r\"\n");
        Config::parse(&text, Path::new("config.toml")).expect("a configuration")
    }

    #[test]
    fn what_the_service_does_not_run_with_needs_a_restart_until_it_is_taken_back() {
        let started = Started::from(&read(""));
        let check =
            |lines: &str, expected: &[&str]| assert_eq!(started.needs_restart(&read(lines)), expected, "{lines}");
        check("", &[]);
        check("control_socket = \"/x/s\"", &["control_socket"]);
        check("metrics_listen = \"127.0.0.1:1\"\nshutdown_grace = \"7s\"", &["metrics_listen", "shutdown_grace"]);
        check("[limits]\nrestores = 5", &["limits"]);
        check("[log]\nlevel = \"debug\"", &["log"]);
        check("[sandbox]\ndirectory = \"/x\"\n[access]\nviewer = [\"user:ann\"]", &[]);
    }

    /// However often it was read since: what counts is what runs.
    #[tokio::test]
    async fn a_second_reload_still_says_what_the_first_one_could_not_change() {
        let dir = tempfile::tempdir().expect("temporary directory");
        let path = dir.path().join("config.toml");
        let write = |backups: u32| {
            let place = dir.path().display();
            let text =
                format!("[limits]\nbackups = {backups}\n[environment.shop]\nrepository = \"file://{place}/r\"\n");
            durable_fs::write(&path, text.as_bytes(), 0o600).expect("written");
        };
        write(2);
        let mut service = Service::start(Config::load(&path).expect("valid"), &CancellationToken::new());
        let mut needs_restart = |backups| {
            write(backups);
            service.reload().expect("applied").needs_restart
        };
        assert_eq!((needs_restart(3), needs_restart(3)), (vec!["limits".to_owned()], vec!["limits".to_owned()]));
        assert!(needs_restart(2).is_empty(), "as it runs");
    }
}
