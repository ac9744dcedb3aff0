use std::collections::BTreeSet;
use std::os::unix::fs::PermissionsExt;

use super::*;

const EXAMPLE: &str = include_str!("../../config.example.toml");

/// Keys without a default, which the example shows with an invented value.
const INVENTED: [&str; 21] = [
    "metrics_listen",
    "backup_bandwidth_max",
    "restore_bandwidth_max",
    "viewer",
    "operator",
    "admin",
    "password_file",
    "password_env",
    "endpoint",
    "region",
    "access_key_id_file",
    "access_key_id_env",
    "secret_access_key_file",
    "secret_access_key_env",
    "session_token_file",
    "session_token_env",
    "ca_file",
    "master_key_file",
    "master_key_env",
    "directory",
    "quota",
];

fn parse(text: &str) -> Result<Config, Vec<Problem>> {
    Config::parse(text, Path::new("config.toml"))
}

/// The problems of a text, one `line key: message` each.
fn check(text: &str, expected: &[&str]) {
    let problems = parse(text).map(|_| ()).expect_err("the text has problems");
    let found: Vec<String> = problems.iter().map(|p| format!("{} {}: {}", p.line, p.key, p.message)).collect();
    assert_eq!(found.len(), expected.len(), "{found:#?}");
    for (found, expected) in found.iter().zip(expected) {
        assert!(found.starts_with(expected), "{found:?} begins with {expected:?}");
    }
}

/// The example with those commented keys written out whose name `wanted` takes.
fn example_with(wanted: impl Fn(&str) -> bool) -> String {
    let line = |line: &'static str| match line.strip_prefix('#') {
        Some(rest) if rest.starts_with('[') => rest,
        Some(rest) => match rest.split_once(" = ") {
            Some((key, _)) if !key.contains(' ') && wanted(key) => rest,
            _ => line,
        },
        None => line,
    };
    EXAMPLE.lines().map(line).collect::<Vec<_>>().join("\n")
}

#[test]
fn the_example_is_valid_and_shows_the_defaults() {
    let plain = parse(EXAMPLE).expect("the example as it is");
    let encryption = ["[environment.shop-production.encryption]"];
    let written = example_with(|key| !INVENTED.contains(&key)).replace(encryption[0], "");
    let spelled_out = parse(&written).expect("with every default written out");
    assert_eq!(format!("{plain:?}"), format!("{spelled_out:?}"));

    let full = parse(&example_with(|key| !key.ends_with("_env"))).expect("with every key written out");
    let environment = full.environment("shop-production").expect("the environment");
    assert_eq!(environment.master_key, Some(SecretRef::File("/etc/pgrecall/master.key".into())));
    assert_eq!(environment.s3.endpoint.as_deref(), Some("https://minio.example.com:9000"));
}

#[test]
fn the_example_holds_every_key() {
    let document = Document::new(EXAMPLE);
    let table = document.parse();
    let root = document.root(&table);
    read_log(root.table("log"));
    read_limits(root.table("limits"));
    sandbox::read(root.table("sandbox"));
    Access::read(root.table("access"));
    root.text("control_socket");
    root.text("shutdown_grace");
    root.text("metrics_listen");
    for (name, section) in root.named_tables("environment", "defaults") {
        Environment::read(EnvironmentName::new(&name.value).expect("a name"), section);
    }
    let keys: BTreeSet<String> = document.schema();
    assert!(keys.contains("environment.*.s3.endpoint"), "{keys:?}");
    for key in keys
        .iter()
        .filter(|key| !matches!(key.as_str(), "environment" | "defaults" | "log" | "limits" | "access" | "sandbox"))
    {
        let name = key.rsplit('.').next().expect("the last part");
        let written = |line: &str| line.trim_start_matches('#').starts_with(&format!("{name} = "));
        let table = |line: &str| line.trim_start_matches('#').ends_with(&format!(".{name}]"));
        assert!(EXAMPLE.lines().any(|line| written(line) || table(line)), "{key} is missing in config.example.toml");
    }
}

