//! Where a repository is: an S3-compatible bucket or a directory, and how to open it.

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use object_store::aws::{AmazonS3Builder, Checksum};
use object_store::local::LocalFileSystem;
use object_store::path::Path;
use object_store::{ClientOptions, ObjectStore, RetryConfig};

use super::store::StoreError;
use super::tls::Connector;
use crate::util::durable_fs;
use crate::util::secret::Secret;

/// The root under which each environment has a folder.
#[derive(Debug, Clone)]
pub enum Location {
    /// `file:///dir`; every write is durable before it counts.
    File(PathBuf),
    S3(Box<S3Location>),
}

/// `s3://bucket/prefix` and how to reach it.
#[derive(Debug, Clone, Default)]
pub struct S3Location {
    pub bucket: String,
    /// Without slashes at either end; may be empty.
    pub prefix: String,
    /// `None` is AWS.
    pub endpoint: Option<String>,
    pub region: Option<String>,
    /// Bucket in the path instead of the host name.
    pub path_style: bool,
    pub allow_http: bool,
    /// PEM file with further certificate authorities, or with the store's own certificate.
    pub ca_file: Option<PathBuf>,
    /// `None` takes the environment's or the instance's credentials.
    pub credentials: Option<Credentials>,
    /// Send a SHA-256 with each PUT for the store to check.
    pub checksum: bool,
}

/// A static key pair.
#[derive(Debug, Clone)]
pub struct Credentials {
    pub access_key_id: String,
    pub secret_access_key: Secret,
    pub session_token: Option<Secret>,
}

/// Longest silence of a connection before it is given up.
pub(super) const READ_TIMEOUT: Duration = Duration::from_secs(15);
pub(super) const CONNECT_TIMEOUT: Duration = Duration::from_secs(5);

impl Location {
    /// Opens the store and tells the path of the root in it.
    ///
    /// # Errors
    /// When the settings contradict each other, or the directory cannot be made.
    pub fn open(&self) -> Result<(Arc<dyn ObjectStore>, Path), StoreError> {
        match self {
            Location::File(directory) => open_directory(directory),
            Location::S3(s3) => s3.open(),
        }
    }
}

impl std::fmt::Display for Location {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        match self {
            Location::File(directory) => write!(f, "file://{}", directory.display()),
            Location::S3(s3) if s3.prefix.is_empty() => write!(f, "s3://{}", s3.bucket),
            Location::S3(s3) => write!(f, "s3://{}/{}", s3.bucket, s3.prefix),
        }
    }
}

fn open_directory(directory: &std::path::Path) -> Result<(Arc<dyn ObjectStore>, Path), StoreError> {
    let wrong = |e: String| StoreError::Settings(format!("open the repository directory {}: {e}", directory.display()));
    durable_fs::create_directories(directory, 0o777).map_err(|e| wrong(e.to_string()))?;
    let store = LocalFileSystem::new_with_prefix(directory).map_err(|e| wrong(e.to_string()))?;
    Ok((Arc::new(store.with_fsync(true)), Path::default()))
}

impl S3Location {
    fn open(&self) -> Result<(Arc<dyn ObjectStore>, Path), StoreError> {
        let wrong = |e: String| StoreError::Settings(format!("open s3://{}: {e}", self.bucket));
        let client = ClientOptions::new()
            .with_timeout_disabled()
            .with_read_timeout(READ_TIMEOUT)
            .with_connect_timeout(CONNECT_TIMEOUT)
            .with_allow_http(self.allow_http);
        // Retries are ours: `Store` bounds every operation and knows which errors are worth another attempt.
        let retry = RetryConfig { max_retries: 0, retry_timeout: Duration::ZERO, ..RetryConfig::default() };
        let mut builder = match &self.credentials {
            Some(_) => AmazonS3Builder::new(),
            None => AmazonS3Builder::from_env(),
        };
        builder = builder
            .with_bucket_name(&self.bucket)
            .with_client_options(client)
            .with_retry(retry)
            .with_allow_http(self.allow_http)
            .with_virtual_hosted_style_request(!self.path_style);
        if let Some(file) = &self.ca_file {
            builder = builder.with_http_connector(Connector::new(file, self.allow_http).map_err(wrong)?);
        }
        if self.checksum {
            builder = builder.with_checksum_algorithm(Checksum::SHA256);
        }
        if let Some(endpoint) = &self.endpoint {
            builder = builder.with_endpoint(endpoint);
        }
        if let Some(region) = &self.region {
            builder = builder.with_region(region);
        }
        if let Some(keys) = &self.credentials {
            builder =
                builder.with_access_key_id(&keys.access_key_id).with_secret_access_key(keys.secret_access_key.expose());
            if let Some(token) = &keys.session_token {
                builder = builder.with_token(token.expose());
            }
        }
        let store = builder.build().map_err(|e| wrong(e.to_string()))?;
        let root = Path::parse(&self.prefix).map_err(|e| wrong(e.to_string()))?;
        Ok((Arc::new(store), root))
    }
}
