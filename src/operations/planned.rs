//! A plan as it is asked for and shown: the target in words, the transactions at its sides, what this host lacks.

use std::path::PathBuf;

use chrono_tz::Tz;
use serde::{Deserialize, Serialize};

use super::restore::is_root;
use super::{locate, times};
use crate::error::{Code, Failure};
use crate::instance::host::{Needs, SortedText, check};
use crate::lineage::Target;
use crate::lineage::moment::target::ParseTargetError;
use crate::lineage::moment::{Moment, Request};
use crate::pg::{CollationProvider, TimelineId, Timestamp};
use crate::repository::Repository;
use crate::repository::backup_object::Surroundings;
use crate::restore::Plan;
use crate::util::clock;
use crate::wal::transactions::TransactionEnd;

/// What to restore to.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TargetAsked {
    #[serde(default = "latest")]
    pub to: String,
    /// Just before the target instead of just after it.
    #[serde(default)]
    pub exclusive: bool,
    /// The timeline to end on.
    #[serde(default)]
    pub timeline: Option<u32>,
    /// The ordinal of the past to look in.
    #[serde(default)]
    pub incarnation: Option<u32>,
}

/// What is known here of the environment.
#[derive(Debug, Clone, Copy)]
pub struct Here<'a> {
    pub environment: &'a str,
    pub zone: Tz,
    pub postgres_bin_dirs: &'a [PathBuf],
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

fn latest() -> String {
    "latest".to_owned()
}

impl TargetAsked {
    /// # Errors
    /// With the forms that there are.
    pub fn target(&self) -> Result<Target, Failure> {
        let wrong = |error: ParseTargetError| Failure::new(Code::Usage, format!("understand the target: {error}"));
        self.to.parse().map_err(wrong)
    }

    /// Finds the exact stop and plans the way there; reads only.
    pub async fn plan(&self, here: Here<'_>, repository: &Repository) -> Result<Planned, Failure> {
        let target = self.target()?;
        let timeline = self.timeline.map(TimelineId);
        let request = Request { target: target.clone(), exclusive: self.exclusive, timeline };
        let planned = locate::plan_any(repository, here.environment, &request, self.incarnation).await?;
        let (moment, mut plan, archive) = planned;
        if let Some(commit) = archive.backup(plan.backup.id.as_str()) {
            plan.lacks = lacks(here, &plan, &commit.surroundings);
        }
        Ok(Planned::new(here.zone, &target, &moment, plan))
    }
}

impl Planned {
    fn new(zone: Tz, target: &Target, moment: &Moment, plan: Plan) -> Self {
        let now = clock::now();
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
fn lacks(here: Here<'_>, plan: &Plan, surroundings: &Surroundings) -> Vec<String> {
    let mut extensions: Vec<String> = surroundings.extensions.iter().map(|extension| extension.name.clone()).collect();
    extensions.sort_unstable();
    extensions.dedup();
    let needs = Needs {
        preload_libraries: surroundings.preload_libraries.clone(),
        replay_libraries: plan.preload_libraries.clone(),
        extensions,
        sorted: sorted_text(surroundings),
    };
    let (_, lacks) = check(plan.backup.major, here.postgres_bin_dirs, &needs);
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
