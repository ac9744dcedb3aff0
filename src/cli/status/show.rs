//! How a status looks to people.

use std::collections::BTreeMap;
use std::fmt::Write as _;
use std::time::Duration;

use chrono::{DateTime, Utc};

use super::super::times;
use super::{EnvironmentReport, Report, StoreState};
use crate::config::Config;
use crate::control::protocol::{BackupEvent, EnvironmentStatus, JobReport, SlotStatus};
use crate::pg::Timestamp;
use crate::util::clock;
use crate::util::units::{show_bytes, show_duration};

/// A longer sentence is cut in the overview.
const NOTE_CHARACTERS_MAX: usize = 110;
const HEADINGS: [&str; 7] = ["STATE", "ENVIRONMENT", "NOT STORED", "RESTORABLE", "BACKUP", "NEXT", "JOBS"];

/// One line for each environment.
pub fn overview(report: &Report) -> String {
    let now = clock::now();
    let rows: Vec<([String; 7], String)> = report.environments.iter().map(|e| (cells(e, now), note(e))).collect();
    let mut widths = HEADINGS.map(str::len);
    for (cells, _) in &rows {
        for (width, cell) in widths.iter_mut().zip(cells) {
            *width = (*width).max(cell.chars().count());
        }
    }
    let mut text = daemon_line(report);
    let mut line = |cells: &[String; 7], note: &str| {
        let padded: String = cells.iter().zip(widths).map(|(cell, width)| format!("{cell:width$}  ")).collect();
        let _ = writeln!(text, "{}", format!("{padded}{note}").trim_end());
    };
    line(&HEADINGS.map(str::to_owned), "");
    for (cells, note) in &rows {
        line(cells, note);
    }
    text
}

fn cells(report: &EnvironmentReport, now: DateTime<Utc>) -> [String; 7] {
    let none = || "-".to_owned();
    let daemon = report.daemon.as_ref();
    let archive = daemon.and_then(|daemon| daemon.archive.as_ref());
    let exposure = archive.map_or_else(none, |archive| match (archive.exposure.oldest_ms, archive.bytes_behind) {
        (0, 0) => "nothing".to_owned(),
        (ms, bytes) => format!("{}, {}", show_duration(Duration::from_millis(ms)), show_bytes(bytes)),
    });
    let backups = daemon.map(|daemon| &daemon.backups);
    let newest = match (backups.and_then(|backups| backups.newest.as_ref()), &report.store) {
        (Some(newest), _) => Some(newest.ended_at),
        (None, Some(store)) => store.backups.last().map(|newest| newest.stopped_at),
        (None, None) => None,
    };
    let next = match daemon.map(|daemon| (&daemon.backup, &daemon.backups)) {
        Some((Some(BackupEvent::Running { .. }), _)) => "running".to_owned(),
        Some((_, backups)) if backups.overdue => "overdue".to_owned(),
        Some((_, backups)) => backups.next_at.map_or_else(none, |next| in_time(next, now)),
        None => none(),
    };
    [
        report.state.as_str().to_owned(),
        report.name.clone(),
        exposure,
        report.store.as_ref().map_or_else(none, |store| window(store, now)),
        newest.map_or_else(none, |time| format!("{} ago", age(time, now))),
        next,
        kinds(&report.jobs).unwrap_or_else(none),
    ]
}

/// Each kind once, with its number when there are several: `backup, 2 restore`.
fn kinds(jobs: &[JobReport]) -> Option<String> {
    let mut counts = BTreeMap::<&str, usize>::new();
    jobs.iter().for_each(|job| *counts.entry(&job.kind).or_default() += 1);
    let shown = counts.iter().map(|(kind, count)| match count {
        1 => (*kind).to_owned(),
        count => format!("{count} {kind}"),
    });
    Some(shown.collect::<Vec<_>>().join(", ")).filter(|text| !text.is_empty())
}

