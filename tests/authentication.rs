//! Proving who is who: passwords, TLS and certificates, against real servers.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};

use rcgen::{BasicConstraints, CertificateParams, DnType, IsCa, Issuer, KeyPair};

use pgrecall::replication::{ConnectConfig, ReplicationError, Session, Sql};

use crate::common::guard::Directory;
use crate::common::postgres::Cluster;
use crate::common::{MAJORS, NEWEST};

const HBA: &str = "\
local all all trust
local replication postgres trust
local replication clear password
local replication peered peer map=tests
hostssl replication tls all scram-sha-256
hostssl replication,all certified all cert
host replication old all md5
host replication,all scram all scram-sha-256
";

/// Secret to nobody.
const PASSWORD: &str = "sécret: 'a b\\";

fn cluster(major: u16) -> Cluster {
    let cluster = Cluster::builder(major).tcp().hba(HBA).start();
    let literal = PASSWORD.replace('\'', "''");
    for (role, encryption) in [("old", "md5"), ("scram", "scram-sha-256"), ("tls", "scram-sha-256")] {
        cluster.query(&format!(
            "SET password_encryption = '{encryption}'; CREATE ROLE {role} LOGIN REPLICATION PASSWORD '{literal}'"
        ));
    }
    cluster.query(&format!("CREATE ROLE clear LOGIN REPLICATION PASSWORD '{literal}'"));
    cluster.query("CREATE ROLE peered LOGIN REPLICATION; CREATE ROLE certified LOGIN REPLICATION");
    fs::write(cluster.data().join("pg_ident.conf"), "tests /^.*$ peered\n").expect("write");
    cluster.reload();
    cluster
}

/// A connection string for TCP, with what a test adds.
fn tcp(cluster: &Cluster, more: &str) -> ConnectConfig {
    let password = PASSWORD.replace('\\', "\\\\").replace('\'', "\\'");
    let host = if more.contains("host=") { "" } else { "host=127.0.0.1 " };
    let password = if more.contains("password=") { String::new() } else { format!("password='{password}'") };
    format!("{host}port={} {password} {more}", cluster.port()).parse().expect("a connection string")
}

async fn try_connect(config: &ConnectConfig) -> Result<(), ReplicationError> {
    let mut session = Session::connect(config, 0).await?;
    session.identify_system().await.expect("an authenticated session works");
    session.close().await;
    Ok(())
}

async fn check(config: &ConnectConfig) {
    try_connect(config).await.unwrap_or_else(|e| panic!("{e:?} with {config:?}"));
}

