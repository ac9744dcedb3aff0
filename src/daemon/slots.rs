//! Replication slots of ours that nobody looks after any more: each keeps WAL until its server's disk is full.

use std::collections::BTreeSet;

use crate::config::Config;
use crate::replication::{ConnectConfig, ReplicationError, Sql};

/// What the names of our slots begin with, when nobody configured another.
const OUR_PREFIX: &str = "pgrecall_";

/// A slot of ours that no configured environment owns.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct UnownedSlot {
    pub host: String,
    pub slot: String,
    /// Somebody uses it: perhaps a daemon with another configuration.
    pub active: bool,
}

/// The slots that the configuration names, on whatever host.
pub fn owned(config: &Config) -> BTreeSet<String> {
    let postgres = config.environments.values().filter_map(|environment| environment.postgres.as_ref());
    postgres.map(|postgres| postgres.slot.clone()).collect()
}

/// Looks on every host of an environment.
///
/// # Errors
/// When no host can be asked.
pub async fn unowned(connect: &ConnectConfig, owned: &BTreeSet<String>) -> Result<Vec<UnownedSlot>, ReplicationError> {
    let mut found = Vec::new();
    let mut failed = None;
    let mut asked = false;
    for (index, host) in connect.hosts.iter().enumerate() {
        let attempt = async {
            let mut sql = Sql::connect(connect, index).await?;
            let slots = sql.slots().await;
            sql.close().await;
            slots
        };
        match attempt.await {
            Ok(slots) => {
                asked = true;
                let lost = slots
                    .into_iter()
                    .filter(|s| s.physical && s.name.starts_with(OUR_PREFIX) && !owned.contains(&s.name));
                found.extend(lost.map(|slot| UnownedSlot {
                    host: host.to_string(),
                    slot: slot.name,
                    active: slot.active_pid.is_some(),
                }));
            }
            Err(error) => failed = Some(error),
        }
    }
    match failed {
        Some(error) if !asked => Err(error),
        _ => Ok(found),
    }
}
