//! Watches that our slot neither fills the server's disk nor is given up by it.
//!
//! A slot keeps WAL until it is stored: up to `max_slot_wal_keep_size`, after which the server gives the slot up and WAL is lost,
//! or up to a full disk, after which the server stops. PostgreSQL 18 can also give up a slot that nobody used for long. What there
//! is room for, and how long it lasts at the present rate, is read every few minutes over a connection of its own; [`judge`]
//! decides, purely. The role needs no more than to connect; with `pg_read_all_settings` (part of `pg_monitor`) and on the
//! server's own host the free disk counts too.
//! Source: PostgreSQL documentation "pg_replication_slots", "Replication" settings, 14–18.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use tokio::sync::watch;
use tokio::time::Instant;
use tracing::{debug, error, info, warn};

use super::snapshot::EnvironmentSnapshot;
use crate::pg::Lsn;
use crate::replication::{ConnectConfig, HostAddress, ReplicationError, Sql, sql::SlotState};
use crate::util::durable_fs;
use crate::util::units::{show_bytes, show_duration};

/// Between two looks while all is well, and while it is not.
const LOOK: Duration = Duration::from_secs(300);
const LOOK_IN_DANGER: Duration = Duration::from_secs(60);
/// While something is about to change: there is no slot yet, or the one that was given up is made anew.
const LOOK_SOON: Duration = Duration::from_secs(10);
const LOOKS_FIRST_MAX: u32 = 12;

/// Below these a slot that does not move on is a warning, and an alarm.
const TIME_WARNING: Duration = Duration::from_hours(6);
const TIME_ALARM: Duration = Duration::from_hours(1);
/// Of all that may be kept, what is left for more.
const ROOM_WARNING_PERCENT: u128 = 25;
const ROOM_ALARM_PERCENT: u128 = 10;

/// What a server said of our slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reading {
    /// By a clock that only goes forward.
    pub at: Duration,
    /// End of the server's WAL.
    pub end_lsn: Lsn,
    pub slot: SlotState,
    /// `max_slot_wal_keep_size`; `None` is no limit.
    pub limit_bytes: Option<u64>,
    /// `idle_replication_slot_timeout`, where it is set.
    pub idle_timeout: Option<Duration>,
    /// Of the file system that holds `pg_wal`, where it can be seen from here.
    pub free_bytes: Option<u64>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Level {
    Fine,
    /// Somebody should look.
    Warning,
    /// WAL, or the server, will be lost soon.
    Alarm,
}

impl Level {
    pub fn as_str(self) -> &'static str {
        match self {
            Level::Fine => "fine",
            Level::Warning => "warning",
            Level::Alarm => "alarm",
        }
    }
}

/// What bounds the WAL that can still be kept.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bound {
    SlotLimit,
    Disk,
}

/// The state of our slot on one host.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlotReport {
    pub host: String,
    pub slot: String,
    pub level: Level,
    pub is_active: bool,
    /// WAL that the server keeps for us.
    pub retained_bytes: u64,
    /// What it can keep beyond that, and what ends it.
    pub room: Option<(u64, Bound)>,
    /// At which the server writes WAL now.
    pub bytes_per_second: Option<u64>,
    /// How long the room lasts at that rate if nothing were archived, or until the slot counts as idle for too long.
    pub time_left: Option<Duration>,
    /// What is wrong, and what to do.
    pub danger: Option<Danger>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Danger {
    pub what: String,
    pub advice: String,
}

/// Judges a reading; an earlier one gives the rate.
pub fn judge(host: &str, before: Option<&Reading>, now: &Reading) -> SlotReport {
    let retained = now.slot.restart_lsn.and_then(|from| now.end_lsn.checked_since(from)).unwrap_or(0);
    let rate = before.and_then(|before| rate(before, now));
    let room = room(now, retained);
    let lasts = match (room, rate) {
        (Some((room, _)), Some(rate)) if rate > 0 => Some(Duration::from_secs(room / rate)),
        _ => None,
    };
    let idle_left = idle_left(now);
    let time_left = [lasts, idle_left].into_iter().flatten().min();
    let kept = Kept { retained, room, lasts, is_stalled: before.is_some_and(|before| is_stalled(before, now)) };
    let found = [lost(now), idle(now, idle_left), full(&kept)];
    let (level, danger) = found
        .into_iter()
        .flatten()
        .reduce(|worst, other| if other.0 > worst.0 { other } else { worst })
        .map_or((Level::Fine, None), |(level, danger)| (level, Some(danger)));
    SlotReport {
        host: host.to_owned(),
        slot: now.slot.name.clone(),
        level,
        is_active: now.slot.active_pid.is_some(),
        retained_bytes: retained,
        room,
        bytes_per_second: rate,
        time_left,
        danger,
    }
}