#[track_caller]
fn refused_with(result: Result<(), ReplicationError>, part: &str) {
    let error = result.expect_err(part);
    assert!(error.to_string().contains(part), "{error:?}");
    assert!(!error.is_retryable(), "{error:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn every_password_method_works_and_a_wrong_password_is_told() {
    for major in MAJORS {
        let cluster = cluster(major);
        check(&tcp(&cluster, "user=old")).await;
        check(&tcp(&cluster, "user=scram")).await;
        let socket = cluster.socket_dir().display().to_string();
        check(&tcp(&cluster, &format!("user=clear host={socket}"))).await;
        check(&tcp(&cluster, &format!("user=peered host={socket}"))).await;

        for user in ["old", "scram"] {
            let error = try_connect(&tcp(&cluster, &format!("user={user} password=wrong"))).await.expect_err("wrong");
            assert!(matches!(&error, ReplicationError::Authentication(m) if m.sqlstate == "28P01"), "{error:?}");
            assert!(!error.is_retryable());
        }
        let error = try_connect(&tcp(&cluster, "user=nobody")).await.expect_err("no line for it");
        assert!(matches!(&error, ReplicationError::Authentication(m) if m.sqlstate == "28000"), "{error:?}");
        let missing = tcp(&cluster, "user=scram password='' passfile=/nonexistent");
        refused_with(try_connect(&missing).await, "asks for the password of scram");
        let bound = tcp(&cluster, "user=old channel_binding=require");
        refused_with(try_connect(&bound).await, "channel_binding=require");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_password_file_serves_both_kinds_of_connections() {
    let cluster = cluster(NEWEST);
    let dir = Directory::new("pass");
    let path = dir.join("pass");
    let escaped = PASSWORD.replace('\\', "\\\\").replace(':', "\\:");
    let port = cluster.port();
    let text = format!("# ours\n127.0.0.1:{port}:replication:scram:{escaped}\n*:{port}:postgres:scram:{escaped}\n");
    fs::write(&path, text).expect("write");
    fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).expect("chmod");
    let config = tcp(&cluster, &format!("user=scram password='' passfile={}", path.display()));
    check(&config).await;
    let mut sql = Sql::connect(&config, 0).await.expect("the other line");
    assert_eq!(sql.query("SELECT 1 AS one").await.expect("a row").text(0, "one").as_deref(), Some("1"));
    fs::set_permissions(&path, PermissionsExt::from_mode(0o644)).expect("chmod");
    refused_with(try_connect(&config).await, "chmod 0600");
}

/// Certificates in the directory of a cluster, which speaks TLS with the one named `server` from then on.
struct Authority {
    dir: PathBuf,
    issuer: Issuer<'static, KeyPair>,
}

impl Authority {
    fn new(dir: &Path) -> Authority {
        let key = KeyPair::generate().expect("key");
        let mut params = CertificateParams::new(Vec::<String>::new()).expect("names");
        params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        params.distinguished_name.push(DnType::CommonName, "tests");
        let certificate = params.self_signed(&key).expect("certificate");
        fs::write(dir.join("ca.crt"), certificate.pem()).expect("write");
        Authority { dir: dir.to_owned(), issuer: Issuer::new(params, key) }
    }

    fn issue(&self, file: &str, alternatives: &[&str], common: &str) {
        let key = KeyPair::generate().expect("key");
        let certificate = parameters(alternatives, common).signed_by(&key, &self.issuer).expect("certificate");
        write(&self.dir, file, &certificate.pem(), &key);
    }
}

fn parameters(alternatives: &[&str], common: &str) -> CertificateParams {
    let names: Vec<String> = alternatives.iter().map(|name| (*name).to_owned()).collect();
    let mut params = CertificateParams::new(names).expect("names");
    params.distinguished_name.push(DnType::CommonName, common);
    params
}

fn write(dir: &Path, file: &str, certificate: &str, key: &KeyPair) {
    fs::write(dir.join(format!("{file}.crt")), certificate).expect("write");
    let path = dir.join(format!("{file}.key"));
    fs::write(&path, key.serialize_pem()).expect("write");
    fs::set_permissions(&path, PermissionsExt::from_mode(0o600)).expect("chmod");
}

fn with_tls(cluster: &mut Cluster, dir: &Path) {
    for (name, file) in [("ssl_cert_file", "server.crt"), ("ssl_key_file", "server.key"), ("ssl_ca_file", "ca.crt")] {
        cluster.set(name, &dir.join(file).display().to_string());
    }
    cluster.set("ssl", "on");
    cluster.restart();
}

#[tokio::test(flavor = "multi_thread")]
async fn tls_is_verified_as_far_as_asked_and_scram_is_bound_to_it() {
    for major in MAJORS {
        let dir = Directory::new("tls");
        let authority = Authority::new(dir.path());
        authority.issue("server", &["localhost"], "other.example.org");
        authority.issue("certified", &[], "certified");
        let mut cluster = cluster(major);
        refused_with(try_connect(&tcp(&cluster, "user=scram sslmode=require")).await, "the server has no TLS");
        check(&tcp(&cluster, "user=scram sslmode=prefer")).await;
        with_tls(&mut cluster, dir.path());
        let root = dir.join("ca.crt").display().to_string();

        for mode in ["prefer", "require", "verify-ca", "verify-full"] {
            let root = if mode.starts_with("verify") { format!("sslrootcert={root}") } else { String::new() };
            let more = format!("user=tls host=localhost sslmode={mode} channel_binding=require {root}");
            check(&tcp(&cluster, &more)).await;
        }
        // The access rules want TLS: `allow` starts without and comes back with it.
        check(&tcp(&cluster, "user=tls sslmode=allow channel_binding=disable")).await;
        let plain = try_connect(&tcp(&cluster, "user=tls sslmode=disable")).await.expect_err("TLS only");
        assert!(matches!(plain, ReplicationError::Authentication(_)), "{plain:?}");
        let unbound = tcp(&cluster, "user=scram sslmode=disable channel_binding=require");
        refused_with(try_connect(&unbound).await, "channel_binding=require");

        let other_host = tcp(&cluster, &format!("user=tls host=127.0.0.1 sslmode=verify-full sslrootcert={root}"));
        refused_with(try_connect(&other_host).await, "not valid for");
        let any_host = tcp(&cluster, &format!("user=tls host=127.0.0.1 sslmode=verify-ca sslrootcert={root}"));
        check(&any_host).await;
        let stranger = Directory::new("stranger");
        Authority::new(stranger.path());
        let stranger = stranger.join("ca.crt").display().to_string();
        for mode in ["require", "verify-ca", "verify-full"] {
            let more = format!("user=tls host=localhost sslmode={mode} sslrootcert={stranger}");
            refused_with(try_connect(&tcp(&cluster, &more)).await, "secure the connection to localhost");
        }
        let no_root = tcp(&cluster, "user=tls host=localhost sslmode=verify-full");
        refused_with(try_connect(&no_root).await, "no root certificate");

        let (crt, key) = (dir.join("certified.crt"), dir.join("certified.key"));
        let files = format!("sslcert={} sslkey={}", crt.display(), key.display());
        check(&tcp(&cluster, &format!("user=certified sslmode=require {files}"))).await;
        fs::set_permissions(&key, PermissionsExt::from_mode(0o644)).expect("chmod");
        refused_with(
            try_connect(&tcp(&cluster, &format!("user=certified sslmode=require {files}"))).await,
            "chmod 0600",
        );
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_self_signed_certificate_is_its_own_root() {
    let dir = Directory::new("tls");
    Authority::new(dir.path());
    let mut cluster = cluster(NEWEST);
    for (alternatives, common, authority) in
        [(&["localhost"][..], "x", true), (&["localhost"][..], "x", false), (&[][..], "localhost", true)]
    {
        let key = KeyPair::generate().expect("key");
        let mut params = parameters(alternatives, common);
        if authority {
            params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
        }
        write(dir.path(), "server", &params.self_signed(&key).expect("certificate").pem(), &key);
        with_tls(&mut cluster, dir.path());
        let root = dir.join("server.crt").display().to_string();
        let full = format!("user=tls sslmode=verify-full channel_binding=require sslrootcert={root}");
        check(&tcp(&cluster, &format!("{full} host=localhost"))).await;
        refused_with(try_connect(&tcp(&cluster, &format!("{full} host=127.0.0.1"))).await, "not valid for");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn a_server_that_does_not_answer_is_given_up_in_time() {
    let silent = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("bind");
    let port = silent.local_addr().expect("the port").port();
    let config: ConnectConfig =
        format!("host=127.0.0.1 port={port} user=u connect_timeout=2").parse().expect("a connection string");
    let started = std::time::Instant::now();
    let error = Session::connect(&config, 0).await.expect_err("silence");
    assert!(matches!(error, ReplicationError::ConnectTimeout { seconds: 2, .. }) && error.is_retryable(), "{error:?}");
    assert!(started.elapsed().as_secs() < 10);
}
