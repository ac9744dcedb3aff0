use tempfile::TempDir;

use super::*;
use crate::pg::{Major, SegmentSize, SystemId, TimelineId, Timestamp};
use crate::repository::layout::{ContentHash, Generation, Incarnation, WalRange};
use crate::repository::location::Location;
use crate::repository::store::StoreSettings;
use crate::repository::{catalogue, generation, identity};

fn store(dir: &TempDir) -> Store {
    Store::open(&Location::File(dir.path().join("repo")), "shop", StoreSettings::default()).expect("open the directory")
}

async fn plain() -> (TempDir, Repository) {
    let dir = tempfile::tempdir().expect("temporary directory");
    let repository = Repository::open_or_create(store(&dir), 3, None).await.expect("create");
    (dir, repository)
}

fn a_cluster(system_id: u64) -> identity::Identity {
    identity::Identity {
        system_id: SystemId(system_id),
        major: Major(18),
        segment_size: SegmentSize::MIB_16,
        block_size: 8192,
        opened_at: Timestamp(0),
        reason: "first".into(),
    }
}

#[tokio::test]
async fn a_reader_creates_nothing() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let result = Repository::open(store(&dir), 3, None).await;
    assert!(matches!(result, Err(RepositoryError::Missing(_))));
    assert_eq!(std::fs::read_dir(dir.path().join("repo")).expect("made by open").count(), 0);
}

#[tokio::test]
async fn an_encrypted_repository_opens_only_with_its_master_key() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (ours, other) = (MasterKey::new([1; 32]), MasterKey::new([2; 32]));
    let repository = Repository::open_or_create(store(&dir), 3, Some(&ours)).await.expect("create");
    let key = Key::lease(Generation { ordinal: 1, random: 2 });
    repository.write_fact(&key, Kind::Lease, &"secret text").await.expect("write");
    let raw = store(&dir).get(&key, 1000).await.expect("raw bytes");
    assert!(!raw.windows(6).any(|w| w == b"secret"));

    assert!(matches!(Repository::open(store(&dir), 3, None).await, Err(RepositoryError::KeyMissing(_))));
    let wrong = Repository::open(store(&dir), 3, Some(&other)).await;
    assert!(matches!(wrong, Err(RepositoryError::OtherMasterKey { .. })));

    repository.rotate_master(&ours, &ours).await.expect("the same key again");
    assert!(Repository::open(store(&dir), 3, Some(&ours)).await.is_ok());
    repository.rotate_master(&ours, &other).await.expect("rotate");
    let again = Repository::open(store(&dir), 3, Some(&other)).await.expect("open with the new key");
    assert_eq!(again.read_fact::<String>(&key, Kind::Lease).await.expect("read"), "secret text");
    assert!(Repository::open(store(&dir), 3, Some(&ours)).await.is_err());
}

/// What each of several first writers seals must open for all: whoever loses takes the winner's key.
#[tokio::test]
async fn first_writers_at_the_same_time_agree_on_one_data_key() {
    let master = MasterKey::new([1; 32]);
    for round in 0..20 {
        let dir = tempfile::tempdir().expect("temporary directory");
        let open = || Repository::open_or_create(store(&dir), 3, Some(&master));
        let opened = futures::future::join_all((0..4).map(|_| open())).await;
        let opened: Vec<Repository> = opened.into_iter().map(|r| r.expect("create")).collect();
        for (random, writer) in (0..).zip(&opened) {
            let key = Key::lease(Generation { ordinal: 1, random });
            writer.write_fact(&key, Kind::Lease, &random).await.expect("write");
            for reader in &opened {
                let read = reader.read_fact::<u32>(&key, Kind::Lease).await;
                assert_eq!(read.expect("read"), random, "round {round}");
            }
        }
    }
}

