//! `psql` for somebody who cannot reach the server's socket: a socket of their own stands before it.
//!
//! A fresh directory that only the caller can enter holds the socket; each connection to it becomes one through the daemon.
//! The directory goes when `psql` ends, however it ends. Ctrl-C is `psql`'s own business: it cancels a query.

use std::io;
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};
use std::process::ExitStatus;

use rustix::process::{Pid, Signal, kill_process};
use tokio::io::{AsyncRead, AsyncWrite, AsyncWriteExt, copy_bidirectional};
use tokio::net::{UnixListener, UnixStream};
use tokio::process::{Child, Command};
use tokio::signal::unix::{SignalKind, signal};
use tokio::task::JoinSet;

use crate::error::{Code, Failure};
use crate::operations::sandbox::proxy;
use crate::restore::recovery::{PORT, SOCKET_NAME_BYTES, SOCKET_PATH_BYTES_MAX};

/// What to start.
#[derive(Debug)]
pub struct Psql {
    pub program: PathBuf,
    pub user: String,
    pub database: String,
    pub arguments: Vec<String>,
}

/// The caller's own socket.
#[derive(Debug)]
struct Door {
    directory: PathBuf,
    listener: UnixListener,
}

/// Runs `psql` to its end. `connect` opens the way to the server, once for each of its connections.
///
/// # Errors
/// When it cannot be started.
pub async fn run<C, F, S>(psql: &Psql, connect: C) -> Result<ExitStatus, Failure>
where
    C: Fn() -> F,
    F: Future<Output = Result<S, Failure>> + Send + 'static,
    S: AsyncRead + AsyncWrite + Unpin + Send + 'static,
{
    let failed = |what: &str, error: io::Error| Failure::new(Code::Host, format!("{what}: {error}"));
    let door = Door::open().map_err(|error| failed("make a socket for psql", error))?;
    // Without these handlers a signal would end this process and leave the directory.
    let handler = |kind| signal(kind).map_err(|error| failed("take signals", error));
    let (mut interrupt, mut terminate) = (handler(SignalKind::interrupt())?, handler(SignalKind::terminate())?);
    let mut hangup = handler(SignalKind::hangup())?;
    let mut child = start(psql, &door.directory).map_err(|error| {
        failed(&format!("start {}", psql.program.display()), error).hint("Install PostgreSQL's client programs.")
    })?;
    let mut connections = JoinSet::new();
    let status = loop {
        tokio::select! {
            status = child.wait() => break status,
            accepted = door.listener.accept() => match accepted {
                Ok((stream, _)) => _ = connections.spawn(serve(stream, connect())),
                Err(error) => break Err(error),
            },
            Some(_) = connections.join_next() => {}
            // The terminal sends it to psql, too.
            _ = interrupt.recv() => {}
            _ = terminate.recv() => pass_on(&child, Signal::TERM),
            _ = hangup.recv() => pass_on(&child, Signal::HUP),
        }
    };
    connections.shutdown().await;
    status.map_err(|error| failed("wait for psql", error))
}

fn start(psql: &Psql, directory: &Path) -> io::Result<Child> {
    let mut command = Command::new(&psql.program);
    for (name, _) in std::env::vars_os().filter(|(name, _)| name.as_encoded_bytes().starts_with(b"PG")) {
        command.env_remove(name);
    }
    command.env("PGHOST", directory).env("PGPORT", PORT.to_string());
    command.env("PGUSER", &psql.user).env("PGDATABASE", &psql.database).args(&psql.arguments);
    command.kill_on_drop(true).spawn()
}

fn pass_on(child: &Child, signal: Signal) {
    if let Some(pid) = child.id().and_then(|id| i32::try_from(id).ok()).and_then(Pid::from_raw) {
        // It may have ended just now.
        let _ = kill_process(pid, signal);
    }
}

