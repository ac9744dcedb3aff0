//! All that the control socket may ask of the daemon, in one value.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::access::AccessRules;
use super::audit::AuditLog;
use super::handle::Handle;
use super::jobs::Jobs;
use super::repositories::Repositories;
use super::sandboxes::Sandboxes;
use crate::error::Code;
use crate::error::Failure;
use crate::lineage::Target;
use crate::lineage::moment::Request;
use crate::lineage::moment::target::{ParseTargetError, parse_time};
use crate::operations::pin::{self, PinRequest};
use crate::operations::planned::Here;
pub use crate::operations::planned::TargetAsked;
use crate::operations::prune::Explained;
pub use crate::operations::restore::wal_get_words;
use crate::operations::state;
use crate::pg::TimelineId;
use crate::repository::audit;

/// A cheap copy of the ways into the daemon.
#[derive(Clone)]
pub struct Service {
    pub handle: Handle,
    pub jobs: Jobs,
    pub access: AccessRules,
    pub audit: AuditLog,
    pub repositories: Repositories,
    pub sandboxes: Sandboxes,
    /// The configuration that the daemon reads; restored servers that fetch WAL read it, too.
    pub config_path: PathBuf,
}

/// A pin as it is asked for over the socket.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PinAsked {
    pub name: String,
    pub at: String,
    #[serde(default)]
    pub timeline: Option<u32>,
    /// A time with its zone.
    pub until: String,
}

/// An answer as a document and in words.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Shown {
    pub document: Value,
    pub text: String,
}

impl Shown {
    pub fn new(document: &impl Serialize, text: String) -> Shown {
        Shown { document: serde_json::to_value(document).expect("our own types are representable in JSON"), text }
    }

    /// The document with the words in it, as a job's result.
    pub fn into_result(self) -> Value {
        let mut document = self.document;
        if let Value::Object(fields) = &mut document {
            fields.insert("text".to_owned(), Value::String(self.text));
        }
        document
    }
}

impl Service {
    /// What the store says of an environment.
    ///
    /// # Errors
    /// When nothing is stored yet, and as the store says.
    pub async fn backups(&self, name: &str) -> Result<Shown, Failure> {
        let (environment, repository) = self.open(name).await?;
        let Some(state) = state::load(&repository).await? else {
            return Err(Failure::new(Code::NotFound, format!("list backups of {name}: nothing is stored yet")));
        };
        let text = state.show_backups(environment.time_zone);
        Ok(Shown::new(&state, text))
    }

    /// What a restore would do.
    ///
    /// # Errors
    /// As planning says; a target that cannot be reached names the nearest that can.
    pub async fn plan(&self, name: &str, target: &TargetAsked) -> Result<Shown, Failure> {
        let (environment, repository) = self.open(name).await?;
        let dirs = &environment.restore.postgres_bin_dirs;
        let here = Here { environment: name, zone: environment.time_zone, postgres_bin_dirs: dirs };
        let planned = target.plan(here, &repository).await?;
        let text = planned.show();
        Ok(Shown::new(&planned, text))
    }

    /// The record of acts, checked; the newest `shown` of them.
    ///
    /// # Errors
    /// As the store says.
    pub async fn recorded(&self, name: &str, shown: usize) -> Result<audit::Record, Failure> {
        let (_, repository) = self.open(name).await?;
        Ok(audit::check(&repository, shown).await?)
    }

    /// Has the daemon read its configuration again.
    ///
    /// # Errors
    /// When something is wrong in it; nothing has changed then.
    pub async fn reload(&self) -> Result<Shown, Failure> {
        let report = self.handle.reload().await?;
        let named = [("added", report.added.as_slice()), ("changed", report.changed.as_slice())];
        let mut lines: Vec<String> = named
            .into_iter()
            .filter(|(_, names)| !names.is_empty())
            .map(|(what, names)| format!("{what}: {}", names.join(", ")))
            .collect();
        lines.push(format!("unchanged: {}", report.unchanged));
        for removed in &report.removed {
            lines.push(format!("removed: {}", removed.name));
            lines.extend(removed.stays.iter().map(|what| format!("  what stays: {what}")));
        }
        if !report.needs_restart.is_empty() {
            lines.push(format!("only after a restart: {}", report.needs_restart.join(", ")));
        }
        Ok(Shown::new(&report, lines.join("\n")))
    }

    /// What is kept beyond the window.
    ///
    /// # Errors
    /// As the store says.
    pub async fn pins(&self, name: &str) -> Result<Shown, Failure> {
        let (environment, repository) = self.open(name).await?;
        let pins = pin::list(&repository).await?;
        Ok(Shown::new(&serde_json::json!({ "pins": pins }), pin::show_all(&pins, environment.time_zone)))
    }

    /// Keeps a moment beyond the window.
    ///
    /// # Errors
    /// When the words are wrong, the moment cannot be reached, or the store says so.
    pub async fn add_pin(&self, name: &str, words: &Value, owner: &str) -> Result<Shown, Failure> {
        let asked: PinAsked = serde_json::from_value(words.clone())
            .map_err(|error| Failure::new(Code::Usage, format!("understand the pin: {error}")))?;
        let wrong = |error| Failure::new(Code::Usage, format!("understand the moment: {error}"));
        let target: Target = asked.at.parse().map_err(|error: ParseTargetError| wrong(error))?;
        let until = parse_time(&asked.until)
            .map_err(|error| Failure::new(Code::Usage, format!("understand until: {error}")))?;
        let timeline = asked.timeline.map(TimelineId);
        let moment = Request { target, exclusive: false, timeline };
        let request = PinRequest { name: asked.name, moment, until, owner: owner.to_owned() };
        let (environment, repository) = self.open(name).await?;
        let report = pin::add(&repository, name, &request).await?;
        Ok(Shown::new(&serde_json::json!({ "pin": report }), report.show(environment.time_zone)))
    }

    /// Lets what was pinned go with the window again.
    ///
    /// # Errors
    /// When there is none of that name, and as the store says.
    pub async fn remove_pin(&self, name: &str, pin: &str) -> Result<Shown, Failure> {
        let (_, repository) = self.open(name).await?;
        let report = pin::remove(&repository, pin).await?;
        Ok(Shown::new(&serde_json::json!({ "pin": report }), report.show_removed()))
    }

    /// What the next prune does, and why.
    ///
    /// # Errors
    /// As the store says, and when a clock is wrong.
    pub async fn prune_plan(&self, name: &str) -> Result<Shown, Failure> {
        let (environment, repository) = self.open(name).await?;
        let explained = Explained::load(&repository, environment.window).await?;
        let text = explained.show();
        Ok(Shown::new(&explained, text))
    }

    async fn open(&self, name: &str) -> Result<(crate::config::Environment, crate::repository::Repository), Failure> {
        Ok((self.repositories.environment(name)?, self.repositories.get(name).await?))
    }
}