/// From when to when, as ages.
fn window(store: &StoreState, now: DateTime<Utc>) -> String {
    let (Some(first), Some(last)) = (store.window.first(), store.window.last()) else { return "nothing".to_owned() };
    let age = |time: Option<Timestamp>| time.map_or_else(|| "?".to_owned(), |time| age(time, now));
    let gaps = match store.window.len() {
        1 => String::new(),
        2 => ", 1 gap".to_owned(),
        count => format!(", {} gaps", count - 1),
    };
    format!("{} to {} ago{gaps}", age(first.from), age(last.to))
}

fn age(time: Timestamp, now: DateTime<Utc>) -> String {
    let micros = Timestamp::from(now).0.saturating_sub(time.0);
    show_duration(Duration::from_secs(u64::try_from(micros / 1_000_000).unwrap_or(0)))
}

fn in_time(time: Timestamp, now: DateTime<Utc>) -> String {
    match time.0.saturating_sub(Timestamp::from(now).0) / 1_000_000 {
        ..=0 => "now".to_owned(),
        seconds => format!("in {}", show_duration(Duration::from_secs(seconds.unsigned_abs()))),
    }
}

fn note(report: &EnvironmentReport) -> String {
    let error = report.error.as_ref().map(|failure| format!("failed to {failure}"));
    let note = report.detail.clone().or(error).unwrap_or_default().replace('\n', " ");
    match note.char_indices().nth(NOTE_CHARACTERS_MAX) {
        Some((end, _)) => format!("{}…", note.get(..end).unwrap_or_default()),
        None => note,
    }
}

fn daemon_line(report: &Report) -> String {
    let daemon = &report.daemon;
    match (&daemon.error, daemon.pid) {
        (Some(failure), _) => format!("daemon: failed to {failure}\n"),
        (None, Some(pid)) => format!("daemon: running, process {pid}\n"),
        (None, None) => "daemon: not running\n".to_owned(),
    }
}

/// Everything that is known.
pub fn details(report: &Report, config: Option<&Config>) -> String {
    let mut text = daemon_line(report);
    for report in &report.environments {
        let known = config.and_then(|config| config.environment(&report.name).ok());
        let zone = known.map(|environment| environment.time_zone).unwrap_or_default();
        let _ = writeln!(text, "\n{}: {}", report.name, report.state.as_str());
        if let Some(detail) = &report.detail {
            let _ = writeln!(text, "  detail        {detail}");
        }
        if let Some(daemon) = &report.daemon {
            show_daemon(&mut text, daemon);
        }
        match (&report.store, &report.error) {
            (Some(store), _) => show_store(&mut text, store, zone),
            (None, Some(failure)) => {
                let _ = writeln!(text, "  store         failed to {failure}");
            }
            (None, None) => text.push_str("  store         nothing is stored yet\n"),
        }
        if let Some(daemon) = &report.daemon {
            show_backups(&mut text, daemon, zone);
            daemon.slots.iter().for_each(|slot| show_slot(&mut text, slot));
        }
        report.jobs.iter().for_each(|job| show_job(&mut text, job));
    }
    text
}

fn show_daemon(text: &mut String, daemon: &EnvironmentStatus) {
    if let Some(hint) = daemon.failure.as_ref().and_then(|failure| failure.hint.as_ref()) {
        let _ = writeln!(text, "  hint          {hint}");
    }
    if let Some(archive) = &daemon.archive {
        let _ = writeln!(
            text,
            "  archive       timeline {}, stored up to {}, the server is at {}, {} behind",
            archive.timeline,
            archive.stored_lsn,
            archive.server_lsn,
            show_bytes(archive.bytes_behind)
        );
        let oldest = show_duration(Duration::from_millis(archive.exposure.oldest_ms));
        let _ = write!(text, "  exposure      {oldest} now");
        if let (Some(p50), Some(p99)) = (archive.exposure.p50_ms, archive.exposure.p99_ms) {
            let _ = write!(text, ", {p50} ms in the median, {p99} ms at most in 99 of 100");
        }
        text.push('\n');
    }
}

