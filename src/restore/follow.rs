//! What is known about a recovery that is under way, from its log and its answers.

use crate::instance::log::{Event, LogLine};
use crate::pg::{Lsn, TimelineId};

/// Where a recovery has come.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Progress {
    pub start_lsn: Option<Lsn>,
    pub replayed_lsn: Option<Lsn>,
    pub consistent_lsn: Option<Lsn>,
    /// Read-only sessions are possible.
    pub is_readable: bool,
    /// The stop at the target, when it was reached.
    pub stop: Option<Stop>,
    pub is_paused_at_target: bool,
    pub new_timeline: Option<TimelineId>,
    /// Takes writes: recovery has ended.
    pub is_ready: bool,
    /// A setting is smaller than the source's became.
    pub needs_settings: bool,
    pub shut_down_at_target: bool,
}

/// The record at which recovery stopped: start of the last one replayed, or of the first one not replayed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stop {
    pub record_lsn: Lsn,
    pub is_replayed: bool,
}

impl Progress {
    /// Takes in a line of the log.
    pub fn note(&mut self, line: &LogLine) {
        match line.event() {
            Some(Event::RedoStarted(lsn)) => {
                self.start_lsn = self.start_lsn.or(Some(lsn));
                self.replayed_to(lsn);
            }
            Some(Event::RedoAt(lsn) | Event::RedoDone(lsn)) => self.replayed_to(lsn),
            Some(Event::ConsistentAt(lsn)) => {
                self.consistent_lsn = Some(lsn);
                self.replayed_to(lsn);
            }
            Some(Event::StoppedBefore(record_lsn)) => self.stop = Some(Stop { record_lsn, is_replayed: false }),
            Some(Event::StoppedAfter(record_lsn)) => self.stop = Some(Stop { record_lsn, is_replayed: true }),
            Some(Event::PausedAtTarget) => self.is_paused_at_target = true,
            Some(Event::InsufficientSettings) => self.needs_settings = true,
            Some(Event::NewTimeline(timeline)) => self.new_timeline = Some(timeline),
            Some(Event::ReadyReadOnly) => self.is_readable = true,
            Some(Event::Ready) => self.is_ready = true,
            Some(Event::ShutDownAtTarget) => self.shut_down_at_target = true,
            Some(Event::RecoveryComplete | Event::ShutDown) | None => {}
        }
    }

    /// Takes in a replay position, which never goes back.
    pub fn replayed_to(&mut self, lsn: Lsn) {
        self.replayed_lsn = self.replayed_lsn.max(Some(lsn));
    }

    /// A server that is started again begins anew with everything but its way so far.
    pub fn restarted(&self) -> Progress {
        Progress { start_lsn: self.start_lsn, replayed_lsn: self.replayed_lsn, ..Progress::default() }
    }

    /// The share of the way to `end` in thousandths; `None` before the beginning is known.
    pub fn permille(&self, end: Lsn) -> Option<u16> {
        let start = self.start_lsn?;
        let length = end.0.saturating_sub(start.0).max(1);
        let done = self.replayed_lsn.unwrap_or(start).0.saturating_sub(start.0).min(length);
        u16::try_from(u128::from(done) * 1000 / u128::from(length)).ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::instance::log::Severity;

    fn after(messages: &[&str]) -> Progress {
        let mut progress = Progress::default();
        for message in messages {
            progress.note(&LogLine { severity: Severity::Log, message: (*message).to_owned() });
        }
        progress
    }

    #[test]
    fn the_way_of_a_recovery_to_a_pause() {
        let progress = after(&[
            "redo starts at 0/2000000",
            "consistent recovery state reached at 0/2000100",
            "database system is ready to accept read-only connections",
            "recovery stopping before WAL location (LSN) \"0/3000000\"",
            "pausing at the end of recovery",
        ]);
        assert!(progress.is_readable && progress.is_paused_at_target && !progress.is_ready);
        assert_eq!(progress.stop, Some(Stop { record_lsn: Lsn(0x300_0000), is_replayed: false }));
        assert_eq!(progress.replayed_lsn, Some(Lsn(0x200_0100)));
        assert_eq!(progress.permille(Lsn(0x200_0200)), Some(500));
    }

    #[test]
    fn positions_never_go_back_and_shares_stay_in_range() {
        let mut progress = after(&["redo starts at 0/2000000", "redo done at 0/5000000"]);
        progress.replayed_to(Lsn(1));
        assert_eq!(progress.permille(Lsn(0x300_0000)), Some(1000));
        assert_eq!(progress.permille(Lsn(0)), Some(1000));
        assert_eq!(Progress::default().permille(Lsn(5)), None);
        assert_eq!(progress.restarted().start_lsn, Some(Lsn(0x200_0000)));
    }
}
