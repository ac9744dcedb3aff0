//! The metrics, in Prometheus' text form. Each stands here once, and in `docs/monitoring.md`.
//!
//! The first question is to which instant one can restore now; times are seconds since the epoch, so that an age is
//! `time() - …` by the collector's clock.

use std::fmt::Write as _;

use crate::daemon::guardian::Level;
use crate::daemon::jobs::counts::Counts;
use crate::daemon::snapshot::{BackupProgress, EnvironmentSnapshot, Snapshot, State, StoreState, Timestamp, Wal};

/// A value for each environment; `None` where it is not known.
type Read = fn(&EnvironmentSnapshot) -> Option<f64>;

struct Metric {
    name: &'static str,
    help: &'static str,
    kind: Kind,
    read: Read,
}

#[derive(Clone, Copy)]
enum Kind {
    Gauge,
    Counter,
}

/// Those with one value for each environment.
const METRICS: &[Metric] = &[
    gauge("pgrecall_exposure_seconds", "Age of the oldest byte of WAL that has arrived and is not stored.", |e| {
        e.archive.as_ref().map(|archive| archive.exposure.oldest_ms as f64 / 1000.0)
    }),
    gauge("pgrecall_exposure_bytes", "WAL of the server that is not stored.", |e| {
        e.archive.as_ref().map(|archive| archive.bytes_behind() as f64)
    }),
    gauge("pgrecall_rpo_seconds", "How long WAL may lie outside the store, as configured.", |e| {
        Some(e.rpo.as_secs_f64())
    }),
    gauge("pgrecall_window_start_timestamp_seconds", "The oldest moment that can be restored.", |e| {
        stored(e).and_then(|store| seconds(store.window.first()?.from?))
    }),
    gauge("pgrecall_window_end_timestamp_seconds", "The newest moment that can be restored.", |e| {
        seconds(e.current_store()?.window.last()?.to?)
    }),
    gauge(
        "pgrecall_window_intervals",
        "Unbroken intervals that can be restored; more than one means gaps between them.",
        |e| stored(e).map(|store| store.window.len() as f64),
    ),
    gauge("pgrecall_gaps", "Gaps in the stored WAL, as recorded in the store.", |e| {
        stored(e).map(|store| store.gaps.len() as f64)
    }),
    gauge("pgrecall_diverged_tails", "Timelines with WAL past where the followed one left them.", |e| {
        stored(e).map(|store| store.diverged_tails.len() as f64)
    }),
    gauge("pgrecall_backups", "Backups in the store.", |e| stored(e).map(|store| store.backup_count as f64)),
    gauge("pgrecall_damaged_backups", "Backups whose commit object cannot be read.", |e| {
        stored(e).map(|store| store.damaged_backups.len() as f64)
    }),
    gauge("pgrecall_newest_backup_timestamp_seconds", "When the newest backup ended.", |e| {
        seconds(e.backups.newest.as_ref()?.ended_at)
    }),
    gauge("pgrecall_newest_backup_stored_bytes", "What the newest backup added to the store.", |e| {
        Some(e.backups.newest.as_ref()?.stored_bytes as f64)
    }),
    gauge("pgrecall_next_backup_timestamp_seconds", "When the next backup is due.", |e| seconds(e.backups.next_at?)),
    gauge("pgrecall_backup_overdue", "1 when a backup has been due for too long.", |e| flag(e.backups.is_overdue)),
    gauge("pgrecall_backup_running", "1 while a backup is taken.", |e| {
        flag(matches!(e.backup, Some(BackupProgress::Running { .. })))
    }),
    gauge("pgrecall_backup_failed", "1 when the last backup failed.", |e| flag(e.backups.failure.is_some())),
    gauge("pgrecall_slot_retained_bytes", "WAL that the server keeps for our slot.", |e| {
        e.slots.iter().map(|slot| slot.retained_bytes).max().map(|bytes| bytes as f64)
    }),
    gauge("pgrecall_slot_room_bytes", "What the server can keep beyond that: by its limit or its disk.", |e| {
        e.slots.iter().filter_map(|slot| slot.room).map(|(bytes, _)| bytes).min().map(|bytes| bytes as f64)
    }),
    gauge(
        "pgrecall_slot_left_seconds",
        "How long that lasts at the present rate of WAL, if nothing were stored.",
        |e| e.slots.iter().filter_map(|slot| slot.time_left).min().map(|left| left.as_secs_f64()),
    ),
    gauge("pgrecall_slot_danger", "0 fine, 1 a warning, 2 an alarm about our slot.", |e| {
        e.slots.iter().map(|slot| slot.level).max().map(|level| match level {
            Level::Fine => 0.0,
            Level::Warning => 1.0,
            Level::Alarm => 2.0,
        })
    }),
    gauge("pgrecall_timeline", "The timeline that is followed.", |e| Some(f64::from(e.archive.as_ref()?.timeline.0))),
    gauge("pgrecall_store_failing", "1 while the store takes no WAL, or could not be read the last time.", |e| {
        flag(matches!(e.wal, Wal::StoreFailing(_)) || e.store_failure.is_some())
    }),
    Metric {
        name: "pgrecall_restarts_total",
        help: "How often the environment's task ended with an error and was started again.",
        kind: Kind::Counter,
        read: |e| Some(e.restarts as f64),
    },
];

const STATES: [State; 6] =
    [State::Starting, State::Protected, State::Lagging, State::Unprotected, State::Conflict, State::Stopped];

