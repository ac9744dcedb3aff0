//! The tree of timelines of one incarnation.
//!
//! Every history file names all ancestors of its timeline with the positions where they were left, so that one file is a
//! whole path. A timeline without a file is a root, as 1 always is.

use std::collections::BTreeMap;

use crate::pg::timeline::HistoryFile;
use crate::pg::{Lsn, TimelineId};

/// The timelines that are known, and where each one comes from.
#[derive(Debug, Clone, Default)]
pub struct History {
    files: BTreeMap<TimelineId, HistoryFile>,
}

/// The way from a root to one timeline, oldest leg first.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Path {
    legs: Vec<Leg>,
}

/// The part of a timeline that lies on a path: `[start_lsn, end_lsn)`; the last leg of a path is open.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Leg {
    pub timeline: TimelineId,
    pub start_lsn: Lsn,
    /// Where the next timeline of the path begins; [`Lsn::MAX`] on the last leg.
    pub end_lsn: Lsn,
}

/// Two files contradict each other: the timelines were made by servers that did not know of each other.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("there are two different histories of timeline {timeline}")]
pub struct HistoryConflict {
    pub timeline: TimelineId,
}

impl History {
    /// Notes that a timeline exists; one without a history file is a root.
    pub fn add_root(&mut self, timeline: TimelineId) {
        self.files.entry(timeline).or_default();
    }

    /// Notes where a timeline comes from.
    ///
    /// # Errors
    /// When another file of the same timeline was added before.
    pub fn add(&mut self, timeline: TimelineId, file: HistoryFile) -> Result<(), HistoryConflict> {
        let places = |file: &HistoryFile| -> Vec<(TimelineId, Lsn)> {
            file.entries.iter().map(|entry| (entry.timeline, entry.switch_lsn)).collect()
        };
        match self.files.get(&timeline) {
            Some(known) if !known.entries.is_empty() && places(known) != places(&file) => {
                Err(HistoryConflict { timeline })
            }
            _ => {
                self.files.insert(timeline, file);
                Ok(())
            }
        }
    }

    /// The timelines that are known themselves or as somebody's ancestor, in order of their ids.
    pub fn timelines(&self) -> Vec<TimelineId> {
        let ancestors = self.files.values().flat_map(|file| file.entries.iter().map(|entry| entry.timeline));
        let all: std::collections::BTreeSet<TimelineId> = self.files.keys().copied().chain(ancestors).collect();
        all.into_iter().collect()
    }

    /// The way to `timeline`; `None` when it is not known.
    pub fn path_to(&self, timeline: TimelineId) -> Option<Path> {
        if let Some(file) = self.files.get(&timeline) {
            return Some(Path::new(file, timeline));
        }
        // An ancestor without a file of its own: its path is the beginning of any descendant's.
        let file = self.files.values().find(|file| file.entries.iter().any(|entry| entry.timeline == timeline))?;
        let entries = file.entries.iter().take_while(|entry| entry.timeline < timeline).cloned().collect();
        Some(Path::new(&HistoryFile { entries }, timeline))
    }

    /// Whether `timeline` is `ancestor` or comes from it.
    pub fn descends(&self, timeline: TimelineId, ancestor: TimelineId) -> bool {
        self.path_to(timeline).is_some_and(|path| path.leg(ancestor).is_some())
    }

    /// The timelines that do not go on in any other.
    pub fn tips(&self) -> Vec<TimelineId> {
        let all = self.timelines();
        let parents: Vec<TimelineId> = all.iter().filter_map(|timeline| self.path_to(*timeline)?.parent()).collect();
        all.into_iter().filter(|timeline| !parents.contains(timeline)).collect()
    }
}

impl Path {
    /// The path that a history file describes.
    pub fn new(file: &HistoryFile, timeline: TimelineId) -> Path {
        let mut legs = Vec::with_capacity(file.entries.len() + 1);
        let mut start_lsn = Lsn::ZERO;
        for entry in file.entries.iter().filter(|entry| entry.timeline != timeline) {
            let end_lsn = entry.switch_lsn.max(start_lsn);
            legs.push(Leg { timeline: entry.timeline, start_lsn, end_lsn });
            start_lsn = end_lsn;
        }
        legs.push(Leg { timeline, start_lsn, end_lsn: Lsn::MAX });
        Path { legs }
    }

    /// Never empty.
    pub fn legs(&self) -> &[Leg] {
        &self.legs
    }

    /// The timeline that the path leads to.
    pub fn timeline(&self) -> TimelineId {
        self.legs.last().map_or(TimelineId(1), |leg| leg.timeline)
    }

