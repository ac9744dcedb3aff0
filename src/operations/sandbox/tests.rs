use super::record::tests::record;
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
    let second = Area::open(area.settings()).expect_err("there is one already");
    assert_eq!(second.code, Code::Conflict);
    let settings = area.settings().clone();
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
    put(&area, &record("job_2", "shop"));
    put(&area, &record("job_1", "blog"));
    fs::create_dir_all(area.directory().join("shop/empty")).expect("make it");
    let listing = area.list().expect("a list");
    let ids: Vec<&str> = listing.sandboxes.iter().map(|found| found.record.id.as_str()).collect();
    assert_eq!(ids, ["job_1", "job_2"]);
    assert_eq!(listing.others.len(), 1);
    assert!(area.find("job_3").expect_err("none").hint.is_some_and(|hint| hint.contains("job_1")));
    assert!(area.find("../shop/job_2").is_err());
    assert!(area.used_bytes().expect("measured") >= 200);
}

#[test]
fn one_at_a_time_changes_a_sandbox() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let area = area(dir.path(), |_| {});
    let id: SandboxId = "job_1".parse().expect("an id");
    let claim = area.claim(&id).expect("free");
    assert!(area.claim(&id).expect_err("taken").retryable);
    drop(claim);
    area.claim(&id).expect("free again");
}

#[tokio::test]
async fn what_is_over_or_unfinished_goes_and_the_end_is_announced_once() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let area = area(dir.path(), |settings| settings.warn_before = Duration::from_secs(2));
    let hour = Timestamp(3_600_000_000);
    let states = [
        ("expired", State::Stopped, Some(hour)),
        ("soon", State::Stopped, Some(hour.saturating_add_micros(1_000_000))),
        ("later", State::Stopped, Some(hour.saturating_add_micros(9_000_000))),
        ("released", State::Released, None),
        ("half", State::Making, Some(hour.saturating_add_micros(9_000_000))),
        ("leaving", State::Removing, Some(hour)),
    ];
    for (id, state, expires_at) in states {
        let place = put(&area, &Record { state, expires_at, ..record(id, "shop") });
        fs::create_dir_all(place.join("data/base")).expect("make it");
        fs::create_dir_all(area.socket_directory(&id.parse().expect("an id"))).expect("make it");
    }
    fs::create_dir_all(area.directory().join("shop/empty")).expect("make it");
    let busy = area.claim(&"leaving".parse().expect("an id")).expect("free");

    let told = |events: Vec<Event>| {
        let mut told: Vec<(String, String)> = events
            .iter()
            .map(|event| match event {
                Event::Expired(record) => ("expired", record),
                Event::Removed(record) => ("removed", record),
                Event::Warned(record) => ("warned", record),
                other => panic!("{other:?}"),
            })
            .map(|(what, record)| (what.to_owned(), record.id.to_string()))
            .collect();
        told.sort();
        told
    };
    let pair = |what: &str, id: &str| (what.to_owned(), id.to_owned());
    let first = told(area.keep(hour).await.expect("a pass"));
    assert_eq!(first, [pair("expired", "expired"), pair("removed", "half"), pair("warned", "soon")]);
    drop(busy);
    assert_eq!(told(area.keep(hour).await.expect("a pass")), [pair("removed", "leaving")]);
    assert_eq!(area.keep(hour).await.expect("a pass"), []);
    let left: Vec<String> =
        area.list().expect("a list").sandboxes.iter().map(|found| found.record.id.to_string()).collect();
    assert_eq!(left, ["later", "released", "soon"]);
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
    put(&area, &Record { warned: true, ..record("job_1", "shop") });
    let extended = area.extend("job_1", Some(Duration::from_hours(2))).await.expect("extended");
    assert!(!extended.record.warned && extended.seconds_left.is_some_and(|left| (7100..=7200).contains(&left)));
    let released = area.release("job_1").await.expect("released").sandbox;
    assert_eq!((released.record.state, released.seconds_left), (State::Released, None));
    assert_eq!(area.destroy("job_1").await.expect_err("another's").code, Code::Conflict);
}
