//! Keeps the recovery window, and nothing more: which backups leave, which WAL goes with them, and what is kept beyond it.
//!
//! [`policy`] decides, purely, from what a listing showed ([`seen`]); `judge` says of any single object whether it goes and
//! why ([`reason`]), so that a repository is gone through in one pass and flat memory. [`listing`] reads what is decided on,
//! [`prune`] carries it out, [`read_pin`] keeps a running restore's backup from going.
//!
//! Removal agrees with backups, restores and other removers without a lock, whoever pauses or dies wherever:
//!
//! 1. What may go is marked `.leaving-<generation>-<n>`, and everything is listed again. When a pin is there, or the window
//!    is not covered without all that is leaving or dropped, the remover takes its own mark back; nobody else's, for that one
//!    may be about to drop. Else `.dropped` is written, which is never removed.
//! 2. A grace later, by the store's clock, everything is listed again. Deleted are packs of ids dropped a grace ago that no
//!    backup and no intent's base reaches; what was dropped less than a grace ago still counts. WAL goes below the oldest start
//!    of the same backups and intents. A commit object that is listed and gone ends the run.
//! 3. Ages, and the end of WAL, are those at the start of the listing.
//!
//! Each clause is there because leaving it out loses data in some order of events. Any step may be repeated.

mod judge;
pub mod listing;
pub mod policy;
pub mod prune;
pub mod read_pin;
pub mod reason;
pub mod seen;
#[cfg(test)]
mod tests;
