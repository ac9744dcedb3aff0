//! The repositories of the configured environments, each opened once it is needed and kept.

use std::collections::BTreeMap;
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
            let kept = entries.get(environment.name.as_str()).filter(|entry| entry.environment == *environment);
            let opened = || Arc::new(Entry { environment: environment.clone(), opened: OnceCell::new() });
            (environment.name.to_string(), kept.map_or_else(opened, Arc::clone))
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
        entry.opened.get_or_try_init(|| entry.environment.open_or_create_repository()).await.cloned()
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
