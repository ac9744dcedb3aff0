//! The target of a restore on the command line, and the plan for it: shared by `plan` and `restore`.

use clap::Args;
use serde::Serialize;

use super::{EnvironmentArgument, times};
use crate::config::Environment;
use crate::error::{Code, Failure};
use crate::instance::host::{Needs, SortedText, check};
use crate::lineage::Target;
use crate::lineage::moment::target::ParseTargetError;
use crate::lineage::moment::{Moment, Request};
use crate::operations::locate;
use crate::operations::restore::is_root;
use crate::pg::{CollationProvider, TimelineId, Timestamp};
use crate::repository::Repository;
use crate::repository::backup_object::Surroundings;
use crate::restore::Plan;
use crate::util::clock;
use crate::wal::transactions::TransactionEnd;

#[derive(Debug, Args)]
pub struct TargetArguments {
    #[command(flatten)]
    pub environment: EnvironmentArgument,
    /// What to restore to: latest, a time with its zone ('2026-11-23 14:05:00+01:00', '2026-11-23T13:05Z',
    /// '2026-11-23 14:05 Europe/Berlin'), lsn:X/Y, xid:N, name:RESTORE_POINT, backup:ID
    #[arg(long, value_name = "TARGET", default_value = "latest")]
    to: String,
    /// Stop just before the target instead of just after it
    #[arg(long)]
    exclusive: bool,
    /// The timeline to end on, instead of the one that is archived now
    #[arg(long, value_name = "N")]
    timeline: Option<u32>,

    /// The past to look in, where `incarnation open` began another: 1 is the first [default: the one that holds the time
    /// or the backup, else the newest]
    #[arg(long, value_name = "ORDINAL")]
    incarnation: Option<u32>,
}

/// A plan with what led to it, and what a person wants to know of it.
#[derive(Debug, Serialize)]
pub struct Planned {
    pub target: String,
    /// The target in words: a time is echoed in UTC, in the environment's zone and relative to now.
    pub target_shown: String,
    pub last_included: Option<Transaction>,
    pub first_excluded: Option<Transaction>,
    pub plan: Plan,
}

#[derive(Debug, Clone, Serialize)]
pub struct Transaction {
    pub xid: u64,
    pub time: Timestamp,
    pub shown: String,
}

impl TargetArguments {
    /// Finds the exact stop and plans the way there; reads only.
    pub async fn plan(&self, environment: &Environment, repository: &Repository) -> Result<Planned, Failure> {
        let target: Target = self
            .to
            .parse()
            .map_err(|error: ParseTargetError| Failure::new(Code::Usage, format!("understand the target: {error}")))?;
        let timeline = self.timeline.map(TimelineId);
        let request = Request { target: target.clone(), exclusive: self.exclusive, timeline };
        let name = environment.name.as_str();
        let (moment, mut plan, archive) = locate::plan_any(repository, name, &request, self.incarnation).await?;
        if let Some(commit) = archive.backup(plan.backup.id.as_str()) {
            plan.lacks = lacks(environment, &plan, &commit.surroundings);
        }
        Ok(Planned::new(environment, &target, &moment, plan))
    }
}

impl Planned {
    fn new(environment: &Environment, target: &Target, moment: &Moment, plan: Plan) -> Self {
        let (zone, now) = (environment.time_zone, clock::now());
        let transaction = |end: &TransactionEnd| Transaction {
            xid: u64::from(end.xid.0),
            time: end.time,
            shown: times::show(end.time, zone, now),
        };
        let target_shown = match target {
            Target::Time(time) => times::show(*time, zone, now),
            other => other.to_string(),
        };
        Planned {
            target: target.to_string(),
            target_shown,
            last_included: moment.last_included.as_ref().map(transaction),
            first_excluded: moment.first_excluded.as_ref().map(transaction),
            plan,
        }
    }

    /// For people.
    pub fn show(&self) -> String {
        let named = |transaction: &Option<Transaction>| match transaction {
            Some(transaction) => format!("{} (transaction {})", transaction.shown, transaction.xid),
            None => "none is stored".to_owned(),
        };
        format!(
            "target: {}\nlast transaction in: {}\nfirst transaction out: {}\n{}",
            self.target_shown,
            named(&self.last_included),
            named(&self.first_excluded),
            self.plan
        )
    }
}

/// What this host lacks to run the restored cluster.
fn lacks(environment: &Environment, plan: &Plan, surroundings: &Surroundings) -> Vec<String> {
    let mut extensions: Vec<String> = surroundings.extensions.iter().map(|extension| extension.name.clone()).collect();
    extensions.sort_unstable();
    extensions.dedup();
    let needs = Needs {
        preload_libraries: surroundings.preload_libraries.clone(),
        replay_libraries: plan.preload_libraries.clone(),
        extensions,
        sorted: sorted_text(surroundings),
    };
    let dirs = &environment.restore.postgres_bin_dirs;
    let (_, lacks) = check(plan.backup.major, dirs, &needs);
    let root = is_root().then(|| "another user than root: PostgreSQL does not run as root".to_owned());
    let unknown = plan.lacks.iter().cloned();
    lacks.iter().map(ToString::to_string).chain(unknown).chain(root).collect()
}

/// What the backup knows of the order of its text; of one that knows no database, the C library's version at least.
fn sorted_text(surroundings: &Surroundings) -> Vec<SortedText> {
    let mut sorted: Vec<SortedText> = Vec::new();
    for found in &surroundings.collations {
        match sorted.iter_mut().find(|s| (s.provider, &s.version) == (found.provider, &found.version)) {
            Some(same) => same.databases.push(found.database.clone()),
            None => sorted.push(SortedText {
                provider: found.provider,
                version: found.version.clone(),
                databases: vec![found.database.clone()],
            }),
        }
    }
    let unknown = surroundings.libc_version.clone().filter(|_| surroundings.databases.is_empty());
    sorted.extend(unknown.map(|version| SortedText {
        provider: CollationProvider::Libc,
        version,
        databases: Vec::new(),
    }));
    sorted
}
