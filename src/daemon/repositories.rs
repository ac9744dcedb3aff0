//! The repositories of the configured environments, each opened once it is needed and kept.

use std::collections::BTreeMap;
use std::sync::atomic::AtomicU64;
use std::sync::{Arc, Mutex, PoisonError};

use tokio::sync::OnceCell;

use crate::config::{Config, Environment};
use crate::error::{Code, Failure};
use crate::repository::Repository;
use crate::util::nearest::nearest;

/// A cheap copy of the way to the repositories.
#[derive(Clone, Default)]
pub struct Repositories(Arc<Mutex<BTreeMap<String, Arc<Entry>>>>);

struct Entry {
    environment: Environment,
    opened: OnceCell<Repository>,
    store_errors: Arc<AtomicU64>,
}

impl Repositories {
    pub fn new(config: &Config) -> Repositories {
        let repositories = Repositories::default();
        repositories.replace(config);
        repositories
    }

    /// Takes over another configuration; what is open and did not change stays open.
    pub fn replace(&self, config: &Config) {
        let mut entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |environment: &Environment| {
            let before = entries.get(environment.name.as_str());
            let kept = before.filter(|entry| entry.environment == *environment).map(Arc::clone);
            let store_errors = before.map(|entry| Arc::clone(&entry.store_errors)).unwrap_or_default();
            let opened = || Arc::new(Entry { environment: environment.clone(), opened: OnceCell::new(), store_errors });
            (environment.name.to_string(), kept.unwrap_or_else(opened))
        };
        let replaced = config.environments.values().map(of).collect();
        *entries = replaced;
    }

    pub fn names(&self) -> Vec<String> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).keys().cloned().collect()
    }

    /// What the configuration says of an environment.
    ///
    /// # Errors
    /// When there is none of that name.
    pub fn environment(&self, name: &str) -> Result<Environment, Failure> {
        self.entry(name).map(|entry| entry.environment.clone())
    }

    /// The repository of an environment, open for writing.
    ///
    /// # Errors
    /// When there is no such environment, or its store says so.
    pub async fn get(&self, name: &str) -> Result<Repository, Failure> {
        let entry = self.entry(name)?;
        let open = || entry.environment.open_or_create_counting(Arc::clone(&entry.store_errors));
        entry.opened.get_or_try_init(open).await.cloned()
    }

    /// Where it is counted what an environment's store fails to do, from the start of the daemon on.
    pub fn store_errors(&self, name: &str) -> Arc<AtomicU64> {
        self.entry(name).map(|entry| Arc::clone(&entry.store_errors)).unwrap_or_default()
    }

    fn entry(&self, name: &str) -> Result<Arc<Entry>, Failure> {
        let entries = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        entries.get(name).cloned().ok_or_else(|| not_found(name, entries.keys().map(String::as_str)))
    }
}

/// There is no environment of that name; `known` are those that may be named.
pub fn not_found<'a>(name: &str, known: impl IntoIterator<Item = &'a str>) -> Failure {
    let failure = Failure::new(Code::NotFound, format!("find environment {name} in the daemon"));
    match nearest(name, known) {
        Some(meant) => failure.hint(format!("Did you mean {meant}?")),
        None => failure
            .hint("`pgrecall status` lists the environments; after a change of the configuration, `pgrecall reload`."),
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;
    use std::sync::atomic::Ordering;

    use super::*;
    use crate::util::durable_fs;

    #[tokio::test]
    async fn what_a_store_fails_to_do_is_counted_and_stays_counted_over_a_reload() {
        let dir = tempfile::tempdir().expect("temporary directory");
        // Where the folder of shop should be lies a file.
        durable_fs::write(&dir.path().join("shop"), b"", 0o600).expect("written");
        let config = |window: &str| {
            let place = dir.path().display();
            let text = format!(
                "[defaults]\nrepository = \"file://{place}\"\n[environment.shop]\nwindow = \"{window}\"\n[environment.cafe]\n"
            );
            Config::parse(&text, Path::new("config.toml")).expect("a configuration")
        };
        let repositories = Repositories::new(&config("7d"));
        let count = |name: &str| repositories.store_errors(name).load(Ordering::Relaxed);
        assert!(repositories.get("shop").await.is_err());
        assert!(repositories.get("cafe").await.is_ok());
        let failed = count("shop");
        assert!(failed > 0);
        assert_eq!(count("cafe"), 0, "that nothing was there yet is no failure");
        repositories.replace(&config("8d"));
        assert_eq!(count("shop"), failed);
        assert!(repositories.get("shop").await.is_err());
        assert!(count("shop") > failed);
    }
}
