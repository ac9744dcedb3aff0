use proptest::prelude::*;

use super::*;

fn parsed(text: &str) -> ConnectConfig {
    text.parse().unwrap_or_else(|e| panic!("{text}: {e}"))
}

fn problems(text: &str) -> Vec<String> {
    text.parse::<ConnectConfig>().expect_err(text).problems
}

fn hosts(text: &str) -> Vec<String> {
    parsed(text).hosts.iter().map(Host::to_string).collect()
}

#[test]
fn keys_and_values_with_quotes_and_escapes() {
    let config = parsed(r"host = db user=o\'neil password='a b\\c\'d' dbname=x application_name=''");
    assert_eq!(config.hosts, [Host { address: HostAddress::Tcp("db".to_owned()), port: 5432 }]);
    assert_eq!(config.user, "o'neil");
    assert_eq!(config.password.expect("given").expose(), r"a b\c'd");
    assert_eq!((config.database.as_str(), config.application_name), ("x", None));
    assert_eq!((config.sslmode, config.channel_binding), (SslMode::Prefer, ChannelBindingMode::Prefer));
}

#[test]
fn several_hosts_share_a_port_or_have_their_own() {
    assert_eq!(hosts("host=a,b,/run/x user=u port=1,2,3"), ["a:1", "b:2", "/run/x/.s.PGSQL.3"]);
    assert_eq!(hosts("host=a,b user=u port=7"), ["a:7", "b:7"]);
    assert_eq!(problems("host=a,b,c user=u port=1,2"), ["port: 2 ports for 3 hosts"]);
}

#[test]
fn uris() {
    assert_eq!(hosts("postgresql://u@a:1,b,[::1]:3/d"), ["a:1", "b:5432", "[::1]:3"]);
    assert_eq!(hosts("postgres://u@%2Frun%2Fpg:6543/d"), ["/run/pg/.s.PGSQL.6543"]);
    assert_eq!(hosts("postgresql:///d?host=/tmp/x&user=u&port=9"), ["/tmp/x/.s.PGSQL.9"]);
    let config = parsed("postgresql://u%40x:p%3a%2Fw@h/d%20b?sslmode=verify-full&sslrootcert=/r.crt&connect_timeout=1");
    assert_eq!((config.user.as_str(), config.database.as_str()), ("u@x", "d b"));
    assert_eq!(config.password.as_ref().expect("given").expose(), "p:/w");
    assert_eq!(config.sslmode, SslMode::VerifyFull);
    assert_eq!(config.sslrootcert, RootCertificates::File("/r.crt".into()));
    assert_eq!(config.connect_timeout, Duration::from_secs(2));
}

#[test]
fn every_unknown_key_and_wrong_value_is_named_at_once() {
    let found = problems("host=a user=u target=x sslmode=full port=0 keepalives=1 connect_timeout=soon");
    assert_eq!(found.len(), 5, "{found:?}");
    for name in ["target", "keepalives", "sslmode", "port", "connect_timeout"] {
        assert!(found.iter().any(|problem| problem.starts_with(name)), "{name}: {found:?}");
    }
    assert!(problems("postgresql://u@h/d?x=1").iter().any(|p| p.starts_with("x is not a key")));
}

#[test]
fn no_problem_quotes_a_password() {
    for text in ["user=u password='secret", "user=u password=my secret", "postgresql://u:sec%zzret@h/d"] {
        let found = problems(text);
        assert!(found.iter().all(|problem| !problem.contains("sec")), "{found:?}");
    }
    let debug = format!("{:?}", parsed("host=a user=u password=secret"));
    assert!(!debug.contains("secret"), "{debug}");
}

#[test]
fn system_roots_need_the_name_checked() {
    assert_eq!(parsed("host=a user=u sslrootcert=system").sslmode, SslMode::VerifyFull);
    assert!(!problems("host=a user=u sslrootcert=system sslmode=require").is_empty());
}

proptest! {
    #[test]
    fn any_text_is_read_or_refused(text in "\\PC{0,60}") {
        let _ = text.parse::<ConnectConfig>();
        let _ = format!("postgresql://{text}").parse::<ConnectConfig>();
    }

    #[test]
    fn a_quoted_value_comes_back(value in "[^\0]{1,30}") {
        let quoted = value.replace('\\', "\\\\").replace('\'', "\\'");
        let config = parsed(&format!("host=h user='{quoted}' dbname=d"));
        prop_assert_eq!(config.user, value);
    }
}
