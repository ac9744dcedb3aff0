//! pgrecall looks after the PostgreSQL clusters of a hosting platform: it archives their WAL to an object store as it is
//! written, takes backups, and restores any moment in between.
//!
//! # Bird's eye
//!
//! ```text
//! PostgreSQL ──replication──▶ archive ──▶ parts and segments ─▶ repository
//!                                └──▶ index of transaction ends ─▶ repository
//! PostgreSQL ──BASE_BACKUP──▶ backup ──▶ frames in packs, commit object ─▶ repository
//! repository ──plan──▶ files and WAL ──▶ directory ──PostgreSQL replays──▶ checked cluster
//! ```
//!
//! The object store is the only state. The daemon keeps nothing on local disk that it could not lose; a restore needs the
//! program, the configuration and the store, and neither daemon nor primary. A time never reaches PostgreSQL: our own index
//! turns it into a record on a numbered timeline, and where replay stopped is compared with it afterwards, because a server
//! that meets garbage or a missing segment ends recovery early without an error.
//!
//! # Entry points
//!
//! * [`cli::run`]: a command line becomes a request, the answer is printed, the exit status says what stood in the way
//!   ([`error::Code`], `docs/exit-codes.md`).
//! * [`daemon::Daemon`]: one supervised task for each environment; [`archive::Archiver::run`] is what it spends its life in.
//! * [`backup::FullBackup`]: the order of a backup.
//! * [`restore::Plan::build`] decides a restore, purely; [`operations::restore::execute`] carries it out.
//! * [`repository`]: what is stored, in prose, good enough to restore by hand.
//!
//! # Code map
//!
//! A module may use those above it in this table, never those beside or below it; `tests/tidy.rs` checks that.
//!
//! | layer | modules | |
//! |---|---|---|
//! | 0 | [`util`], [`error`], [`telemetry`] | no word of the domain |
//! | 1 | [`pg`] | PostgreSQL's nouns and file formats; pure |
//! | 2 | [`wal`], [`lineage`] | the WAL parser; what can be reached; pure |
//! | 3 | [`repository`], [`replication`], [`instance`] | the store; a running server; PostgreSQL as programs on this host |
//! | 4 | [`archive`], [`backup`], [`restore`], [`retention`] | WAL in, files in, bytes out, what goes; they do not know each other |
//! | 5 | [`operations`] | composes layer 4, for the daemon and for commands alike |
//! | 6 | [`config`] | the file as written, validated, and the settings made from it |
//! | 7 | [`daemon`] | supervises, schedules, knows the state of each environment |
//! | 8 | [`control`] | the Unix socket through which commands speak with the daemon |
//! | 9 | [`cli`] | one thin file for each verb |
//!
//! Layers 1 and 2 do no IO, know no async and do not log: they can be tested by bytes alone, and are.
//!
//! # Invariants, and who keeps them
//!
//! | invariant | owner |
//! |---|---|
//! | A position is (timeline, LSN). What a server is told as flushed is at most the contiguous stored end on *its* history, and a keepalive never raises it. | `archive::progress` |
//! | A hole in the WAL ends the stored stream until it is filled or recorded as a gap; it is never skipped silently. | `archive::resume` |
//! | Two pasts are never mixed: another system, another content or a server set back is a conflict for a person to decide. | `archive::resume`, `repository::identity` |
//! | A name carries the hash of its content or the generation of its writer, so writing it twice is harmless. Safety never rests on create-only writes. | `repository::layout` |
//! | A backup exists iff its commit object does and its `.dropped` does not; the commit object is written after everything that it names. | `repository::catalogue`, `backup::full` |
//! | For every moment of the recovery window a plan succeeds before and after a prune, whoever pauses, dies or misjudges the time. | `retention::policy`, `retention::prune` |
//! | Length and digest are checked before anybody sees decoded bytes, and before a file gets its final name. | `repository::codec`, `restore::fetch` |
//! | A missing object or a hole is believed only when a second listing, begun after the first ended, shows it too. | whoever lists |
//! | The WAL reader never panics, never gives a record with a bad CRC, and says why and where it stopped. | `wal::reader` |
//! | What cannot be reached is an error before a byte is written, and names what can. | `lineage::moment`, `restore::plan` |
//! | No server can be started on a restored directory before it is prepared to stop at its target. | `restore::run`, `restore::recovery` |
//! | Secrets reach neither logs nor `Debug` nor arguments of processes. | `util::secret`, `instance::command` |
//! | Queues and buffers are bounded by configuration or constants, whatever the size of a cluster. | each module names its own |
//!
//! # Deliberately absent
//!
//! * IO in `pg`, `wal` and `lineage`; a connection in `restore::plan`; the text of an object key outside
//!   `repository::layout`; the wall clock outside `util::clock`.
//! * State on local disk, a catalogue database, locks in the store.
//! * `recovery_target_time`: PostgreSQL is given an LSN.
//! * `archive_command`: WAL comes over the replication protocol, so that it is there within a second and PostgreSQL keeps
//!   what is not yet stored.
//! * `unsafe` code, but for the one call that asks the kernel for the groups of a peer, and global state other than the
//!   subscriber of the log.

pub mod archive;
pub mod backup;
pub mod cli;
pub mod config;
pub mod control;
pub mod daemon;
pub mod error;
pub mod instance;
pub mod lineage;
pub mod operations;
pub mod pg;
pub mod replication;
pub mod repository;
pub mod restore;
pub mod retention;
pub mod telemetry;
pub mod util;
pub mod wal;
