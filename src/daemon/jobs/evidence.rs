//! What the open incident of a job's ticket is told when the job has ended.
//!
//! A ticket may be one of another system: without an open incident of that name nothing is put down, and the job's log says so.

use std::time::Duration;

use serde_json::{Value, json};
use tracing::warn;

use super::{JobKind, JobRecord, JobState};
use crate::error::Failure;
use crate::operations::incident::{self, By, Entry, What};
use crate::operations::planned::Planned;
use crate::operations::restore::RestoreReport;
use crate::repository::Repository;

/// What was restored, as its work tells it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Restored {
    pub text: String,
    pub document: Value,
}

/// Where a restore was to go, kept while the plan itself is used up.
pub struct Aim {
    target_shown: String,
    last_transaction: Option<String>,
}

impl From<&Planned> for Aim {
    fn from(planned: &Planned) -> Self {
        let last_transaction = planned.last_included.as_ref().map(|transaction| transaction.shown.clone());
        Aim { target_shown: planned.target_shown.clone(), last_transaction }
    }
}

impl Restored {
    /// `what` was restored: a sandbox, or into a directory.
    pub fn new(what: &str, aim: &Aim, report: &RestoreReport, remarks: &[String]) -> Restored {
        let side = if report.inclusive { "after" } else { "before" };
        let document = json!({
            "target": aim.target_shown,
            "last_transaction": aim.last_transaction,
            "backup": report.backup,
            "timeline": report.timeline.to_string(),
            "stopped": format!("{side} {}", report.target_lsn),
            "checked": checked(report),
            "databases": report.databases,
            "remarks": remarks,
        });
        Restored { text: format!("{what} restored to {}", aim.target_shown), document }
    }
}

fn checked(report: &RestoreReport) -> String {
    let Some(reached) = report.reached_lsn else { return "not checked".to_owned() };
    let sessions = if report.databases.is_empty() { "" } else { "; a session in every database that takes one" };
    format!("replay stopped where it was planned, at {reached}{sessions}")
}

/// Puts down that a job ended, within `limit`; what came of that is a line for the job's log.
pub(super) async fn put_down(
    repository: &Repository,
    record: &JobRecord,
    (state, outcome): (JobState, &Result<Value, Failure>),
    limit: Duration,
) -> Option<String> {
    // That of an incident writes the log itself.
    let ticket = record.spec.ticket.as_ref().filter(|_| record.spec.kind != JobKind::Incident)?;
    let entry = entry(record, state, outcome);
    let noted = tokio::time::timeout(limit, incident::note(repository, ticket, entry)).await;
    Some(match noted {
        Ok(Ok(true)) => format!("noted in incident {ticket}"),
        Ok(Ok(false)) => format!("not noted: {ticket} has no open incident"),
        Ok(Err(failure)) => {
            warn!(error = %failure, ticket, "note a job in its incident: failed");
            format!("not noted in incident {ticket}: failed to {failure}")
        }
        Err(_) => {
            warn!(ticket, "note a job in its incident: the store does not answer");
            format!("not noted in incident {ticket}: the store does not answer")
        }
    })
}

fn entry(record: &JobRecord, state: JobState, outcome: &Result<Value, Failure>) -> Entry {
    let (by, what) =
        (By(&record.spec.asked_by.user), format!("{} of {}", record.spec.kind.as_str(), record.spec.environment));
    let (kind, text, document) = match (outcome, &record.restored) {
        (Ok(_), Some(Restored { text, document })) => (What::Restored, text.clone(), document.clone()),
        (Ok(result), None) => {
            let summary = result.get("summary").and_then(Value::as_str);
            let summary = summary.map_or_else(String::new, |summary| format!(": {summary}"));
            (What::Command, format!("{what} {}{summary}", state.as_str()), json!({}))
        }
        (Err(failure), _) => {
            let text = format!("{what} {}: failed to {failure}", state.as_str());
            (What::Remark, text, json!({ "error": failure }))
        }
    };
    let mut entry = Entry { document, ..incident::entry(by, kind, text) };
    entry.document["job"] = json!(record.id.as_str());
    entry
}