#[test]
fn the_smallest_configuration_is_three_lines() {
    let config = parse("[environment.shop-eu]\npostgres = \"host=/tmp\"\nrepository = \"file:///backup\"\n");
    let config = config.expect("three lines suffice");
    let shop = config.environment("shop-eu").expect("the environment");
    let postgres = shop.postgres.as_ref().expect("how it is reached");
    let name = postgres.connect.application_name.as_deref();
    assert_eq!((postgres.slot.as_str(), name), ("pgrecall_shop_eu", Some("pgrecall")));
    assert_eq!(shop.archive, Archive::default());
    assert_eq!(shop.restore, Restore::default());
    assert_eq!(shop.s3, S3::default());
}

#[test]
fn every_problem_is_named_at_once_with_its_line() {
    let text = r#"controlsocket = "/x"
[log]
level = "inf"
[defaults]
rpo = 1
slot = "shared"
[environment.Shop]
repository = "file:///a"
[environment.shop]
postgres = 5
rpo = "1"
puts_in_flight = 100
buffer_bytes_max = "1MiB"
windw = "3d"
repository = "s3:/bucket"
[environment.shop.s3]
endpoint = "http://store"
allow_http = "yes"
access_key_id_env = "A"
[environment.shop.restore]
postgres_bin_dirs = ["bin"]
[environment.other]
backup_schedule = "0 0 31 2 *"
time_zone = "Berlin"
password_file = "/a"
password_env = "A"
"#;
    check(
        text,
        &[
            "1 controlsocket: unknown key (did you mean control_socket?)",
            "3 log.level: \"inf\" is not a level",
            "5 defaults.rpo: needs a unit, in quotes, such as \"30s\"",
            "6 defaults.slot: cannot be inherited",
            "7 environment.Shop: \"Shop\" cannot name an environment",
            "10 environment.shop.postgres: must be a text in quotes, not an integer",
            "11 environment.shop.rpo: needs a unit",
            "12 environment.shop.puts_in_flight: must be a whole number between 1 and 64",
            "13 environment.shop.buffer_bytes_max: \"1MiB\" is not between 32.0 MiB and 16.0 GiB",
            "14 environment.shop.windw: unknown key (did you mean window?)",
            "15 environment.shop.repository: \"s3:/bucket\" is not a repository",
            "16 environment.shop.s3: an access key needs both",
            "17 environment.shop.s3.endpoint: plain http",
            "18 environment.shop.s3.allow_http: must be true or false, not a string",
            "21 environment.shop.restore.postgres_bin_dirs: \"bin\" is not an absolute path",
            "22 environment.other: repository is missing",
            "23 environment.other.backup_schedule: \"0 0 31 2 *\" is not a schedule",
            "24 environment.other.time_zone: \"Berlin\" is not a time zone",
            "25 environment.other.password_file: cannot be used together with password_env",
        ],
    );
}

#[test]
fn metrics_are_served_to_this_host_alone() {
    let with = |address: &str| format!("metrics_listen = {address:?}\n[environment.a]\nrepository = \"file:///a\"\n");
    check(&with("0.0.0.0:9187"), &["1 metrics_listen: \"0.0.0.0:9187\" can be reached from other hosts"]);
    check(&with("localhost"), &["1 metrics_listen: \"localhost\" is not an address with a port"]);
    let config = parse(&with("[::1]:9187")).expect("valid");
    assert_eq!(config.metrics_listen.map(|address| address.port()), Some(9187));
}

#[test]
fn what_is_no_toml_is_named_with_its_line() {
    check("\n\n[log\n", &["3 : "]);
    check("", &["1 : no environment is configured"]);
    check(
        "[log]\nlevel = \"info\"\nlevel = \"warn\"\n[environment.a]\nrepository = \"file:///a\"\n",
        &["3 : duplicate key"],
    );
}

#[test]
fn an_environment_inherits_what_it_does_not_say() {
    let text = r#"
[defaults]
repository = "s3://bucket/all"
rpo = "0s"
s3 = { region = "eu", endpoint = "https://a", access_key_id_env = "ID", secret_access_key_env = "KEY" }
encryption.master_key_env = "MASTER"
[environment.a]
[environment.b]
rpo = "5s"
s3.region = "us"
encryption.master_key_file = "/key"
"#;
    let config = parse(text).expect("valid");
    let (a, b) = (config.environment("a").expect("a"), config.environment("b").expect("b"));
    assert!(a.archive.rpo.is_zero() && b.archive.rpo.as_secs() == 5);
    assert_eq!((a.s3.region.as_deref(), b.s3.region.as_deref()), (Some("eu"), Some("us")));
    assert_eq!(b.s3.access_key_id, Some(SecretRef::Variable("ID".to_owned())));
    assert_eq!(b.master_key, Some(SecretRef::File("/key".into())));
    assert!(a.s3.path_style && a.postgres.is_none());
}