/// Bytes of WAL a second between two readings.
fn rate(before: &Reading, now: &Reading) -> Option<u64> {
    let (bytes, time) = (now.end_lsn.checked_since(before.end_lsn)?, now.at.checked_sub(before.at)?);
    // Two readings close together say nothing about a rate.
    (time >= Duration::from_secs(5)).then(|| bytes / time.as_secs().max(1))
}

/// The server writes and our slot stays where it is.
fn is_stalled(before: &Reading, now: &Reading) -> bool {
    now.end_lsn > before.end_lsn && now.slot.restart_lsn == before.slot.restart_lsn
}

fn room(now: &Reading, retained: u64) -> Option<(u64, Bound)> {
    let limit = now.limit_bytes.map(|limit| {
        // The server counts in whole segments, and knows best.
        let said = now.slot.safe_wal_bytes.map(|bytes| u64::try_from(bytes).unwrap_or(0));
        (said.unwrap_or_else(|| limit.saturating_sub(retained)), Bound::SlotLimit)
    });
    let disk = now.free_bytes.map(|free| (free, Bound::Disk));
    [limit, disk].into_iter().flatten().min_by_key(|(bytes, _)| *bytes)
}

fn idle_left(now: &Reading) -> Option<Duration> {
    let idle = Duration::from_secs(now.slot.inactive_seconds.and_then(|seconds| u64::try_from(seconds).ok())?);
    now.slot.active_pid.is_none().then(|| now.idle_timeout.map(|timeout| timeout.saturating_sub(idle))).flatten()
}

type Found = Option<(Level, Danger)>;

fn lost(now: &Reading) -> Found {
    let slot = &now.slot;
    let status = slot.wal_status.as_deref().unwrap_or_default();
    let (what, advice) = if status == "lost" || slot.invalidation_reason.is_some() {
        let reason = slot.invalidation_reason.as_deref().unwrap_or("WAL that it needs is removed");
        let advice = "A new slot and a new backup are made by themselves; raise max_slot_wal_keep_size (the server \
                      writes WAL while a backup runs, too), or end what keeps WAL from being stored, lest it happens again.";
        (format!("the server has given the slot {} up: {reason}", slot.name), advice)
    } else if status == "unreserved" {
        let advice = "Raise max_slot_wal_keep_size now (ALTER SYSTEM, then SELECT pg_reload_conf()), and see why WAL is not \
                      stored: `pgrecall status`.";
        (format!("the next checkpoint removes WAL that the slot {} needs", slot.name), advice)
    } else {
        return None;
    };
    Some((Level::Alarm, Danger { what, advice: advice.to_owned() }))
}

fn idle(now: &Reading, left: Option<Duration>) -> Found {
    let (left, timeout) = (left?, now.idle_timeout?);
    let level = if left < timeout / 4 { Level::Alarm } else { Level::Warning };
    let what = format!(
        "nobody uses the slot {}: the server gives it up in {} (idle_replication_slot_timeout)",
        now.slot.name,
        show_duration(left)
    );
    let advice = "ALTER SYSTEM SET idle_replication_slot_timeout = 0; SELECT pg_reload_conf(); and see why WAL does not flow: \
                  `pgrecall status`.";
    Some((level, Danger { what, advice: advice.to_owned() }))
}

/// What is kept, and what there is room for.
struct Kept {
    retained: u64,
    room: Option<(u64, Bound)>,
    /// At the present rate of WAL.
    lasts: Option<Duration>,
    is_stalled: bool,
}

fn full(kept: &Kept) -> Found {
    let (room, bound) = kept.room?;
    let percent = u128::from(room) * 100 / (u128::from(room) + u128::from(kept.retained)).max(1);
    let lasts = kept.lasts.filter(|_| kept.is_stalled);
    let level = if percent < ROOM_ALARM_PERCENT || lasts.is_some_and(|lasts| lasts < TIME_ALARM) {
        Level::Alarm
    } else if percent < ROOM_WARNING_PERCENT || lasts.is_some_and(|lasts| lasts < TIME_WARNING) {
        Level::Warning
    } else {
        return None;
    };
    let end = match bound {
        Bound::SlotLimit => "the server gives the slot up (max_slot_wal_keep_size)",
        Bound::Disk => "its disk is full",
    };
    let time = lasts.map(|lasts| format!(", in {} at the present rate", show_duration(lasts))).unwrap_or_default();
    let what = format!(
        "the server keeps {} of WAL for us; after {} more {end}{time}",
        show_bytes(kept.retained),
        show_bytes(room)
    );
    let advice = match bound {
        Bound::SlotLimit => {
            "See why WAL is not stored (`pgrecall status`); raise max_slot_wal_keep_size where the disk has room."
        }
        Bound::Disk => {
            "See why WAL is not stored (`pgrecall status`); make room, or let the server live without the archive: \
             ALTER SYSTEM SET max_slot_wal_keep_size, and as the last resort `pgrecall slot drop`, which loses WAL."
        }
    };
    Some((level, Danger { what, advice: advice.to_owned() }))
}

