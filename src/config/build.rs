//! From an environment's table to the settings of the services.

use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicU64;
use std::time::Duration;

use super::environment::{Environment, Location, S3};
use super::secret_ref::{SecretError, SecretRef};
use crate::archive;
use crate::error::{Code, Failure};
use crate::replication::ConnectConfig;
use crate::repository::crypto::MasterKey;
use crate::repository::location::{Credentials, S3Location};
use crate::repository::store::StoreSettings;
use crate::repository::{self, Repository, Store};
use crate::util::digest::{Digest, Hasher, unhex};

impl Environment {
    /// The environment's folder in its store. Nothing is sent yet.
    ///
    /// # Errors
    /// When a secret cannot be read, or the settings contradict each other.
    pub fn store(&self) -> Result<Store, Failure> {
        let settings = StoreSettings {
            attempts_max: self.s3.attempts_max,
            attempt_timeout: self.s3.request_timeout,
            ..StoreSettings::default()
        };
        let place = self.place().map_err(|error| self.secret_failure(&error))?;
        Ok(Store::open(&place, self.name.as_str(), settings).map_err(repository::RepositoryError::from)?)
    }

    /// Opens the repository for reading; nothing is written.
    ///
    /// # Errors
    /// Also when nothing was ever stored there.
    pub async fn open_repository(&self) -> Result<Repository, Failure> {
        self.check_directory()?;
        let master = self.load_master_key()?;
        Ok(Repository::open(self.store()?, self.archive.compression_level, master.as_ref()).await?)
    }

    /// Opens the repository for writing, and makes it when there is none.
    ///
    /// # Errors
    /// As the store and the repository say.
    pub async fn open_or_create_repository(&self) -> Result<Repository, Failure> {
        self.open_or_create_counting(Arc::default()).await
    }

    /// As [`Environment::open_or_create_repository`], with the store's failures counted there.
    ///
    /// # Errors
    /// As the store and the repository say.
    pub async fn open_or_create_counting(&self, store_errors: Arc<AtomicU64>) -> Result<Repository, Failure> {
        let master = self.load_master_key()?;
        let store = self.store()?.counting(store_errors);
        Ok(Repository::open_or_create(store, self.archive.compression_level, master.as_ref()).await?)
    }

    /// The key that wraps the data key, when the environment is encrypted.
    ///
    /// # Errors
    /// When it cannot be read or is not 64 hex digits.
    pub fn load_master_key(&self) -> Result<Option<MasterKey>, Failure> {
        self.master_key.as_ref().map(|reference| self.read_master_key(reference)).transpose()
    }

    /// A master key that lies elsewhere than the configuration says, such as the next one.
    ///
    /// # Errors
    /// When it cannot be read or is not 64 hex digits.
    pub fn read_master_key(&self, reference: &SecretRef) -> Result<MasterKey, Failure> {
        let secret = reference.load().map_err(|error| self.secret_failure(&error))?;
        let bytes = unhex(secret.expose().trim()).and_then(|bytes| <[u8; 32]>::try_from(bytes).ok());
        let wrong = || {
            let message = format!("read the master key of {} from {reference}: it is not 64 hex digits", self.name);
            Failure::new(Code::Configuration, message).hint("`openssl rand -hex 32` makes one.")
        };
        bytes.map(MasterKey::new).ok_or_else(wrong)
    }

    fn place(&self) -> Result<repository::Location, SecretError> {
        let (bucket, prefix) = match &self.location {
            Location::File(directory) => return Ok(repository::Location::File(directory.clone())),
            Location::S3 { bucket, prefix } => (bucket.clone(), prefix.clone()),
        };
        let load = |reference: &Option<SecretRef>| reference.as_ref().map(SecretRef::load).transpose();
        let credentials = match (load(&self.s3.access_key_id)?, load(&self.s3.secret_access_key)?) {
            (Some(id), Some(secret_access_key)) => Some(Credentials {
                access_key_id: id.expose().to_owned(),
                secret_access_key,
                session_token: load(&self.s3.session_token)?,
            }),
            _ => None,
        };
        Ok(repository::Location::S3(Box::new(S3Location {
            bucket,
            prefix,
            endpoint: self.s3.endpoint.clone(),
            region: self.s3.region.clone(),
            path_style: self.s3.path_style,
            allow_http: self.s3.allow_http,
            ca_file: self.s3.ca_file.clone(),
            credentials,
            checksum: self.s3.checksum,
        })))
    }

    /// A reader makes no directory: one that is missing is a wrong path or a disk that is not mounted.
    fn check_directory(&self) -> Result<(), Failure> {
        match &self.location {
            Location::File(directory) if !Path::is_dir(directory) => {
                let message = format!("open the repository of {}: {} is no directory", self.name, directory.display());
                Err(Failure::new(Code::Store, message).hint("Is its disk mounted? The daemon makes it when it starts."))
            }
            _ => Ok(()),
        }
    }

    /// How to reach the cluster, with the password.
    ///
    /// # Errors
    /// When the environment has no `postgres`, or the password cannot be read.
    pub fn connect(&self) -> Result<ConnectConfig, Failure> {
        let Some(postgres) = &self.postgres else {
            let message = format!("connect to {}: the configuration has no `postgres` for it", self.name);
            return Err(
                Failure::new(Code::Configuration, message).hint("Without it an environment is only restored here.")
            );
        };
        let password = postgres.password.as_ref().map(SecretRef::load).transpose();
        let password = password.map_err(|error| self.secret_failure(&error))?;
        Ok(ConnectConfig { password, ..postgres.connect.clone() })
    }

    /// The settings of the archiver; `budget` is what all archivers of the process share.
    pub fn archive_settings(&self, shutdown_grace: Duration, budget: &Arc<archive::Budget>) -> archive::Settings {
        archive::Settings {
            slot: self.postgres.as_ref().map_or_else(|| self.name.default_slot(), |postgres| postgres.slot.clone()),
            rpo: self.archive.rpo,
            puts_in_flight: usize::try_from(self.archive.puts_in_flight).unwrap_or(1),
            buffer_bytes_max: self.archive.buffer_bytes_max,
            budget: Arc::clone(budget),
            shutdown_grace,
            ..archive::Settings::default()
        }
    }

    /// Changes when one of the environment's secrets does.
    ///
    /// # Errors
    /// When one cannot be read.
    pub fn secrets_digest(&self) -> Result<Digest, Failure> {
        let S3 { access_key_id, secret_access_key, session_token, .. } = &self.s3;
        let password = self.postgres.as_ref().and_then(|postgres| postgres.password.as_ref());
        let of_store = [access_key_id, secret_access_key, session_token, &self.master_key].map(Option::as_ref);
        let mut hasher = Hasher::sha256();
        for reference in of_store.into_iter().chain([password]) {
            let secret = reference.map(SecretRef::load).transpose().map_err(|error| self.secret_failure(&error))?;
            // Each by its own digest: two secrets never run into each other.
            hasher.update(&Digest::sha256(secret.as_ref().map_or("", |secret| secret.expose()).as_bytes()).0);
        }
        Ok(hasher.finish())
    }

    fn secret_failure(&self, error: &SecretError) -> Failure {
        Failure::new(Code::Configuration, format!("open environment {}: {error}", self.name))
    }
}
