use super::record::tests::{id, record};
use super::*;

fn area(dir: &Path, change: impl FnOnce(&mut Settings)) -> Area {
    let mut settings = Settings { directory: Some(dir.join("area")), ..Settings::default() };
    change(&mut settings);
    Area::open(&settings).expect("an area")
}

fn put(area: &Area, record: &Record) -> PathBuf {
    let place = area.place_of(record);
    fs::create_dir_all(&place).expect("make it");
    record.save(&place).expect("write");
    place
}

#[test]
fn an_area_is_private_and_has_one_daemon() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let area = area(dir.path(), |_| {});
    assert_eq!(fs::metadata(area.directory()).expect("there").mode() & 0o777, 0o700);
    let second = Area::open(&area.settings()).expect_err("there is one already");
    assert_eq!(second.code, Code::Conflict);
    let settings = area.settings();
    assert!(area.replace(&Settings { quota_bytes: Some(1), ..settings.clone() }));
    assert_eq!(area.settings().quota_bytes, Some(1));
    assert!(!area.replace(&Settings { directory: Some(dir.path().join("other")), ..settings.clone() }));
    drop(area);
    let open = dir.path().join("area");
    fs::set_permissions(&open, fs::Permissions::from_mode(0o777)).expect("open it");
    assert_eq!(Area::open(&settings).expect_err("others may write").code, Code::Host);
    fs::set_permissions(&open, fs::Permissions::from_mode(0o755)).expect("close it");
    Area::open(&settings).expect("others may look");
    let none = Area::open(&Settings::default()).expect_err("no area");
    assert!(none.hint.is_some_and(|hint| hint.contains("[sandbox]")));
}

#[test]
fn what_lies_in_an_area_is_listed_and_what_is_no_sandbox_is_named() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let area = area(dir.path(), |_| {});
    put(&area, &record(2, "shop"));
    put(&area, &record(1, "blog"));
    fs::create_dir_all(area.directory().join("shop/empty")).expect("make it");
    let listing = area.list().expect("a list");
    let ids: Vec<JobId> = listing.sandboxes.into_iter().map(|found| found.record.id).collect();
    assert_eq!(ids, [id(1), id(2)]);
    assert_eq!(listing.others.len(), 1);
    let meant = area.find(id(3).as_str()).expect_err("none").hint;
    assert!(meant.is_some_and(|hint| hint.contains(id(1).as_str())));
    assert!(area.find(&format!("../shop/{}", id(2))).is_err());
    assert!(area.used_bytes().expect("measured") >= 200);
}

#[test]
fn one_at_a_time_changes_a_sandbox() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let area = area(dir.path(), |_| {});
    let claim = area.claim(&id(1)).expect("free");
    assert!(area.claim(&id(1)).expect_err("taken").retryable);
    drop(claim);
    area.claim(&id(1)).expect("free again");
}

#[tokio::test]
async fn what_is_over_or_unfinished_goes_and_the_end_is_announced_once() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let area = area(dir.path(), |settings| settings.warn_before = Duration::from_secs(2));
    let hour = Timestamp(3_600_000_000);
    let states = [
        (1, State::Stopped, Some(hour)),
        (2, State::Stopped, Some(hour.saturating_add_micros(1_000_000))),
        (3, State::Stopped, Some(hour.saturating_add_micros(9_000_000))),
        (4, State::Released, None),
        (5, State::Making, Some(hour.saturating_add_micros(9_000_000))),
        (6, State::Removing, Some(hour)),
    ];
    for (number, state, expires_at) in states {
        let place = put(&area, &Record { state, expires_at, ..record(number, "shop") });
        fs::create_dir_all(place.join("data/base")).expect("make it");
        fs::create_dir_all(area.socket_directory(&id(number))).expect("make it");
    }
    fs::create_dir_all(area.directory().join("shop").join(id(7).as_str())).expect("make it");
    let busy = area.claim(&id(6)).expect("free");

    let told = |events: Vec<Event>| {
        let mut told: Vec<(&str, JobId)> = events
            .iter()
            .map(|event| match event {
                Event::Expired(record) => ("expired", record),
                Event::Removed(record) => ("removed", record),
                Event::Warned(record) => ("warned", record),
                other => panic!("{other:?}"),
            })
            .map(|(what, record)| (what, record.id.clone()))
            .collect();
        told.sort();
        told
    };
    let first = told(area.keep(hour).await.expect("a pass"));
    assert_eq!(first, [("expired", id(1)), ("removed", id(5)), ("warned", id(2))]);
    drop(busy);
    assert_eq!(told(area.keep(hour).await.expect("a pass")), [("removed", id(6))]);
    assert_eq!(area.keep(hour).await.expect("a pass"), []);
    let left: Vec<JobId> = area.list().expect("a list").sandboxes.iter().map(|found| found.record.id.clone()).collect();
    assert_eq!(left, [id(2), id(3), id(4)]);
    assert!(area.list().expect("a list").others.is_empty(), "the empty directory went too");
    assert_eq!(fs::read_dir(area.directory().join(SOCKETS)).expect("list").count(), 3);
}

#[tokio::test]
async fn a_life_has_an_end_and_a_limit() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let area = area(dir.path(), |settings| settings.expiry_max = Duration::from_hours(48));
    assert_eq!(area.life(None).expect("the default"), Duration::from_hours(24));
    assert_eq!(area.life(Some(Duration::from_hours(48))).expect("the longest"), Duration::from_hours(48));
    assert_eq!(area.life(Some(Duration::from_hours(49))).expect_err("too long").code, Code::Usage);
    put(&area, &Record { warned: true, ..record(1, "shop") });
    let extended = area.extend(id(1).as_str(), Some(Duration::from_hours(2))).await.expect("extended");
    assert!(!extended.record.warned && extended.seconds_left.is_some_and(|left| (7100..=7200).contains(&left)));
    let released = area.release(id(1).as_str()).await.expect("released").sandbox;
    assert_eq!((released.record.state, released.seconds_left), (State::Released, None));
    assert_eq!(area.destroy(id(1).as_str()).await.expect_err("another's").code, Code::Conflict);
}
