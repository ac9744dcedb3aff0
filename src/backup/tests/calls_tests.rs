//! Every request that a backup makes fails, is cut, is never answered or is done twice, once or from then on, or is the last
//! one of its process.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use super::*;
use crate::repository::store::{Store, StoreSettings};
use crate::repository::testing::sim::{Fault, PAGE, SimStore};

/// A store with a repository and nothing in it.
struct Site {
    store: SimStore,
    folder: tempfile::TempDir,
}

impl Site {
    fn new() -> Site {
        let site = Site { store: SimStore::default(), folder: tempfile::tempdir().expect("temporary directory") };
        site.process(Repository::open_or_create(site.open(), 1, None)).expect("alive").expect("a new repository");
        site
    }

    /// An operation is tried twice, and no answer is waited for long.
    fn open(&self) -> Store {
        let (attempt_timeout, bytes_per_second_min) = (Duration::from_millis(100), u64::MAX);
        let settings = StoreSettings { attempts_max: 2, attempt_timeout, bytes_per_second_min };
        Store::over(Arc::new(self.store.clone()), settings, PAGE)
    }

    /// By the real clock: one that jumps would not wait for the threads that compress.
    fn process<T>(&self, work: impl Future<Output = T>) -> Option<T> {
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build();
        self.store.process_on(runtime.expect("a runtime"), work)
    }

    /// What a process does that takes one backup, from its start.
    async fn backup(&self) -> anyhow::Result<BackupReport> {
        let repository = Repository::open_or_create(self.open(), 1, None).await?;
        let lease =
            generation::Lease { host: "h".into(), pid: 1, started_at: Timestamp(0), version: "1".into(), store: None };
        let generation = generation::take(&repository, &lease).await?;
        let job = FullBackup {
            repository,
            incarnation: INCARNATION,
            generation,
            major: Major(18),
            server_version: "18.4".into(),
            segment_size: SegmentSize::MIB_16,
            settings: BackupSettings { scratch: self.folder.path().to_owned(), ..BackupSettings::default() },
        };
        let wal = Wal { covers: true, asked: AtomicBool::new(false) };
        let (progress, cancel) = (ProgressSender::default(), CancellationToken::new());
        let mut source = many_packs();
        Ok(job.run(Collaborators { source: &mut source, wal: &wal, facts: None, progress, cancel }).await?)
    }

    /// The contents of every visible backup, each read whole.
    fn visible(&self) -> Vec<(BackupId, BTreeMap<String, Vec<u8>>)> {
        let seen = self.process(async {
            let repository = Repository::open_or_create(self.open(), 1, None).await.expect("opens");
            let mut seen = Vec::new();
            for commit in catalogue::list_backups(&repository, INCARNATION).await.expect("listing") {
                let (_, contents) = read_back(&repository, &commit.tables).await;
                seen.push((commit.id, contents));
            }
            seen
        });
        seen.expect("alive")
    }
}

/// Enough that does not compress for several packs.
fn many_packs() -> MadeSource {
    let mut files = system_files();
    files.extend((0..9).map(|n| (format!("base/5/{n}"), content(n, 200_000))));
    MadeSource::of(files)
}

fn check(call: u64, fault: Fault, for_good: bool, expected: &BTreeMap<String, Vec<u8>>) -> bool {
    let what = format!("call {call}, {fault:?}, for good: {for_good}");
    let site = Site::new();
    site.store.fail(call, fault, for_good);
    let ended = site.process(site.backup());
    let visible = site.visible();
    match &ended {
        Some(Ok(report)) => {
            assert!(!for_good, "{what}: it must not succeed");
            assert_eq!(visible.len(), 1, "{what}: what is reported is there");
            assert_eq!(visible[0].0, report.commit.id, "{what}");
        }
        Some(Err(error)) => {
            let text = format!("{error:#}");
            let named = ["lease", "format", "backups", "packs", "keys"].iter().any(|name| text.contains(name));
            assert!(named, "{what}: the error names no object: {text}");
        }
        None => assert_eq!(fault, Fault::Crash, "{what}"),
    }
    // Where it failed behind the commit object, the backup is there, and whole.
    assert!(visible.iter().all(|(_, contents)| contents == expected), "{what}: what is visible is whole");
    let again = site.process(site.backup()).expect("alive").unwrap_or_else(|e| panic!("{what}: then {e:#}"));
    let after = site.visible();
    assert_eq!(after.len(), visible.len() + 1, "{what}");
    let newest = after.iter().find(|(id, _)| *id == again.commit.id);
    assert!(newest.is_some_and(|(_, contents)| contents == expected), "{what}: the next backup is the same");
    !matches!(ended, Some(Ok(_)))
}

#[test]
fn whichever_request_of_a_backup_fails_none_or_a_whole_one_is_visible() {
    let site = Site::new();
    let before = site.store.state().calls;
    site.process(site.backup()).expect("alive").expect("a backup");
    let calls = site.store.state().calls - before;
    let (_, expected) = site.visible().pop().expect("one backup");
    assert!((12..200).contains(&calls), "{calls}");
    let packs = site.store.contents().keys().filter(|path| path.as_ref().ends_with(".pack")).count();
    assert!(packs > 2, "{packs}");
    for call in 1..=calls {
        assert!(check(call, Fault::Crash, false, &expected), "call {call}");
        assert!(check(call, Fault::Refused, true, &expected), "call {call}");
        // Once: the second attempt works.
        for fault in [Fault::ErrorAfter, Fault::Cut, Fault::Hang, Fault::Twice] {
            assert!(!check(call, fault, false, &expected), "call {call}: {fault:?}");
        }
        check(call, Fault::Refused, false, &expected);
    }
}