    pub fn parent(&self) -> Option<TimelineId> {
        self.legs.iter().rev().nth(1).map(|leg| leg.timeline)
    }

    /// The beginning of this path that leads to `timeline`, open at its end.
    #[must_use]
    pub fn up_to(&self, timeline: TimelineId) -> Path {
        let before = self.legs.iter().take_while(|leg| leg.timeline != timeline).copied();
        let last = self.legs.iter().find(|leg| leg.timeline == timeline).copied();
        Path { legs: before.chain(last.map(|leg| Leg { end_lsn: Lsn::MAX, ..leg })).collect() }
    }

    /// The part of `timeline` on this path; `None` when the path does not touch it.
    pub fn leg(&self, timeline: TimelineId) -> Option<Leg> {
        self.legs.iter().find(|leg| leg.timeline == timeline).copied()
    }

    /// The timeline of the byte at `lsn`.
    pub fn timeline_at(&self, lsn: Lsn) -> TimelineId {
        let holder = self.legs.iter().find(|leg| leg.start_lsn <= lsn && lsn < leg.end_lsn);
        holder.map_or(self.timeline(), |leg| leg.timeline)
    }

    /// Whether what was read on `timeline` up to `lsn` is on this path: `lsn` is not past the fork.
    pub fn holds(&self, timeline: TimelineId, lsn: Lsn) -> bool {
        self.leg(timeline).is_some_and(|leg| leg.start_lsn <= lsn && lsn <= leg.end_lsn)
    }

    /// Up to where both paths are the same.
    pub fn common_end(&self, other: &Path) -> Lsn {
        let mut end = Lsn::ZERO;
        for (ours, theirs) in self.legs.iter().zip(&other.legs) {
            if ours.timeline != theirs.timeline {
                break;
            }
            end = ours.end_lsn.min(theirs.end_lsn);
            if ours.end_lsn != theirs.end_lsn {
                break;
            }
        }
        end
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn history() -> History {
        let mut history = History::default();
        let mut add = |timeline: u32, text: &str| {
            history.add(TimelineId(timeline), text.parse().expect("well formed")).expect("no conflict");
        };
        add(2, "1\t0/3000\tx\n");
        add(3, "1\t0/3000\tx\n2\t0/5000\tx\n");
        add(4, "1\t0/2000\tx\n");
        history
    }

    #[test]
    fn paths_of_a_tree() {
        let history = history();
        let path = history.path_to(TimelineId(3)).expect("known");
        let legs: Vec<_> = path.legs().iter().map(|leg| (leg.timeline.0, leg.start_lsn.0, leg.end_lsn.0)).collect();
        assert_eq!(legs, [(1, 0, 0x3000), (2, 0x3000, 0x5000), (3, 0x5000, u64::MAX)]);
        for (lsn, timeline) in [(0, 1), (0x2FFF, 1), (0x3000, 2), (0x4FFF, 2), (0x5000, 3), (0x9000, 3)] {
            assert_eq!(path.timeline_at(Lsn(lsn)), TimelineId(timeline), "{lsn:X}");
        }
        assert!(path.holds(TimelineId(2), Lsn(0x5000)) && !path.holds(TimelineId(2), Lsn(0x5001)));
        assert_eq!(history.path_to(TimelineId(1)).map(|path| path.legs().len()), Some(1));
        assert_eq!(history.path_to(TimelineId(9)), None);
        assert_eq!(history.tips(), [TimelineId(3), TimelineId(4)]);
        assert!(history.descends(TimelineId(3), TimelineId(1)) && !history.descends(TimelineId(4), TimelineId(2)));
    }

    #[test]
    fn common_part_of_two_paths() {
        let history = history();
        let path = |timeline| history.path_to(TimelineId(timeline)).expect("known");
        assert_eq!(path(3).common_end(&path(4)), Lsn(0x2000));
        assert_eq!(path(3).common_end(&path(2)), Lsn(0x5000));
        assert_eq!(path(2).common_end(&path(2)), Lsn::MAX);
    }

    #[test]
    fn two_histories_of_one_timeline_are_a_conflict() {
        let mut history = history();
        let same = history.add(TimelineId(2), "1\t0/3000\tsaid otherwise\n".parse().expect("well formed"));
        let other = history.add(TimelineId(2), "1\t0/3008\tx\n".parse().expect("well formed"));
        assert_eq!((same, other), (Ok(()), Err(HistoryConflict { timeline: TimelineId(2) })));
    }
}
