//! The cluster of an environment, for verbs that must speak with it themselves.

use crate::config::Environment;
use crate::error::{Code, Failure};
use crate::replication::{ConnectConfig, ReplicationError, Session, SystemIdentity};

/// The one host that is a primary.
pub struct Primary {
    pub session: Session,
    pub identity: SystemIdentity,
    pub host: String,
}

/// Finds the primary among the configured hosts.
pub async fn primary(environment: &Environment, connect: &ConnectConfig) -> Result<Primary, Failure> {
    let mut found: Vec<Primary> = Vec::new();
    let mut last_failure = None;
    for (index, host) in connect.hosts.iter().enumerate() {
        let attempt = async {
            let mut session = Session::connect(connect, index).await?;
            let identity = session.identify_system().await?;
            Ok::<_, ReplicationError>(Primary { session, identity, host: host.to_string() })
        };
        match attempt.await {
            Ok(server) if server.session.in_hot_standby() => {
                server.session.close().await;
                let message = format!("find the primary of {}: {host} is a standby", environment.name);
                last_failure = Some(Failure::new(Code::Postgres, message));
            }
            Ok(server) => found.push(server),
            Err(error) => last_failure = Some(error.into()),
        }
    }
    if let [first, second, ..] = found.as_slice() {
        let message =
            format!("choose a primary of {}: both {} and {} are one", environment.name, first.host, second.host);
        return Err(Failure::new(Code::Conflict, message).hint("Name only the right one in `postgres`."));
    }
    let nobody = || Failure::new(Code::Postgres, format!("find the primary of {}: no host answers", environment.name));
    found.pop().ok_or_else(|| last_failure.unwrap_or_else(nobody))
}
