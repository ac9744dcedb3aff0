//! Which of the configured hosts is followed.

use tokio::sync::watch;

use super::resume::Conflict;
use super::status::ArchiveStatus;
use crate::pg::SystemId;
use crate::replication::session::SystemIdentity;
use crate::replication::{ConnectConfig, ReplicationError, Session};

/// A server with an idle connection to it.
pub(super) struct Server {
    pub session: Session,
    pub host_index: usize,
    pub name: String,
    pub identity: SystemIdentity,
}

/// What is known of a primary.
#[derive(Debug, Clone)]
pub(super) struct Primary {
    pub host_index: usize,
    pub name: String,
    pub identity: SystemIdentity,
}

impl Server {
    pub fn primary(&self) -> Primary {
        Primary { host_index: self.host_index, name: self.name.clone(), identity: self.identity }
    }
}

/// The primaries among the hosts that may be followed, in the order in which they are tried.
pub(super) struct Candidates {
    pub servers: Vec<Server>,
    /// Said to people when there is more than one.
    pub alarm: Option<String>,
}

/// Asks every host; a standby is never followed.
///
/// # Errors
/// When no primary answers: what the first standby or the last host that failed said.
pub(super) async fn primaries(connect_config: &ConnectConfig) -> anyhow::Result<Vec<Server>> {
    primaries_but(connect_config, None).await
}

/// The primaries among the other hosts; one that does not answer is none.
pub(super) async fn other_primaries(connect_config: &ConnectConfig, followed: usize) -> Vec<Primary> {
    let servers = primaries_but(connect_config, Some(followed)).await.unwrap_or_default();
    let mut found = Vec::with_capacity(servers.len());
    for server in servers {
        found.push(server.primary());
        server.session.close().await;
    }
    found
}

async fn primaries_but(connect_config: &ConnectConfig, passed_over: Option<usize>) -> anyhow::Result<Vec<Server>> {
    let mut primaries: Vec<Server> = Vec::new();
    let mut last_error = None;
    for (host_index, host) in connect_config.hosts.iter().enumerate().filter(|(index, _)| Some(*index) != passed_over) {
        let name = host.to_string();
        match connect(connect_config, host_index).await {
            Ok((session, identity)) if !session.in_hot_standby() => {
                primaries.push(Server { session, host_index, name, identity });
            }
            Ok((session, _)) => {
                last_error.get_or_insert(anyhow::anyhow!("{name} is a standby"));
                session.close().await;
            }
            Err(error) => last_error = Some(anyhow::Error::new(error)),
        }
    }
    match primaries.is_empty() {
        true => Err(last_error.unwrap_or_else(|| anyhow::anyhow!("no host is configured"))),
        false => Ok(primaries),
    }
}

/// The highest timeline first: an old primary that came back after a fail-over is not followed. Nothing says which is the
/// right one of two on the same timeline, or of two before anything is stored.
///
/// # Errors
/// [`Conflict::TwoPrimaries`].
pub(super) fn in_order(mut servers: Vec<Server>, stored: Option<SystemId>) -> Result<Candidates, Conflict> {
    let all: Vec<Primary> = servers.iter().map(Server::primary).collect();
    let alarm = (all.len() > 1).then(|| described(&all));
    if stored.is_some_and(|stored| servers.iter().any(|s| s.identity.system_id == stored)) {
        servers.retain(|server| Some(server.identity.system_id) == stored);
    }
    servers.sort_by_key(|server| std::cmp::Reverse(server.identity.timeline));
    if let [first, second, ..] = servers.as_slice()
        && (stored.is_none() || first.identity.timeline == second.identity.timeline)
    {
        return Err(Conflict::TwoPrimaries(described(&servers.iter().map(Server::primary).collect::<Vec<_>>())));
    }
    Ok(Candidates { servers, alarm })
}

pub(super) fn described<'a>(primaries: impl IntoIterator<Item = &'a Primary>) -> String {
    let one = |primary: &Primary| {
        let SystemIdentity { system_id, timeline, .. } = primary.identity;
        format!("{} on timeline {timeline} of system {system_id}", primary.name)
    };
    primaries.into_iter().map(one).collect::<Vec<_>>().join(", ")
}

/// More than one primary answers: said once, and in the status as long as it lasts.
pub(super) fn raise_alarm(status: &watch::Sender<ArchiveStatus>, alarm: Option<String>) {
    status.send_if_modified(|s| {
        let changed = s.alarm != alarm;
        if let Some(primaries) = alarm.as_ref().filter(|_| changed) {
            tracing::error!(primaries, "more than one primary answers: the highest timeline is followed");
        }
        s.alarm = alarm;
        changed
    });
}

pub(super) async fn connect(
    config: &ConnectConfig,
    host_index: usize,
) -> Result<(Session, SystemIdentity), ReplicationError> {
    let mut session = Session::connect(config, host_index).await?;
    let identity = session.identify_system().await?;
    Ok((session, identity))
}