/// Looks again and again, and says what it sees.
pub struct Guardian {
    pub connect: ConnectConfig,
    pub slot: String,
    pub snapshot: watch::Sender<EnvironmentSnapshot>,
}

impl Guardian {
    /// Never ends.
    ///
    /// Cancel safety: safe.
    pub async fn run(self) {
        let begin = Instant::now();
        let mut readings: BTreeMap<usize, Reading> = BTreeMap::new();
        let mut level = Level::Fine;
        let mut looks = 0;
        loop {
            let reports = self.look(begin, &mut readings).await;
            let worst = reports.iter().map(|report| report.level).max().unwrap_or(Level::Fine);
            for report in reports.iter().filter(|report| report.level == worst) {
                tell(report, level);
            }
            looks += 1;
            level = worst;
            let pause = match worst {
                _ if reports.is_empty() && looks <= LOOKS_FIRST_MAX => LOOK_SOON,
                Level::Fine => LOOK,
                Level::Warning => LOOK_IN_DANGER,
                Level::Alarm => LOOK_SOON,
            };
            self.snapshot.send_if_modified(|snapshot| {
                let changed = snapshot.slots != reports;
                snapshot.slots = reports;
                changed
            });
            tokio::time::sleep(pause).await;
        }
    }

    /// A host that does not answer now keeps its last report: the archive says itself that it cannot connect.
    async fn look(&self, begin: Instant, readings: &mut BTreeMap<usize, Reading>) -> Vec<SlotReport> {
        let mut reports = Vec::new();
        for (index, host) in self.connect.hosts.iter().enumerate() {
            let before = readings.get(&index).cloned();
            match read(&self.connect, index, &self.slot, begin.elapsed()).await {
                Ok(Some(now)) => {
                    reports.push(judge(&host.to_string(), before.as_ref(), &now));
                    readings.insert(index, now);
                }
                // A standby, or a host that has no slot of ours yet.
                Ok(None) => {
                    readings.remove(&index);
                }
                Err(error) => {
                    debug!(error = %error, "the slot cannot be looked at");
                    reports.extend(before.map(|before| judge(&host.to_string(), None, &before)));
                }
            }
        }
        reports
    }
}

/// A level is said when it is reached; that it is over, too.
fn tell(report: &SlotReport, before: Level) {
    if report.level == before {
        return;
    }
    let SlotReport { host, slot, danger, .. } = report;
    match (report.level, danger) {
        (Level::Alarm, Some(danger)) => error!(host, slot, hint = danger.advice, "{}", danger.what),
        (Level::Warning, Some(danger)) => warn!(host, slot, hint = danger.advice, "{}", danger.what),
        _ => info!(host, slot, "the slot is out of danger"),
    }
}

/// What the host says; `None` when it is no primary, or has no slot of this name.
async fn read(
    connect: &ConnectConfig,
    host_index: usize,
    slot: &str,
    at: Duration,
) -> Result<Option<Reading>, ReplicationError> {
    let mut sql = Sql::connect(connect, host_index).await?;
    let asked = async {
        let Some(slot) = sql.slots().await?.into_iter().find(|found| found.name == slot) else { return Ok(None) };
        let Some(clock) = sql.clock_reading().await? else { return Ok(None) };
        let settings = sql.wal_settings().await?;
        let host = connect.hosts.get(host_index);
        let directory = match host.map(|host| &host.address) {
            Some(HostAddress::Socket(_)) => sql.data_directory().await.ok(),
            _ => None,
        };
        let free_bytes = directory.and_then(|path| durable_fs::free_bytes(&Path::new(&path).join("pg_wal")).ok());
        let (end_lsn, limit_bytes) = (clock.insert_lsn, settings.max_slot_wal_keep_bytes);
        Ok(Some(Reading { at, end_lsn, slot, limit_bytes, idle_timeout: settings.idle_slot_timeout, free_bytes }))
    };
    let reading = asked.await;
    sql.close().await;
    reading
}

