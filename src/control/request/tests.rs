use serde_json::json;

use super::*;

const JOB: &str = "20261128t034550z_68e1f7";

fn read(method: &str, path: &str, body: &str) -> Result<ControlRequest, ParseError> {
    let (path, query) = path.split_once('?').map_or((path, None), |(path, query)| (path, Some(query)));
    parse(&method.parse().expect("a method"), path, query, body.as_bytes())
}

fn failure(error: ParseError) -> Failure {
    match error {
        ParseError::NoSuchPath(failure) | ParseError::OtherMethod(failure) | ParseError::Malformed(failure) => failure,
    }
}

/// One of each request, as it comes over the socket, with its name.
pub fn every() -> Vec<(&'static str, ControlRequest)> {
    let of_shop = |rest: &str| format!("/v1/environments/shop/{rest}");
    let of_job = |place: &str, rest: &str| format!("/v1/{place}/{JOB}{rest}");
    let all = [
        ("status", "GET", "/v1/status".to_owned(), ""),
        ("backups", "GET", of_shop("backups"), ""),
        ("plan", "POST", of_shop("plan"), r#"{"to":"latest"}"#),
        ("backup", "POST", of_shop("backup"), ""),
        ("restore", "POST", of_shop("restore"), r#"{"into":"/tmp/x"}"#),
        ("verify", "POST", of_shop("verify"), "{}"),
        ("prune", "POST", of_shop("prune"), "{}"),
        ("prune-plan", "POST", of_shop("prune/plan"), "{}"),
        ("pins", "GET", of_shop("pins"), ""),
        ("pin-add", "POST", of_shop("pins"), r#"{"name":"audit-2026"}"#),
        ("pin-remove", "DELETE", of_shop("pins/audit-2026"), ""),
        ("audit", "GET", of_shop("audit?last=5"), ""),
        ("jobs", "GET", "/v1/jobs?environment=shop".to_owned(), ""),
        ("job", "GET", of_job("jobs", ""), ""),
        ("job-follow", "GET", of_job("jobs", "/follow"), ""),
        ("job-cancel", "POST", of_job("jobs", "/cancel"), ""),
        ("sandboxes", "GET", "/v1/sandboxes".to_owned(), ""),
        ("sandbox", "POST", of_shop("sandboxes"), r#"{"to":"latest","ticket":"T-1"}"#),
        ("sandbox-connect", "POST", of_job("sandboxes", "/connect"), ""),
        ("sandbox-connect-superuser", "POST", of_job("sandboxes", "/connect?superuser=true"), ""),
        ("sandbox-stop", "POST", of_job("sandboxes", "/stop"), ""),
        ("sandbox-start", "POST", of_job("sandboxes", "/start"), ""),
        ("sandbox-destroy", "POST", of_job("sandboxes", "/destroy"), ""),
        ("sandbox-extend", "POST", of_job("sandboxes", "/extend"), r#"{"by":"1h"}"#),
        ("sandbox-release", "POST", of_job("sandboxes", "/release"), ""),
        ("incidents", "GET", of_shop("incidents"), ""),
        ("incident-open", "POST", of_shop("incidents"), r#"{"ticket":"T-1"}"#),
        ("incident", "GET", of_shop("incidents/T-1"), ""),
        ("incident-close", "POST", of_shop("incidents/T-1/close"), ""),
        ("reload", "POST", "/v1/reload".to_owned(), ""),
    ];
    all.map(|(name, method, path, body)| (name, read(method, &path, body).unwrap_or_else(|e| panic!("{name}: {e:?}"))))
        .into()
}

#[test]
fn every_request_is_read_by_its_name() {
    for (name, request) in every() {
        assert_eq!(request.name(), name);
    }
    let restore = read(
        "POST",
        "/v1/environments/shop/restore",
        r#"{"to":"xid:7","into":"/tmp/x","finish":"pause","ticket":"T-1","idempotency_key":"k"}"#,
    );
    let Ok(ControlRequest::Restore { environment, asked }) = restore else { panic!("{restore:?}") };
    let words = (asked.words.to.as_str(), asked.ticket.as_deref(), asked.idempotency_key.as_deref());
    assert_eq!((environment.as_str(), words), ("shop", ("xid:7", Some("T-1"), Some("k"))));
    assert_eq!(document(&asked.words)["finish"], json!("pause"));
}

#[test]
fn what_is_no_request_is_refused_and_a_slip_is_recognised() {
    let hint = |method: &str, path: &str, body: &str| {
        failure(read(method, path, body).expect_err(path)).hint.unwrap_or_default()
    };
    let says = |method: &str, path: &str, body: &str| failure(read(method, path, body).expect_err(path)).message;
    assert_eq!(hint("GET", "/v1/stauts", ""), "Did you mean status?");
    assert_eq!(hint("GET", "/v1/environments/shop/bakups", ""), "Did you mean backups?");
    assert_eq!(hint("POST", &format!("/v1/sandboxes/{JOB}/conect"), ""), "Did you mean connect?");
    assert!(hint("GET", "/v2/status", "").contains("Did you mean v1"), "{}", hint("GET", "/v2/status", ""));
    assert!(hint("GET", "/v1/jobs/1", "").contains("jobs list"));
    assert!(says("DELETE", "/v1/status", "").contains("GET is needed"));
    assert!(says("POST", "/v1/environments/shop/plan", r#"{"too":"latest"}"#).contains("unknown field `too`"));
    assert!(says("POST", "/v1/environments/shop/restore", "{}").contains("missing field `into`"));
    assert!(says("POST", "/v1/environments/shop/plan", "[1]").contains("in braces"));
    assert!(says("POST", "/v1/environments/shop/plan", "{").contains("no JSON"));
    assert!(says("GET", "/v1/environments/a%2Fb/backups", "").contains("not a name"));
    assert!(says("GET", "/v1/environments/../backups", "").contains("not a name"));
    assert!(says("GET", "/v1/jobs?envionment=shop", "").contains("environment=…"));
    let removed = |segment: &str| read("DELETE", &format!("/v1/environments/shop/pins/{segment}"), "");
    let pin = "incident OPS-1 at 2026-11-28T07:00:00Z".to_owned();
    let wanted = ControlRequest::PinRemove { environment: "shop".into(), pin: pin.clone() };
    assert_eq!(removed(&percent::encode(&pin)), Ok(wanted));
    assert!(failure(removed("%zz").expect_err("no digits")).message.contains("not the name of a pin"));
    let long = "x".repeat(10_000);
    assert!(says("GET", &format!("/v1/{long}"), "").len() < 200, "little of the input comes back");
}
