use serde_json::json;

use super::report::Report;
use super::*;
use crate::pg::Timestamp;
use crate::repository::testing::World;

struct Everything;

#[async_trait]
impl Tail for Everything {
    async fn stored(&self, _lsn: Lsn) -> Result<(), Failure> {
        Ok(())
    }
}

fn ticket(text: &str) -> Ticket {
    text.parse().expect("a ticket")
}

#[tokio::test]
async fn an_incident_is_opened_whatever_does_not_work_and_commands_add_to_it() {
    let world = World::new(None).await;
    let repository = &world.repository;
    let scene = Scene { environment: "shop", repository, connect: None, tail: &Everything };
    let ops = ticket("OPS-1");
    let nothing = entry(By("ann"), What::Command, "too early".to_owned());
    assert!(!note(repository, "OPS-1", nothing.clone()).await.expect("nothing to note it in"));
    assert!(!note(repository, "any other text", nothing.clone()).await.expect("no ticket of ours"));
    assert_eq!(load(repository, &ops).await.expect_err("none").code, Code::NotFound);

    let log = open(&scene, &ops, By("ann"), Some("orders | are gone")).await.expect("opened");
    let kinds: Vec<What> = log.entries.iter().map(|entry| entry.what).collect();
    assert_eq!(kinds, [What::Opened, What::Remark, What::Remark]);
    assert!(log.entries[2].text.contains("no restore point was written"), "{:?}", log.entries[2]);
    assert_eq!(open(&scene, &ops, By("bob"), None).await.expect_err("it is open").code, Code::Conflict);
    assert!(note(repository, "OPS-1", nothing).await.expect("noted"));

    let closed = close(repository, &ops, By("bob"), Some("rows put back")).await.expect("closed");
    assert_eq!(closed.entries.len(), 5);
    assert_eq!(close(repository, &ops, By("bob"), None).await.expect_err("it is closed").code, Code::Conflict);
    assert_eq!(
        load(repository, &ticket("OPS-2")).await.expect_err("none").hint.as_deref(),
        Some("Did you mean OPS-1?")
    );
    let again = open(&scene, &ops, By("ann"), None).await.expect("opened again");
    assert_eq!((again.entries.len(), again.opened_count()), (8, 2));
}

#[test]
fn restore_points_of_one_ticket_have_different_names() {
    assert_eq!(restore_point_name(&ticket("OPS-1"), 0), "incident-OPS-1");
    assert_eq!(restore_point_name(&ticket("OPS-1"), 1), "incident-OPS-1-2");
    assert!(restore_point_name(&ticket(&"x".repeat(48)), 9_999).len() <= RESTORE_POINT_NAME_BYTES_MAX);
}

#[tokio::test]
async fn the_report_says_what_was_restored_and_what_people_write_cannot_break_it() {
    let world = World::new(None).await;
    let mut log = incident::load(&world.repository, &ticket("OPS-1")).await.expect("read");
    let at = |seconds: i64| Timestamp::from_unix_seconds(1_795_000_000 + seconds);
    let entry = |seconds, what, text: &str, document| Entry {
        at: at(seconds),
        by: "ann".into(),
        what,
        text: text.into(),
        document,
    };
    let why = "orders | are\ngone";
    log.entries = vec![
        entry(0, What::Opened, "incident OPS-1 of shop opened", json!({ "reason": why })),
        entry(
            61,
            What::Restored,
            "sandbox for T-1",
            json!({ "target": "2026-11-18 14:05Z", "databases": ["a", "b"], "rows": 7, "none": null }),
        ),
        entry(90, What::Closed, "incident OPS-1 closed", json!({ "outcome": null })),
    ];
    let report = Report::new("shop", &log);
    let expected = "\
# Incident OPS-1 of shop

* Opened: 2026-11-18 11:06:40 by ann
* Why: orders \\| are gone
* Closed: 2026-11-18 11:08:10
* Outcome: not said
* Who took part: ann

## Restored

* 2026-11-18 11:07:41 by ann: sandbox for T-1
  * databases: a; b
  * rows: 7
  * target: 2026-11-18 14:05Z

## What was done

| when (UTC) | who | what | |
|---|---|---|---|
| 2026-11-18 11:06:40 | ann | opened | incident OPS-1 of shop opened |
| 2026-11-18 11:07:41 | ann | restored | sandbox for T-1 |
| 2026-11-18 11:08:10 | ann | closed | incident OPS-1 closed |
";
    assert_eq!(report.markdown(), expected);
    let document = serde_json::to_value(&report).expect("JSON");
    assert_eq!((&document["reason"], &document["is_open"]), (&json!(why), &json!(false)));
}
