//! A prune of an environment, for the daemon and for commands alike.

use std::fmt::Write as _;
use std::time::Duration;

use serde::Serialize;
use tokio_util::sync::CancellationToken;

use crate::error::{Code, Failure};
use crate::repository::generation::{self, Lease};
use crate::repository::store::Object;
use crate::repository::{Generation, Repository, RepositoryError};
use crate::retention::prune::{Observer, Prune, PruneError, Report, Settings};
use crate::retention::reason::Verdict;
use crate::util::clock;
use crate::util::units::show_bytes;

/// Removes what has left the window.
///
/// Cancel safety: after `cancel`, or when the future is dropped, another prune goes on where this one was.
///
/// # Errors
/// `Conflict` when another writer has taken over, `Host` when a clock is wrong, and as the store says.
pub async fn run(
    repository: &Repository,
    generation: Generation,
    window: Duration,
    observer: &mut dyn Observer,
    cancel: CancellationToken,
) -> Result<Report, Failure> {
    let prune = Prune { repository, generation, settings: Settings::new(window), clock: &clock::now };
    tokio::select! {
        biased;
        () = cancel.cancelled() => Err(cancelled()),
        report = prune.run(observer) => report.map_err(Failure::from),
    }
}

/// What is said of a prune that nobody wants any more.
pub fn cancelled() -> Failure {
    Failure::new(Code::Cancelled, "prune: it was cancelled").hint("The next prune goes on where this one ended.")
}

/// Says of every object what the next prune does with it, and why.
///
/// # Errors
/// As [`run`].
pub async fn explain(
    repository: &Repository,
    window: Duration,
    observer: &mut dyn Observer,
) -> Result<Report, Failure> {
    // As whoever would come next: what every writer before it left unfinished is abandoned, what the newest is doing is not.
    let newest = generation::newest(repository).await?;
    let generation = newest.unwrap_or(Generation { ordinal: 1, random: 0 });
    let prune = Prune { repository, generation, settings: Settings::new(window), clock: &clock::now };
    Ok(prune.explain(observer).await?)
}

/// What becomes of an object, and why.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Judged {
    pub object: String,
    pub bytes: u64,
    pub keep: bool,
    pub reason: String,
}

impl Judged {
    pub fn new(object: &Object, verdict: &Verdict) -> Judged {
        Judged {
            object: object.key.as_str().to_owned(),
            bytes: object.bytes,
            keep: verdict.is_keep(),
            reason: verdict.reason().to_string(),
        }
    }

    pub fn show(&self) -> String {
        format!("{} {}: {}", if self.keep { "keep  " } else { "remove" }, self.object, self.reason)
    }
}

/// What the next prune does, for whoever cannot be told object by object: the first [`LISTED_MAX`], what goes before what stays.
#[derive(Debug, Default, Serialize)]
pub struct Explained {
    objects: Vec<Judged>,
    objects_unlisted: u64,
    #[serde(flatten)]
    report: Report,
}

/// Objects that are listed; each is some hundred bytes.
pub const LISTED_MAX: usize = 5000;

impl Explained {
    /// # Errors
    /// As [`explain`].
    pub async fn load(repository: &Repository, window: Duration) -> Result<Explained, Failure> {
        let mut listed = Listed::default();
        let report = explain(repository, window, &mut listed).await?;
        let Listed { removed, mut kept, count } = listed;
        kept.truncate(LISTED_MAX - removed.len());
        let objects = [removed, kept].concat();
        let objects_unlisted = count.saturating_sub(objects.len() as u64);
        Ok(Explained { objects, objects_unlisted, report })
    }

    pub fn show(&self) -> String {
        let mut text: String = self.objects.iter().map(|judged| judged.show() + "\n").collect();
        if self.objects_unlisted > 0 {
            let _ = writeln!(text, "and {} objects more; the sums have all of them", self.objects_unlisted);
        }
        text + &show(&self.report, &PLANNED)
    }
}

/// The first of each kind.
#[derive(Default)]
struct Listed {
    removed: Vec<Judged>,
    kept: Vec<Judged>,
    count: u64,
}

impl Observer for Listed {
    fn object(&mut self, object: &Object, verdict: &Verdict) {
        self.count += 1;
        let list = if verdict.is_keep() { &mut self.kept } else { &mut self.removed };
        if list.len() < LISTED_MAX {
            list.push(Judged::new(object, verdict));
        }
    }
}

/// How it is said what became of objects, and of backups.
pub struct Words {
    removed: &'static str,
    dropped: &'static str,
}

pub const DONE: Words = Words { removed: "removed", dropped: "dropped" };
pub const PLANNED: Words = Words { removed: "would be removed", dropped: "would be dropped" };

/// For people.
pub fn show(report: &Report, words: &Words) -> String {
    let Words { removed, dropped } = words;
    let mut text = String::new();
    if let (Some(start), Some(end)) = (&report.window_start, &report.window_end) {
        let _ = writeln!(text, "window: {start} to {end}");
    }
    for outcome in &report.dropped {
        let _ = writeln!(text, "backup {} {dropped}: {}", outcome.backup, outcome.reason);
    }
    for outcome in &report.taken_back {
        let _ = writeln!(text, "backup {} stays: {}", outcome.backup, outcome.reason);
    }
    for (sums, what) in [(&report.removed, *removed), (&report.kept, "kept")] {
        for (kind, sum) in sums {
            let _ = writeln!(text, "{what}: {} {kind}, {}", sum.objects, show_bytes(sum.bytes));
        }
    }
    let total = report.removed_total();
    let _ = writeln!(text, "{removed} in all: {} objects, {}", total.objects, show_bytes(total.bytes));
    for refusal in &report.refusals {
        let _ = writeln!(text, "refused: {refusal}");
    }
    for remark in &report.remarks {
        let _ = writeln!(text, "note: {remark}");
    }
    text
}

/// Whether the store let everything go.
///
/// # Errors
/// With the number of refusals.
pub fn judge(environment: &str, report: &Report) -> Result<(), Failure> {
    if report.refused == 0 {
        return Ok(());
    }
    let message = format!("prune {environment}: the store refused {} deletes", report.refused);
    Err(Failure::new(Code::Store, message)
        .hint("Grant the right to delete, or wait for the objects' lock to end; the next prune tries again."))
}

/// Takes a generation for a prune of one's own, which ends what an earlier writer is doing: only where no daemon runs.
///
/// # Errors
/// As the store says.
pub async fn take_generation(repository: &Repository) -> Result<Generation, RepositoryError> {
    let lease = Lease {
        host: rustix::system::uname().nodename().to_string_lossy().into_owned(),
        pid: std::process::id(),
        started_at: clock::now().into(),
        version: env!("CARGO_PKG_VERSION").to_owned(),
        store: None,
    };
    generation::take(repository, &lease).await
}

impl From<PruneError> for Failure {
    fn from(error: PruneError) -> Self {
        let text = format!("prune: {error}");
        match error {
            PruneError::Repository(error) => {
                let failure = Failure::from(error);
                Failure { message: format!("prune: {}", failure.message), ..failure }
            }
            PruneError::Superseded { .. } => Failure::new(Code::Conflict, text).hint(
                "Another daemon works with this repository. Stop one of the two; `pgrecall status` names the other.",
            ),
            PruneError::ClocksDiffer { .. } => Failure::new(Code::Host, text).hint(
                "Set this host's clock (NTP), or the store's: with a wrong clock nobody knows what is old enough.",
            ),
            PruneError::Moved => Failure::new(Code::Conflict, text).retryable().hint("Prune again."),
        }
    }
}