fn show_backups(text: &mut String, daemon: &EnvironmentStatus, zone: chrono_tz::Tz) {
    match &daemon.backup {
        Some(BackupEvent::Running { phase, .. }) => {
            let _ = writeln!(text, "  backup        running: {phase}");
        }
        Some(BackupEvent::Failed { error }) => {
            let _ = writeln!(text, "  backup        failed to {error}");
        }
        Some(BackupEvent::Done { .. }) | None => {}
    }
    if let Some(next) = daemon.backups.next_at {
        let overdue = if daemon.backups.overdue { ", overdue" } else { "" };
        let _ = writeln!(text, "  next backup   {}{overdue}", times::show(next, zone, clock::now()));
    }
}

fn show_job(text: &mut String, job: &JobReport) {
    let _ = write!(text, "  job           {}, {} {}", job.job, job.kind, job.state);
    if let Some(phase) = &job.phase {
        let _ = write!(text, ", {phase}");
    }
    if let Some(total) = job.bytes_total {
        let _ = write!(text, ", {} of {}", show_bytes(job.bytes_done), show_bytes(total));
    }
    let ticket = job.ticket.as_ref().map_or_else(String::new, |ticket| format!(" for {ticket}"));
    let _ = writeln!(text, ", asked for by {}{ticket}", job.asked_by);
}

fn show_slot(text: &mut String, slot: &SlotStatus) {
    let SlotStatus { slot: name, host, retained_bytes, room_bytes, bound, seconds_left, danger, advice, .. } = slot;
    let use_of_it = if slot.active { "in use" } else { "not in use" };
    let _ = write!(text, "  slot          {name} on {host}, {use_of_it}, keeps {} of WAL", show_bytes(*retained_bytes));
    if let (Some(room), Some(bound)) = (room_bytes, bound) {
        let _ = write!(text, ", has room for {} more ({bound})", show_bytes(*room));
    }
    if let Some(seconds) = seconds_left {
        let _ = write!(text, ", {} at the present rate", show_duration(Duration::from_secs(*seconds)));
    }
    text.push('\n');
    if let Some(danger) = danger {
        let _ = writeln!(text, "                {danger}");
    }
    if let Some(advice) = advice {
        let _ = writeln!(text, "  hint          {advice}");
    }
}

fn show_store(text: &mut String, store: &StoreState, zone: chrono_tz::Tz) {
    let now = clock::now();
    let time = |time: Option<Timestamp>| time.map_or("unknown".to_owned(), |time| times::show(time, zone, now));
    if store.window.is_empty() {
        let why = match (store.damaged_backups.is_empty(), store.backups.is_empty()) {
            (false, _) => "unknown while a backup cannot be read",
            (true, true) => "nothing yet: there is no backup",
            (true, false) => "nothing yet: no backup has all of its WAL",
        };
        let _ = writeln!(text, "  restorable    {why}");
    }
    for interval in &store.window {
        let _ =
            writeln!(text, "  restorable    from {}\n                to   {}", time(interval.from), time(interval.to));
        if let Some(cause) = &interval.ended_by {
            let _ = writeln!(text, "                then nothing until the next backup: {cause}");
        }
    }
    for tail in &store.diverged_tails {
        let _ = writeln!(
            text,
            "  diverged      {} commits on timeline {} from {} to {}, not on the one that is followed: --timeline {1}",
            tail.commits, tail.timeline, tail.fork_lsn, tail.end_lsn
        );
    }
    if let (Some(timeline), Some(from), Some(to)) = (store.timeline, &store.stored_from_lsn, &store.stored_to_lsn) {
        let _ = writeln!(text, "  stored WAL    timeline {timeline}, {from} to {to} without a gap");
    }
    for gap in &store.gaps {
        let _ = writeln!(
            text,
            "  gap           timeline {}, {} to {}: {}",
            gap.timeline, gap.start_lsn, gap.end_lsn, gap.cause
        );
    }
    if let Some(newest) = store.backups.last() {
        let _ = writeln!(
            text,
            "  backups       {}, newest {}",
            store.backup_count,
            times::show(newest.stopped_at, zone, now)
        );
    }
    for damaged in &store.damaged_backups {
        let _ = writeln!(text, "  damaged       backup {}: failed to {}", damaged.id, damaged.error);
    }
}
