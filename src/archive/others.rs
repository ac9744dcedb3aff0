//! Whether another host has become a primary while one is followed: then there are two, and the higher timeline counts.

use tokio::sync::watch;
use tokio_util::sync::CancellationToken;

use super::servers::{self, Primary};
use super::status::ArchiveStatus;
use crate::pg::TimelineId;
use crate::replication::ConnectConfig;

/// What is watched beside a stream.
pub(super) struct Others {
    pub connect: ConnectConfig,
    pub followed: Primary,
    /// The timeline that is streamed.
    pub timeline: TimelineId,
    /// Primaries that were considered when this one was chosen.
    pub considered: Vec<Primary>,
    pub interval: std::time::Duration,
    pub status: watch::Sender<ArchiveStatus>,
}

impl Others {
    /// Looks again and again until `leave` fires; fires it when a primary on a higher timeline has appeared.
    ///
    /// Cancel safety: dropping this future loses nothing.
    pub async fn run(self, leave: CancellationToken) {
        if self.connect.hosts.len() < 2 {
            return;
        }
        let watching = async {
            loop {
                tokio::time::sleep(self.interval).await;
                let others = servers::other_primaries(&self.connect, self.followed.host_index).await;
                let alarm =
                    (!others.is_empty()).then(|| servers::described(std::iter::once(&self.followed).chain(&others)));
                servers::raise_alarm(&self.status, alarm);
                if others.iter().any(|other| self.outranks(other)) {
                    return;
                }
            }
        };
        tokio::select! {
            biased;
            () = leave.cancelled() => {}
            () = watching => leave.cancel(),
        }
    }

    /// One that was considered, and not followed, would not be followed now.
    fn outranks(&self, other: &Primary) -> bool {
        let known = |considered: &Primary| {
            (considered.host_index, considered.identity.timeline) == (other.host_index, other.identity.timeline)
        };
        other.identity.system_id == self.followed.identity.system_id
            && other.identity.timeline > self.timeline
            && !self.considered.iter().any(known)
    }
}
