//! The role for people, and what is taken out of a sandbox before they come.
//!
//! A superuser can run programs as the operating-system user of the daemon (`COPY … FROM PROGRAM`), so nobody becomes one.
//! The role reads every table, also those with row security, or else it would count rows that it is not shown as gone. It
//! cannot be kept from the catalogues then: `pg_read_all_data` reads `pg_authid` and `pg_user_mapping`, too. So what opens
//! other servers is taken out of the copy: the hashes of passwords, the connections of subscriptions, the options of user
//! mappings. The copy's subscriptions are switched off and forget their slots, so that even whoever drops one in a released
//! copy does not drop the slot at the publisher.
//!
//! Source: `aclchk.c` (`pg_class_aclmask_ext`: `pg_read_all_data` on catalogues, superusers may update them),
//! `subscriptioncmds.c` (`DropSubscription`), 14–18.

use std::path::Path;
use std::time::Duration;

use anyhow::Context;

use super::record::Record;
use crate::instance::{Address, Session};
use crate::restore::roles::known_role;

/// The database that nobody drops.
const MAINTENANCE: &str = "template1";
const STATEMENT_LIMIT: Duration = Duration::from_secs(300);

/// What was made.
#[derive(Debug)]
pub struct Made {
    /// The superuser with which it was made.
    pub superuser: String,
    pub remarks: Vec<String>,
}

/// Prepares a promoted cluster for people.
pub async fn make(record: &Record, data_directory: &Path) -> anyhow::Result<Made> {
    let address = Address {
        socket_directory: record.socket_directory.clone(),
        port: record.port,
        user: record.superuser.clone().unwrap_or_else(|| "postgres".to_owned()),
    };
    let address = known_role(&address, MAINTENANCE, data_directory).await;
    let address = address.context("no superuser of the cluster gets a session")?;
    let session = open(&address, MAINTENANCE).await?;
    session.batch_execute(&create(record)).await.context("create it")?;
    let mut remarks = take_secrets_out(&session).await.context("take passwords out of the copy")?;
    let query = "SELECT datname FROM pg_catalog.pg_database WHERE datallowconn AND datconnlimit <> -2 ORDER BY 1";
    let mut mappings: u64 = 0;
    for row in session.query(query, &[]).await? {
        let database: String = row.try_get(0)?;
        let grant = format!("GRANT CONNECT ON DATABASE {} TO {}", identifier(&database), record.role);
        session.batch_execute(&grant).await.with_context(|| format!("let it into database {database}"))?;
        let inside = open(&address, &database).await?;
        let forget = "UPDATE pg_catalog.pg_user_mapping SET umoptions = NULL WHERE umoptions IS NOT NULL";
        let count = inside.execute(forget, &[]).await;
        mappings = mappings.saturating_add(count.with_context(|| format!("clear user mappings in {database}"))?);
    }
    if mappings > 0 {
        remarks.push(format!("the options of {mappings} user mappings were taken out: foreign tables are not reached"));
    }
    Ok(Made { superuser: address.user, remarks })
}

/// A session that may write, whatever the source has set for its databases and roles.
async fn open(address: &Address, database: &str) -> anyhow::Result<Session> {
    let session = Session::open(address, database, STATEMENT_LIMIT).await?;
    session.batch_execute("SET default_transaction_read_only = off").await?;
    Ok(session)
}

/// Its name needs no quotes: a job's id has none that would.
fn create(record: &Record) -> String {
    let role = &record.role;
    let mut statements = format!(
        "CREATE ROLE {role} LOGIN INHERIT NOSUPERUSER NOCREATEDB NOCREATEROLE NOREPLICATION BYPASSRLS; \
         GRANT pg_read_all_data TO {role};"
    );
    match record.writable {
        true => statements.push_str(&format!("GRANT pg_write_all_data TO {role};")),
        false => statements.push_str(&format!("ALTER ROLE {role} SET default_transaction_read_only = on;")),
    }
    statements
}

async fn take_secrets_out(session: &Session) -> anyhow::Result<Vec<String>> {
    let mut remarks = Vec::new();
    let passwords = "UPDATE pg_catalog.pg_authid SET rolpassword = NULL WHERE rolpassword IS NOT NULL";
    match session.execute(passwords, &[]).await? {
        0 => {}
        count => remarks.push(format!("the passwords of {count} roles were taken out")),
    }
    let subscriptions =
        "UPDATE pg_catalog.pg_subscription SET subenabled = false, subconninfo = '', subslotname = NULL";
    match session.execute(subscriptions, &[]).await? {
        0 => {}
        count => {
            remarks.push(format!("{count} subscriptions were switched off, and their connections and slots forgotten"))
        }
    }
    Ok(remarks)
}

fn identifier(name: &str) -> String {
    format!("\"{}\"", name.replace('"', "\"\""))
}