#[test]
fn a_mistyped_environment_suggests_the_nearest() {
    let config = parse(EXAMPLE).expect("the example");
    let failure = config.environment("shop-prodution").expect_err("there is none");
    assert_eq!(failure.code, Code::NotFound);
    assert_eq!(failure.hint.as_deref(), Some("Did you mean shop-production?"));
}

#[test]
fn a_connection_string_is_read_and_holds_no_password() {
    let text = "[environment.a]\nrepository = \"file:///a\"\npostgres = \"host=a port=x sslmode=maybe\"\n\
                [environment.b]\nrepository = \"file:///a\"\npostgres = \"host=a password=geheim\"\n";
    check(
        text,
        &[
            "3 environment.a.postgres: port: \"x\"",
            "3 environment.a.postgres: sslmode",
            "6 environment.b.postgres: a password",
        ],
    );
    assert!(!format!("{:?}", parse(text)).contains("geheim"));
    let text = "[environment.a]\nrepository = \"file:///a\"\npostgres = \"host=a,b application_name=n\"\n";
    let config = parse(text).expect("valid");
    let postgres = config.environment("a").expect("a").postgres.clone().expect("postgres");
    assert_eq!((postgres.connect.hosts.len(), postgres.connect.application_name.as_deref()), (2, Some("n")));
}

#[test]
fn two_environments_do_not_share_a_slot_of_one_server() {
    let text = "[environment.a]\npostgres = \"host=/tmp\"\nslot = \"x\"\nrepository = \"file:///a\"\n\
                [environment.b]\npostgres = \"host=/srv,/tmp\"\nslot = \"x\"\nrepository = \"file:///a\"\n";
    check(text, &["5 environment.b: uses the same server and replication slot x as environment.a"]);
}

#[test]
fn a_secret_that_everybody_may_read_is_refused() {
    let dir = tempfile::tempdir().expect("temporary directory");
    let path = dir.path().join("password");
    crate::util::durable_fs::write(&path, b"geheim\n", 0o600).expect("write");
    let secret = SecretRef::File(path.clone());
    assert_eq!(secret.load().expect("readable").expose(), "geheim");
    std::fs::set_permissions(&path, std::fs::Permissions::from_mode(0o644)).expect("chmod");
    let error = secret.load().expect_err("exposed").to_string();
    assert!(error.contains("everybody") && error.contains("chmod o=") && !error.contains("geheim"), "{error}");
    assert!(matches!(SecretRef::Variable("PGRECALL_NOT_SET".into()).load(), Err(SecretError::Variable { .. })));
}

#[test]
fn places_are_read_strictly() {
    let place = |text: &str| text.parse::<Location>();
    assert_eq!(place("s3://bucket/a/b/"), Ok(Location::S3 { bucket: "bucket".into(), prefix: "a/b".into() }));
    assert_eq!(place("s3://bucket"), Ok(Location::S3 { bucket: "bucket".into(), prefix: String::new() }));
    for wrong in ["s3://", "s3://b//x", "s3://bucket/../x", "file://a", "file:///a/../b", "/a", "http://a"] {
        assert!(place(wrong).is_err(), "{wrong}");
    }
}

#[test]
fn a_sandbox_area_has_a_short_path_and_a_life_within_its_limit() {
    let text = format!(
        "[sandbox]\ndirectory = \"/{}\"\nexpiry = \"8d\"\nquota = \"1kB\"\n[environment.shop]\nrepository = \"file:///a\"\n",
        "a".repeat(60)
    );
    let too_small = "4 sandbox.quota: \"1kB\" is not between";
    check(&text, &["1 sandbox: expiry is longer than expiry_max", "2 sandbox.directory: has 61 bytes", too_small]);
    let text = "[sandbox]\ndirectory = \"/area\"\nquota = \"2GiB\"\n[environment.shop]\nrepository = \"file:///a\"\n";
    let sandbox = parse(text).expect("valid").sandbox;
    assert_eq!((sandbox.directory, sandbox.quota_bytes), (Some("/area".into()), Some(2 << 30)));
    assert_eq!(sandbox.expiry, Duration::from_hours(24));
}
