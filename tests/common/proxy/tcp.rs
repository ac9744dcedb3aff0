//! A proxy for connections to PostgreSQL.

use std::path::PathBuf;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream, UnixStream};
use tokio::sync::watch;

use super::super::postgres::Cluster;

struct State {
    socket: PathBuf,
    refuse: AtomicBool,
    connections: AtomicU64,
    /// Bytes from the server to clients, of all connections.
    received: AtomicU64,
    /// The count of such bytes at which every connection is cut.
    cut_at: AtomicU64,
    /// Rises when all connections are to be cut.
    cuts: watch::Sender<u64>,
    paused: watch::Sender<bool>,
}

/// Listens on a loopback port and forwards to a server's Unix socket.
pub struct TcpProxy {
    port: u16,
    state: Arc<State>,
    task: tokio::task::JoinHandle<()>,
}

impl TcpProxy {
    pub fn start(cluster: &Cluster) -> TcpProxy {
        let socket = cluster.socket_dir().join(format!(".s.PGSQL.{}", cluster.port()));
        let state = Arc::new(State {
            socket,
            refuse: AtomicBool::new(false),
            connections: AtomicU64::new(0),
            received: AtomicU64::new(0),
            cut_at: AtomicU64::new(u64::MAX),
            cuts: watch::Sender::new(0),
            paused: watch::Sender::new(false),
        });
        let listener = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("bind a loopback port");
        let port = listener.local_addr().unwrap().port();
        listener.set_nonblocking(true).unwrap();
        let task = super::runtime().spawn(listen(listener, Arc::clone(&state)));
        TcpProxy { port, state, task }
    }

    pub fn port(&self) -> u16 {
        self.port
    }

    /// A connection string through the proxy.
    pub fn conninfo(&self) -> String {
        format!("host=127.0.0.1 port={} user=postgres dbname=postgres", self.port)
    }

    /// Cuts every connection; new ones are taken.
    pub fn cut(&self) {
        self.state.cuts.send_modify(|n| *n += 1);
    }

    /// Whether new connections are closed at once.
    pub fn refuse(&self, refuse: bool) {
        self.state.refuse.store(refuse, Ordering::SeqCst);
    }

    /// Holds all bytes back, in both directions, as a network does that swallows packets.
    pub fn pause(&self, pause: bool) {
        self.state.paused.send_replace(pause);
    }

    /// Cuts every connection once the server has sent this many bytes more.
    pub fn cut_after(&self, bytes: u64) {
        let now = self.state.received.load(Ordering::SeqCst);
        self.state.cut_at.store(now + bytes, Ordering::SeqCst);
    }

    /// Bytes that the server has sent through the proxy.
    pub fn received(&self) -> u64 {
        self.state.received.load(Ordering::SeqCst)
    }

    /// Connections made so far.
    pub fn connections(&self) -> u64 {
        self.state.connections.load(Ordering::SeqCst)
    }
}

impl Drop for TcpProxy {
    fn drop(&mut self) {
        self.task.abort();
        self.cut();
    }
}

async fn listen(listener: std::net::TcpListener, state: Arc<State>) {
    let listener = TcpListener::from_std(listener).expect("a listener of the runtime");
    loop {
        let Ok((client, _)) = listener.accept().await else { continue };
        if !state.refuse.load(Ordering::SeqCst) {
            state.connections.fetch_add(1, Ordering::SeqCst);
            tokio::spawn(forward(client, Arc::clone(&state)));
        }
    }
}

async fn forward(client: TcpStream, state: Arc<State>) {
    let mut cuts = state.cuts.subscribe();
    let Ok(server) = UnixStream::connect(&state.socket).await else { return };
    let _ = client.set_nodelay(true);
    let (client_in, client_out) = client.into_split();
    let (server_in, server_out) = server.into_split();
    tokio::select! {
        _ = cuts.changed() => {}
        () = copy(client_in, server_out, &state, false) => {}
        () = copy(server_in, client_out, &state, true) => {}
    }
}

async fn copy(mut from: impl AsyncRead + Unpin, mut to: impl AsyncWrite + Unpin, state: &State, counted: bool) {
    let mut buffer = vec![0; 32 * 1024];
    let mut paused = state.paused.subscribe();
    loop {
        let read = match from.read(&mut buffer).await {
            Ok(0) | Err(_) => return,
            Ok(read) => read,
        };
        if paused.wait_for(|paused| !paused).await.is_err() {
            return;
        }
        let mut bytes = &buffer[..read];
        if counted {
            let before = state.received.fetch_add(read as u64, Ordering::SeqCst);
            let limit = state.cut_at.load(Ordering::SeqCst);
            if before + read as u64 >= limit {
                bytes = &bytes[..usize::try_from(limit.saturating_sub(before)).unwrap().min(read)];
                let _ = to.write_all(bytes).await;
                state.cut_at.store(u64::MAX, Ordering::SeqCst);
                state.cuts.send_modify(|n| *n += 1);
                return;
            }
        }
        if to.write_all(bytes).await.is_err() {
            return;
        }
    }
}