/// A first writer that was killed before `format.json` left a key that nothing is sealed with.
#[tokio::test]
async fn a_key_without_a_format_is_passed_over() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let (dead, ours) = (MasterKey::new([1; 32]), MasterKey::new([2; 32]));
    create_data_key(&store(&dir), &dead).await.expect("a key");
    create_data_key(&store(&dir), &ours).await.expect("a key");
    let repository = Repository::open_or_create(store(&dir), 3, Some(&ours)).await.expect("create");
    let key = Key::lease(Generation { ordinal: 1, random: 2 });
    repository.write_fact(&key, Kind::Lease, &"text").await.expect("write");
    let again = Repository::open(store(&dir), 3, Some(&ours)).await.expect("open");
    assert_eq!(again.read_fact::<String>(&key, Kind::Lease).await.expect("read"), "text");
    assert!(Repository::open(store(&dir), 3, Some(&dead)).await.is_err());
}

#[tokio::test]
async fn generations_and_incarnations_follow_each_other() {
    let (_dir, repository) = plain().await;
    let lease =
        generation::Lease { host: "h".into(), pid: 1, started_at: Timestamp(0), version: "0".into(), store: None };
    let first = generation::take(&repository, &lease).await.expect("first");
    assert!(!generation::is_superseded(&repository, first).await.expect("list"));
    let second = generation::take(&repository, &lease).await.expect("second");
    assert_eq!((first.ordinal, second.ordinal), (1, 2));
    assert!(generation::is_superseded(&repository, first).await.expect("list"));
    let connection = generation::Connection {
        server: "/run/pg:5432".into(),
        backend_pid: 42,
        backend_started_at: None,
        opened_at: Timestamp(0),
    };
    generation::record_connection(&repository, second, 1, &connection).await.expect("record");
    let owner = generation::owner_of(&repository, "/run/pg:5432", 42).await.expect("list").expect("known");
    assert_eq!(owner.0, second);
    assert!(generation::owner_of(&repository, "/run/pg:5432", 43).await.expect("list").is_none());

    identity::open_next(&repository, a_cluster(7)).await.expect("first");
    identity::open_next(&repository, a_cluster(3)).await.expect("second");
    let current = identity::current(&repository).await.expect("list").expect("two were opened");
    assert_eq!(current.incarnation, Incarnation { ordinal: 2, system_id: SystemId(3) });
}

#[tokio::test]
async fn wal_is_listed_in_order_and_foreign_files_are_passed_over() {
    let (dir, repository) = plain().await;
    let incarnation = Incarnation { ordinal: 1, system_id: SystemId(7) };
    let size = SegmentSize::MIB_16;
    for (segment, from, to) in [(2, 100, 200), (2, 0, 100), (1, 0, size.bytes())] {
        let content = vec![b'x'; 100];
        let hash = ContentHash::of(&repository.codec().digest(&content));
        let (timeline, segment) = (TimelineId(1), crate::pg::SegmentNo(segment));
        let range = WalRange { timeline, segment, from, to, hash, whole: to == size.bytes() };
        let key = Key::wal(incarnation, &range, size);
        repository.write(&key, Kind::Wal, content.into()).await.expect("write");
    }
    let stray = dir.path().join("repo/shop/0001-7/wal/00000001/README");
    std::fs::File::create(stray).expect("a stray file");
    let listing = catalogue::list_wal(&repository, incarnation, size).await.expect("list");
    let found: Vec<_> = listing.ranges.iter().map(|o| (o.range.segment.0, o.range.from)).collect();
    assert_eq!(found, [(1, 0), (2, 0), (2, 100)]);
}

#[tokio::test]
async fn a_damaged_object_is_named() {
    let (dir, repository) = plain().await;
    let key = Key::lease(Generation { ordinal: 1, random: 2 });
    repository.write_fact(&key, Kind::Lease, &"text").await.expect("write");
    let path = dir.path().join("repo/shop").join(key.as_str());
    let mut bytes = std::fs::read(&path).expect("read");
    *bytes.last_mut().expect("not empty") ^= 0x40;
    crate::util::durable_fs::write(&path, &bytes, 0o600).expect("write");
    let error = repository.read_fact::<String>(&key, Kind::Lease).await.expect_err("damaged");
    assert!(error.is_corrupt() && error.to_string().contains(key.as_str()), "{error}");
}
