//! Servers within this process, for tests whose clock jumps: such a clock passes over the time that a socket's answer takes.
//!
//! A test and everything that it runs share one thread, and so one set of servers.

use std::cell::RefCell;
use std::collections::HashMap;
use std::io;
use std::path::{Path, PathBuf};

use tokio::io::DuplexStream;
use tokio::sync::mpsc;

/// As much as a socket takes before its writer waits.
const SOCKET_BYTES: usize = 64 << 10;
const WAITING_MAX: usize = 16;

thread_local! {
    static SERVERS: RefCell<HashMap<PathBuf, mpsc::Sender<DuplexStream>>> = RefCell::default();
}

/// Takes what is dialled at this path from now on, until the receiver is gone.
pub fn listen(path: PathBuf) -> mpsc::Receiver<DuplexStream> {
    let (sender, connections) = mpsc::channel(WAITING_MAX);
    SERVERS.with_borrow_mut(|servers| servers.insert(path, sender));
    connections
}

/// `None` when no such server was ever here.
pub(super) fn dial(path: &Path) -> Option<io::Result<DuplexStream>> {
    let server = SERVERS.with_borrow(|servers| servers.get(path).cloned())?;
    let (ours, theirs) = tokio::io::duplex(SOCKET_BYTES);
    let refused = |_| io::Error::from(io::ErrorKind::ConnectionRefused);
    Some(server.try_send(theirs).map(|()| ours).map_err(refused))
}
