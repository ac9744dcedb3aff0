//! What systemd is told (`sd_notify(3)`): lines of `KEY=value` in one datagram to the socket that `NOTIFY_SOCKET` names.

use std::io;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixDatagram};
use std::time::Duration;

/// The way to the service manager; without one, nothing is said.
#[derive(Debug)]
pub struct ServiceManager {
    socket: Option<(UnixDatagram, SocketAddr)>,
    watchdog: Option<Duration>,
}

impl ServiceManager {
    /// As the process environment says.
    pub fn from_environment() -> Self {
        let variable = |name: &str| std::env::var(name).ok().filter(|text| !text.is_empty());
        let watchdog_pid = variable("WATCHDOG_PID").and_then(|text| text.parse::<u32>().ok());
        let is_ours = watchdog_pid.is_none_or(|pid| pid == std::process::id());
        let watchdog = variable("WATCHDOG_USEC").filter(|_| is_ours).and_then(|text| text.parse().ok());
        let socket = variable("NOTIFY_SOCKET").and_then(|name| open(&name).ok());
        ServiceManager { socket, watchdog: watchdog.filter(|micros| *micros > 0).map(Duration::from_micros) }
    }

    /// The one that listens at this socket.
    #[cfg(test)]
    pub fn at(socket: &std::path::Path) -> Self {
        let socket = open(&socket.to_string_lossy()).expect("a socket");
        ServiceManager { socket: Some(socket), watchdog: None }
    }

    /// Within which time it wants to hear that we are well.
    pub fn watchdog(&self) -> Option<Duration> {
        self.watchdog
    }

    /// The service is up.
    pub fn ready(&self) {
        self.send("READY=1");
    }

    /// A sentence for `systemctl status`.
    pub fn status(&self, text: &str) {
        self.send(&format!("STATUS={}", text.replace('\n', " ")));
    }

    pub fn feed_watchdog(&self) {
        self.send("WATCHDOG=1");
    }

    /// The service ends, and may need so long.
    pub fn stopping(&self, at_most: Duration) {
        self.send(&format!("STOPPING=1\nEXTEND_TIMEOUT_USEC={}", at_most.as_micros()));
    }

    fn send(&self, lines: &str) {
        if let Some((socket, address)) = &self.socket
            && let Err(error) = socket.send_to_addr(lines.as_bytes(), address)
        {
            tracing::debug!(%error, "tell the service manager: failed");
        }
    }
}

/// A name that begins with `@` lies outside the file system.
fn open(name: &str) -> io::Result<(UnixDatagram, SocketAddr)> {
    let address = match name.strip_prefix('@') {
        Some(name) => SocketAddr::from_abstract_name(name)?,
        None => SocketAddr::from_pathname(name)?,
    };
    let socket = UnixDatagram::unbound()?;
    // A manager that does not read must not hold us up.
    socket.set_nonblocking(true)?;
    Ok((socket, address))
}
