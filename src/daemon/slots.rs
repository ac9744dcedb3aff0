//! What can fill a server's disk: slots of ours that nobody looks after any more, and WAL that is kept without a limit.

use std::collections::BTreeSet;
use std::path::Path;

use crate::config::Config;
use crate::replication::{ConnectConfig, Host, HostAddress, ReplicationError, Sql};
use crate::util::durable_fs;

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

/// A server that keeps WAL for a slot without a limit.
#[derive(Debug, Clone, PartialEq, Eq, serde::Serialize)]
pub struct UnlimitedWal {
    pub host: String,
    /// What sets a limit.
    pub statement: String,
}

/// What was found on the hosts of an environment.
#[derive(Debug, Default)]
pub struct Found {
    pub unowned: Vec<UnownedSlot>,
    pub unlimited: Vec<UnlimitedWal>,
}

/// Looks on every host of an environment.
///
/// # Errors
/// When no host can be asked.
pub async fn look(connect: &ConnectConfig, owned: &BTreeSet<String>) -> Result<Found, ReplicationError> {
    let mut found = Found::default();
    let mut failed = None;
    let mut asked = false;
    for (index, host) in connect.hosts.iter().enumerate() {
        let attempt = async {
            let mut sql = Sql::connect(connect, index).await?;
            let slots = sql.slots().await;
            let statement = limit_to_set(&mut sql, host).await;
            sql.close().await;
            slots.map(|slots| (slots, statement))
        };
        match attempt.await {
            Ok((slots, statement)) => {
                asked = true;
                let host = host.to_string();
                found.unlimited.extend(statement.map(|statement| UnlimitedWal { host: host.clone(), statement }));
                let lost = slots
                    .into_iter()
                    .filter(|s| s.physical && s.name.starts_with(OUR_PREFIX) && !owned.contains(&s.name));
                found.unowned.extend(lost.map(|slot| UnownedSlot {
                    host: host.clone(),
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

/// The statement that limits the WAL kept for slots, where nothing limits it. Half of what is free is a limit that leaves
/// the server its room; where the disk cannot be seen from here, the operator must look.
async fn limit_to_set(sql: &mut Sql, host: &Host) -> Option<String> {
    let settings = sql.wal_settings().await.ok()?;
    if settings.max_slot_wal_keep_bytes.is_some() {
        return None;
    }
    let directory = match &host.address {
        HostAddress::Socket(_) => sql.data_directory().await.ok(),
        HostAddress::Tcp(_) => None,
    };
    let free = directory.and_then(|directory| durable_fs::free_bytes(&Path::new(&directory).join("pg_wal")).ok());
    Some(limit_statement(free))
}

fn limit_statement(free_bytes: Option<u64>) -> String {
    let limit = match free_bytes.map(|free| free / 2) {
        Some(half) if half >= 2 << 30 => format!("{}GB", half >> 30),
        Some(half) => format!("{}MB", (half >> 20).max(64)),
        None => "<half of what is free for pg_wal, such as 50GB>".to_owned(),
    };
    format!("ALTER SYSTEM SET max_slot_wal_keep_size = '{limit}'; SELECT pg_reload_conf();")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn half_of_what_is_free_is_the_limit() {
        let check = |free, limit: &str| {
            let statement = limit_statement(free);
            assert!(
                statement.starts_with(&format!("ALTER SYSTEM SET max_slot_wal_keep_size = '{limit}")),
                "{statement}"
            );
        };
        check(Some(100 << 30), "50GB'");
        check(Some(3 << 30), "1536MB'");
        check(Some(0), "64MB'");
        check(None, "<half");
    }
}
