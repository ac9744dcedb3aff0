//! Who holds the slot, and when a dead connection of ours may be ended.
//!
//! The active slot is the mutex for WAL. A connection is ended only when it stands in a lease record of ours, began when
//! the record says, and the process that recorded it is gone from this host: two daemons never end each other in turn.

use crate::archive::Archiver;
use crate::pg::Timestamp;
use crate::replication::{ConnectConfig, Sql};
use crate::repository::RepositoryError;
use crate::repository::codec::Kind;
use crate::repository::generation::{self, Connection, Lease};
use crate::repository::layout::Key;
use crate::util::clock;

/// Records a connection before it takes the slot.
pub(super) async fn record(
    archiver: &Archiver,
    number: u32,
    host_index: usize,
    backend_pid: i32,
) -> Result<(), RepositoryError> {
    let server = server_name(&archiver.connect, host_index);
    let backend_started_at = backend_start(&archiver.connect, host_index, backend_pid).await;
    let connection = Connection { server, backend_pid, backend_started_at, opened_at: clock::now().into() };
    generation::record_connection(&archiver.repository, archiver.generation, number, &connection).await
}

/// Says who holds the slot; ends the holder's connection when it is a dead one of ours.
pub(super) async fn ask_holder(archiver: &Archiver, backend_pid: i32, host_index: usize) -> Option<String> {
    let server = server_name(&archiver.connect, host_index);
    let owner = generation::owner_of(&archiver.repository, &server, backend_pid).await.ok()??;
    let (generation, lease, connection) = owner;
    let ours = generation == archiver.generation || is_gone(archiver, &lease).await;
    if ours && let Some(began) = connection.backend_started_at {
        let ended = end(&archiver.connect, host_index, backend_pid, began).await;
        let (pid, holder) = (lease.pid, generation.to_string());
        tracing::info!(backend_pid, pid, holder, ended, "the slot was held by a dead connection of ours");
    }
    let (daemon, host, since) = (lease.pid, lease.host, connection.opened_at);
    Some(format!("the slot is held by generation {generation} (process {daemon} on {host}, connected since {since})"))
}

/// Whether the writer that took a lease ran on this host and runs no more.
async fn is_gone(archiver: &Archiver, lease: &Lease) -> bool {
    let own = archiver.repository.read_fact::<Lease>(&Key::lease(archiver.generation), Kind::Lease).await;
    let same_host = own.is_ok_and(|own| own.host == lease.host);
    let process = i32::try_from(lease.pid).ok().and_then(rustix::process::Pid::from_raw);
    same_host && process.is_some_and(|pid| rustix::process::test_kill_process(pid) == Err(rustix::io::Errno::SRCH))
}

async fn backend_start(connect: &ConnectConfig, host_index: usize, backend_pid: i32) -> Option<Timestamp> {
    let mut sql = Sql::connect(connect, host_index).await.ok()?;
    let began = sql.backend_start(backend_pid).await.ok().flatten();
    sql.close().await;
    began
}

async fn end(connect: &ConnectConfig, host_index: usize, backend_pid: i32, began: Timestamp) -> bool {
    let Ok(mut sql) = Sql::connect(connect, host_index).await else { return false };
    let ended = sql.terminate_backend(backend_pid, Some(began)).await.unwrap_or(false);
    sql.close().await;
    ended
}

fn server_name(connect: &ConnectConfig, host_index: usize) -> String {
    connect.hosts.get(host_index).map(ToString::to_string).unwrap_or_default()
}
