//! A real object store.
//!
//! [`Minio::shared`] is one server for the whole run, with a bucket for each caller; it ends with the test process. A test
//! that stops the store, or wants TLS, takes one of its own.

use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::{Arc, OnceLock};

use super::guard::{Directory, Process, free_port};
use super::{places, wait};

pub const ACCESS_KEY: &str = "pgrecall-tests";
pub const SECRET_KEY: &str = "not-a-secret-at-all";
pub const REGION: &str = "us-east-1";

/// A MinIO server on a loopback port.
pub struct Minio {
    dir: Directory,
    port: u16,
    tls: bool,
    process: Option<Process>,
}

/// One bucket and how to reach it.
#[derive(Clone, Debug)]
pub struct Bucket {
    pub endpoint: String,
    pub name: String,
    pub access_key: String,
    pub secret_key: String,
    pub region: String,
    /// The certificate of the store's authority, when it speaks TLS.
    pub ca_file: Option<std::path::PathBuf>,
    /// Where MinIO keeps the bucket on disk: an object is a folder `<key>/` with `xl.meta` in it.
    pub disk: std::path::PathBuf,
}

impl Minio {
    /// A bucket of the server that all tests share.
    pub fn shared() -> Bucket {
        static SHARED: OnceLock<Arc<Minio>> = OnceLock::new();
        SHARED.get_or_init(|| Arc::new(Minio::start_new(false))).bucket()
    }

    /// A server of one's own, which may be stopped.
    pub fn own() -> Minio {
        Minio::start_new(false)
    }

    /// A server of one's own that speaks TLS; its authority's certificate is in [`Bucket::ca_file`].
    pub fn own_tls() -> Minio {
        Minio::start_new(true)
    }

    fn start_new(tls: bool) -> Minio {
        let dir = Directory::new("minio");
        std::fs::create_dir(dir.join("data")).unwrap();
        std::fs::create_dir(dir.join("certs")).unwrap();
        if tls {
            certificate(&dir.join("certs"));
        }
        let mut minio = Minio { dir, port: free_port(), tls, process: None };
        minio.start();
        minio
    }

    /// Starts it (again) on the same port.
    pub fn start(&mut self) {
        let log = std::fs::File::options().create(true).append(true).open(self.dir.join("log")).unwrap();
        let mut command = Command::new(places::minio());
        command.arg("server").arg(self.dir.join("data")).arg("--quiet");
        command.arg("--address").arg(format!("127.0.0.1:{}", self.port)).arg("--certs-dir").arg(self.dir.join("certs"));
        command.env_clear().env("HOME", self.dir.path()).env("MINIO_BROWSER", "off").env("MINIO_UPDATE", "off");
        command.env("MINIO_ROOT_USER", ACCESS_KEY).env("MINIO_ROOT_PASSWORD", SECRET_KEY);
        command.env("MINIO_SCANNER_SPEED", "slowest").stdin(Stdio::null());
        command.stdout(log.try_clone().unwrap()).stderr(log).current_dir(self.dir.path());
        self.process = Some(Process::spawn(&mut command));
        let port = self.port;
        wait::until("MinIO to answer", 60, || {
            let ended = self.process.as_mut().and_then(Process::ended);
            assert!(ended.is_none(), "MinIO ended: {}", self.log());
            std::net::TcpStream::connect(("127.0.0.1", port)).is_ok() && (self.tls || healthy(port))
        });
    }

    /// Ends it at once: connections break, the port refuses.
    pub fn stop(&mut self) {
        self.process = None;
    }

    /// Lets it hang: connections are accepted and nothing is answered. `start` is not needed afterwards, but `resume`.
    pub fn pause(&mut self) {
        if let Some(process) = &mut self.process {
            process.signal("STOP");
        }
    }

    pub fn resume(&mut self) {
        if let Some(process) = &mut self.process {
            process.signal("CONT");
        }
    }

    /// A new, empty bucket.
    pub fn bucket(&self) -> Bucket {
        static NEXT: std::sync::atomic::AtomicU32 = std::sync::atomic::AtomicU32::new(1);
        let number = NEXT.fetch_add(1, std::sync::atomic::Ordering::Relaxed);
        let name = format!("test-{}-{number}", std::process::id());
        // With one drive, a bucket is a folder of it.
        let disk = self.dir.join("data").join(&name);
        std::fs::create_dir(&disk).expect("make a bucket");
        let (scheme, host) = if self.tls { ("https", "localhost") } else { ("http", "127.0.0.1") };
        Bucket {
            endpoint: format!("{scheme}://{host}:{}", self.port),
            name,
            access_key: ACCESS_KEY.to_owned(),
            secret_key: SECRET_KEY.to_owned(),
            region: REGION.to_owned(),
            ca_file: self.tls.then(|| self.dir.join("certs/ca.crt")),
            disk,
        }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    pub fn log(&self) -> String {
        std::fs::read_to_string(self.dir.join("log")).unwrap_or_default()
    }
}

impl Bucket {
    /// A client of the `object_store` crate with short limits, for tests that look into the bucket themselves.
    pub fn client(&self) -> Arc<dyn object_store::ObjectStore> {
        use object_store::aws::AmazonS3Builder;
        use object_store::{BackoffConfig, Certificate, ClientOptions, RetryConfig};
        let mut options = ClientOptions::new().with_allow_http(true);
        if let Some(ca) = &self.ca_file {
            let pem = std::fs::read(ca).unwrap();
            options = options.with_root_certificate(Certificate::from_pem(&pem).unwrap());
        }
        let retry = RetryConfig {
            backoff: BackoffConfig::default(),
            max_retries: 2,
            retry_timeout: std::time::Duration::from_secs(5),
        };
        let builder = AmazonS3Builder::new().with_endpoint(&self.endpoint).with_bucket_name(&self.name);
        let builder = builder.with_access_key_id(&self.access_key).with_secret_access_key(&self.secret_key);
        let builder = builder.with_region(&self.region).with_client_options(options).with_retry(retry);
        Arc::new(builder.build().unwrap())
    }

    /// The same bucket through another address, for example a proxy's.
    pub fn through(&self, endpoint: &str) -> Bucket {
        Bucket { endpoint: endpoint.to_owned(), ca_file: None, ..self.clone() }
    }
}

fn healthy(port: u16) -> bool {
    use std::io::{Read, Write};
    let Ok(mut socket) = std::net::TcpStream::connect(("127.0.0.1", port)) else { return false };
    let _ = socket.set_read_timeout(Some(std::time::Duration::from_secs(2)));
    let request = "GET /minio/health/ready HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n";
    let mut answer = [0; 12];
    socket.write_all(request.as_bytes()).is_ok()
        && socket.read_exact(&mut answer).is_ok()
        && answer.as_slice() == b"HTTP/1.1 200"
}

fn certificate(dir: &Path) {
    use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
    let ca_key = KeyPair::generate().unwrap();
    let mut ca = CertificateParams::new(Vec::<String>::new()).unwrap();
    ca.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    let ca_certificate = ca.self_signed(&ca_key).unwrap();
    let key = KeyPair::generate().unwrap();
    let names = vec!["localhost".to_owned(), "127.0.0.1".to_owned()];
    let signed = CertificateParams::new(names).unwrap().signed_by(&key, &Issuer::new(ca, ca_key)).unwrap();
    std::fs::write(dir.join("ca.crt"), ca_certificate.pem()).unwrap();
    std::fs::write(dir.join("public.crt"), signed.pem()).unwrap();
    std::fs::write(dir.join("private.key"), key.serialize_pem()).unwrap();
}