const STATE: (&str, &str) = ("pgrecall_state", "1 for the state that the environment is in.");
const UP_SINCE: (&str, &str) = ("pgrecall_start_timestamp_seconds", "When the daemon was started.");

const JOBS: (&str, &str) = ("pgrecall_jobs_total", "Jobs that have ended since the daemon was started.");
const STORE_ERRORS: (&str, &str) =
    ("pgrecall_store_errors_total", "Requests to the store that failed, each attempt, since the daemon was started.");

const fn gauge(name: &'static str, help: &'static str, read: Read) -> Metric {
    Metric { name, help, kind: Kind::Gauge, read }
}

/// The names of all metrics.
pub fn names() -> Vec<&'static str> {
    METRICS.iter().map(|metric| metric.name).chain([STATE.0, UP_SINCE.0, JOBS.0, STORE_ERRORS.0]).collect()
}

/// The page that Prometheus reads.
pub fn render(snapshot: &Snapshot, counts: &[Counts]) -> String {
    let mut text = String::new();
    head(&mut text, UP_SINCE, Kind::Gauge);
    if let Some(since) = seconds(snapshot.started_at) {
        let _ = writeln!(text, "{} {since}", UP_SINCE.0);
    }
    head(&mut text, STATE, Kind::Gauge);
    for environment in &snapshot.environments {
        for state in STATES {
            let is = u8::from(environment.state == state);
            let (name, state) = (&environment.name, state.as_str());
            let _ = writeln!(text, "{}{{environment=\"{name}\",state=\"{state}\"}} {is}", STATE.0);
        }
    }
    for metric in METRICS {
        head(&mut text, (metric.name, metric.help), metric.kind);
        for environment in &snapshot.environments {
            // A name is made of letters, digits and hyphens: nothing to escape.
            if let Some(value) = (metric.read)(environment) {
                let _ = writeln!(text, "{}{{environment=\"{}\"}} {value}", metric.name, environment.name);
            }
        }
    }
    render_counts(&mut text, counts);
    text
}

fn render_counts(text: &mut String, counts: &[Counts]) {
    head(text, JOBS, Kind::Counter);
    for Counts { environment, jobs, .. } in counts {
        for (kind, outcome, count) in jobs {
            let (name, kind, outcome) = (JOBS.0, kind.as_str(), outcome.as_str());
            let _ =
                writeln!(text, "{name}{{environment=\"{environment}\",kind=\"{kind}\",outcome=\"{outcome}\"}} {count}");
        }
    }
    head(text, STORE_ERRORS, Kind::Counter);
    for Counts { environment, store_errors, .. } in counts {
        let _ = writeln!(text, "{}{{environment=\"{environment}\"}} {store_errors}", STORE_ERRORS.0);
    }
}

fn head(text: &mut String, (name, help): (&str, &str), kind: Kind) {
    let kind = match kind {
        Kind::Gauge => "gauge",
        Kind::Counter => "counter",
    };
    let _ = writeln!(text, "# HELP {name} {help}\n# TYPE {name} {kind}");
}

fn stored(environment: &EnvironmentSnapshot) -> Option<&StoreState> {
    environment.store.as_ref()
}

fn flag(is: bool) -> Option<f64> {
    Some(f64::from(u8::from(is)))
}

fn seconds(time: Timestamp) -> Option<f64> {
    Some(time.0 as f64 / 1_000_000.0)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::daemon::jobs::{JobKind, JobState};

    #[test]
    fn every_metric_is_documented_and_every_documented_one_exists() {
        let page = include_str!("../../docs/monitoring.md");
        let documented: Vec<&str> =
            page.lines().filter_map(|line| line.strip_prefix("| `pgrecall_")?.split('`').next()).collect();
        let mut known: Vec<String> =
            names().iter().map(|name| name.trim_start_matches("pgrecall_").to_owned()).collect();
        let mut documented: Vec<String> = documented.iter().map(|name| (*name).to_owned()).collect();
        known.sort();
        documented.sort();
        assert_eq!(known, documented);
        assert!(known.windows(2).all(|pair| pair[0] != pair[1]), "a metric is listed twice");
    }

    #[test]
    fn the_page_says_what_is_known_of_each_environment() {
        let mut environment = EnvironmentSnapshot::new("shop-eu", Timestamp(0));
        environment.enter(State::Lagging, None, Timestamp(0));
        environment.restarts = 3;
        let snapshot =
            Snapshot { started_at: Timestamp(1_500_000), taken_at: Timestamp(0), environments: vec![environment] };
        let jobs = vec![(JobKind::Prune, JobState::Failed, 2)];
        let counts = [Counts { environment: "shop-eu".into(), store_errors: 7, jobs }];
        let page = render(&snapshot, &counts);
        for line in [
            "# TYPE pgrecall_restarts_total counter",
            "pgrecall_start_timestamp_seconds 1.5",
            "pgrecall_state{environment=\"shop-eu\",state=\"lagging\"} 1",
            "pgrecall_state{environment=\"shop-eu\",state=\"protected\"} 0",
            "pgrecall_restarts_total{environment=\"shop-eu\"} 3",
            "pgrecall_jobs_total{environment=\"shop-eu\",kind=\"prune\",outcome=\"failed\"} 2",
            "pgrecall_store_errors_total{environment=\"shop-eu\"} 7",
        ] {
            assert!(page.lines().any(|found| found == line), "{line} in:\n{page}");
        }
        assert!(!page.contains("pgrecall_window_end_timestamp_seconds{"), "what is not known is not there");
    }
}