/// One connection of `psql`; what stands in its way is told to it as PostgreSQL would.
async fn serve<S>(mut stream: UnixStream, connect: impl Future<Output = Result<S, Failure>>)
where
    S: AsyncRead + AsyncWrite + Unpin,
{
    match connect.await {
        // Either side may break off: psql says so itself.
        Ok(mut server) => _ = copy_bidirectional(&mut stream, &mut server).await,
        Err(failure) => {
            let _ = stream.write_all(&proxy::refusal(&failure)).await;
            let _ = stream.shutdown().await;
        }
    }
}

impl Door {
    fn open() -> io::Result<Door> {
        let own = std::env::var_os("XDG_RUNTIME_DIR").map(PathBuf::from).filter(|own| own.is_dir());
        let name = format!("pgrecall-{:016x}", rand::random::<u64>());
        let fits =
            |base: &PathBuf| base.as_os_str().len() + 1 + name.len() + SOCKET_NAME_BYTES <= SOCKET_PATH_BYTES_MAX;
        let base = own.into_iter().chain([std::env::temp_dir()]).find(fits).unwrap_or_else(|| "/tmp".into());
        let directory = base.join(&name);
        std::fs::DirBuilder::new().mode(0o700).create(&directory)?;
        match UnixListener::bind(directory.join(format!(".s.PGSQL.{PORT}"))) {
            Ok(listener) => Ok(Door { directory, listener }),
            Err(error) => {
                let _ = std::fs::remove_dir(&directory);
                Err(error)
            }
        }
    }
}

impl Drop for Door {
    fn drop(&mut self) {
        let _ = std::fs::remove_dir_all(&self.directory);
    }
}

#[cfg(test)]
mod tests {
    use tokio::io::AsyncReadExt;

    use super::*;

    fn psql(script: &str) -> Psql {
        let arguments = vec!["-c".to_owned(), script.to_owned()];
        Psql { program: "/bin/sh".into(), user: "ann".into(), database: "shop".into(), arguments }
    }

    #[tokio::test]
    async fn what_is_started_finds_its_own_socket_which_is_gone_afterwards() {
        let kept = tempfile::NamedTempFile::new().expect("a file");
        let path = kept.path().display().to_string();
        let script = format!(
            "stat -c %a \"$PGHOST\" >{path}; test -S \"$PGHOST/.s.PGSQL.$PGPORT\" && \
             printf '%s %s %s\\n' \"$PGHOST\" \"$PGUSER\" \"$PGDATABASE\" >>{path}; exit 3"
        );
        let nobody = || async { Err::<UnixStream, _>(Failure::new(Code::Internal, "not asked")) };
        let status = run(&psql(&script), nobody).await.expect("it ran");
        assert_eq!(status.code(), Some(3));
        let told = std::fs::read_to_string(kept.path()).expect("read");
        let (mode, rest) = told.split_once('\n').expect("two lines");
        let (directory, rest) = rest.split_once(' ').expect("a directory");
        assert_eq!((mode, rest), ("700", "ann shop\n"));
        assert!(!Path::new(directory).exists());
    }

    #[tokio::test]
    async fn each_connection_goes_its_own_way_and_a_refusal_is_heard() {
        let door = Door::open().expect("a door");
        let path = door.directory.join(".s.PGSQL.5432");
        let (mut ours, theirs) = tokio::io::duplex(64);
        let mut client = UnixStream::connect(&path).await.expect("connect");
        let (stream, _) = door.listener.accept().await.expect("accept");
        let serving = tokio::spawn(serve(stream, async { Ok(theirs) }));
        client.write_all(b"ping").await.expect("write");
        let mut heard = [0; 4];
        ours.read_exact(&mut heard).await.expect("read");
        assert_eq!(&heard, b"ping");
        drop(client);
        drop(ours);
        serving.await.expect("it ends with both");

        let mut client = UnixStream::connect(&path).await.expect("connect");
        let (stream, _) = door.listener.accept().await.expect("accept");
        serve(stream, async { Err::<UnixStream, _>(Failure::new(Code::NotFound, "find it").hint("Look.")) }).await;
        let mut told = Vec::new();
        client.read_to_end(&mut told).await.expect("read");
        let told = String::from_utf8_lossy(&told).into_owned();
        assert!(told.starts_with('E') && told.contains("Mfailed to find it\0HLook.\0"), "{told:?}");
    }
}