#[cfg(test)]
mod tests {
    use super::*;

    const GIB: u64 = 1 << 30;

    /// A slot that is in use, keeps a GiB, and may keep ten; a terabyte of disk is free.
    fn reading() -> Reading {
        let slot = SlotState {
            name: "pgrecall_shop".to_owned(),
            physical: true,
            active_pid: Some(7),
            restart_lsn: Some(Lsn(100 * GIB)),
            wal_status: Some("reserved".to_owned()),
            safe_wal_bytes: None,
            invalidation_reason: None,
            inactive_seconds: None,
        };
        let (at, end_lsn) = (Duration::from_secs(1000), Lsn(101 * GIB));
        Reading { at, end_lsn, slot, limit_bytes: Some(10 * GIB), idle_timeout: None, free_bytes: Some(1024 * GIB) }
    }

    fn check(before: Option<&Reading>, now: &Reading, level: Level, says: &str) -> SlotReport {
        let report = judge("db", before, now);
        let danger = report.danger.as_ref().map_or("", |danger| &danger.what);
        assert_eq!(report.level, level, "{danger}");
        assert!(danger.contains(says), "{danger:?} says {says:?}");
        report
    }

    #[test]
    fn what_is_kept_is_held_against_the_limit_and_the_disk() {
        let fine = check(None, &reading(), Level::Fine, "");
        assert_eq!((fine.retained_bytes, fine.room), (GIB, Some((9 * GIB, Bound::SlotLimit))));
        let disk = Reading { free_bytes: Some(GIB / 4), ..reading() };
        let report = check(None, &disk, Level::Warning, "its disk is full");
        assert!(report.danger.expect("a danger").advice.contains("make room"));
        check(None, &Reading { free_bytes: Some(GIB / 100), ..reading() }, Level::Alarm, "its disk is full");
        check(
            None,
            &Reading { limit_bytes: Some(GIB + GIB / 20), ..reading() },
            Level::Alarm,
            "max_slot_wal_keep_size",
        );
        // Unlimited, and the disk cannot be seen: nothing to hold it against.
        let blind = check(None, &Reading { limit_bytes: None, free_bytes: None, ..reading() }, Level::Fine, "");
        assert_eq!((blind.room, blind.time_left), (None, None));
    }

    #[test]
    fn a_slot_that_does_not_move_on_says_how_long_it_lasts() {
        let before = reading();
        // A GiB in 1000 s: the nine that are left last 2.5 hours.
        let mut now = Reading { at: Duration::from_secs(2000), end_lsn: Lsn(102 * GIB), ..reading() };
        let report = check(Some(&before), &now, Level::Warning, "2 h 13 min at the present rate");
        assert_eq!(report.time_left.map(|left| left.as_secs() / 60), Some(133));
        // The same rate while it moves on: there is room for an outage of that length.
        now.slot.restart_lsn = Some(Lsn(102 * GIB));
        let report = check(Some(&before), &now, Level::Fine, "");
        assert!(report.time_left.is_some_and(|left| left > Duration::from_secs(9000)));
        now.slot.restart_lsn = before.slot.restart_lsn;
        now.end_lsn = Lsn(107 * GIB);
        check(Some(&before), &now, Level::Alarm, "8 min");
    }

    #[test]
    fn a_slot_that_the_server_gives_up_is_an_alarm() {
        let mut now = reading();
        now.slot.wal_status = Some("unreserved".to_owned());
        check(None, &now, Level::Alarm, "next checkpoint");
        now.slot.wal_status = Some("lost".to_owned());
        check(None, &now, Level::Alarm, "given the slot");
        now.slot.invalidation_reason = Some("idle_timeout".to_owned());
        check(None, &now, Level::Alarm, "idle_timeout");
    }

    #[test]
    fn a_slot_that_nobody_uses_says_when_the_server_gives_it_up() {
        let mut now = Reading { idle_timeout: Some(Duration::from_hours(24)), ..reading() };
        check(None, &now, Level::Fine, "");
        now.slot.active_pid = None;
        now.slot.inactive_seconds = Some(3600);
        let report = check(None, &now, Level::Warning, "23 h");
        assert_eq!(report.time_left, Some(Duration::from_hours(23)));
        now.slot.inactive_seconds = Some(20 * 3600);
        check(None, &now, Level::Alarm, "4 h");
        now.idle_timeout = None;
        check(None, &now, Level::Fine, "");
    }
}
