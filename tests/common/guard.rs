//! A small process that outlives the test process, and ends what that one started and could not end itself.
//!
//! The test process holds the writing end of a pipe. When it is gone (done, panicked, killed), the pipe closes; the guard
//! kills the processes and removes the directories that were still on its list, and ends.

use std::io::Write;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, Command, Stdio};
use std::sync::{Mutex, OnceLock};

const SCRIPT: &str = r#"
declare -A pids dirs
while read -r word value; do
    case $word in
        +pid) pids[$value]=1 ;;
        -pid) unset "pids[$value]" ;;
        +dir) dirs[$value]=1 ;;
        -dir) unset "dirs[$value]" ;;
    esac
done
for pid in "${!pids[@]}"; do
    kill -KILL $(ps -o pid= --ppid "$pid") "$pid" 2>/dev/null
done
for dir in "${!dirs[@]}"; do rm -rf -- "$dir" || { sleep 0.5; rm -rf -- "$dir"; }; done
"#;

fn tell(word: &str, value: &str) {
    static GUARD: OnceLock<Mutex<(Child, ChildStdin)>> = OnceLock::new();
    let guard = GUARD.get_or_init(|| {
        use std::os::unix::process::CommandExt;
        let mut child = Command::new("bash")
            .args(["-c", SCRIPT])
            .current_dir("/")
            .process_group(0)
            .stdin(Stdio::piped())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .spawn()
            .expect("start the guard (bash)");
        let pipe = child.stdin.take().expect("the pipe was asked for");
        Mutex::new((child, pipe))
    });
    let mut guard = guard.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    writeln!(guard.1, "{word} {value}").expect("write to the guard");
}

/// A child process that does not survive this value.
pub struct Process {
    child: Child,
    ended: Option<std::process::ExitStatus>,
}

impl Process {
    /// Starts the command and puts it on the guard's list.
    pub fn spawn(command: &mut Command) -> Process {
        let child = command.spawn().unwrap_or_else(|e| panic!("start {command:?}: {e}"));
        tell("+pid", &child.id().to_string());
        Process { child, ended: None }
    }

    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// How it ended, or `None` while it runs.
    pub fn ended(&mut self) -> Option<std::process::ExitStatus> {
        if self.ended.is_none() {
            self.ended = self.child.try_wait().expect("ask for a child's state");
            if self.ended.is_some() {
                tell("-pid", &self.child.id().to_string());
            }
        }
        self.ended
    }

    /// Sends a signal by name, such as `TERM`, `KILL`, `STOP`, `CONT`.
    pub fn signal(&mut self, name: &str) {
        if self.ended().is_none() {
            signal(self.pid(), name);
        }
    }

    /// Waits for its end; fails the test after `seconds`.
    pub fn wait(&mut self, seconds: u64) -> std::process::ExitStatus {
        let what = format!("the end of process {}", self.pid());
        super::wait::for_value(&what, seconds, || self.ended())
    }

    /// Kills it at once, with its direct children, and waits.
    pub fn kill(&mut self) {
        if self.ended().is_none() {
            // Stopped first, so that it starts no further child between the listing and the kill.
            signal(self.pid(), "STOP");
            let children = children(self.pid());
            for child in &children {
                signal(*child, "KILL");
            }
            signal(self.pid(), "KILL");
            self.wait(30);
            // They hold shared memory and files until they are gone.
            super::wait::until("the end of its children", 30, || !children.iter().any(|child| is_alive(*child)));
        }
    }
}

impl Drop for Process {
    fn drop(&mut self) {
        if std::thread::panicking() {
            // A second panic would hide the first.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| self.kill()));
        } else {
            self.kill();
        }
    }
}

/// Sends a signal to a process by its id; a process that is gone is no error.
pub fn signal(pid: u32, name: &str) {
    use rustix::process::{Pid, Signal, kill_process};
    let signal = match name {
        "TERM" => Signal::TERM,
        "KILL" => Signal::KILL,
        "STOP" => Signal::STOP,
        "CONT" => Signal::CONT,
        "INT" => Signal::INT,
        "QUIT" => Signal::QUIT,
        "HUP" => Signal::HUP,
        other => panic!("unknown signal {other}"),
    };
    if let Some(pid) = i32::try_from(pid).ok().and_then(Pid::from_raw) {
        let _ = kill_process(pid, signal);
    }
}

/// Whether a process exists and is not merely waiting to be noticed by its parent.
fn is_alive(pid: u32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(") ").is_some_and(|(_, rest)| !rest.starts_with(['Z', 'X']))
}

/// The direct children of a process.
pub fn children(pid: u32) -> Vec<u32> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir("/proc").expect("list /proc").flatten() {
        let Some(id) = entry.file_name().to_str().and_then(|n| n.parse::<u32>().ok()) else { continue };
        let Ok(stat) = std::fs::read_to_string(entry.path().join("stat")) else { continue };
        let parent = stat.rsplit_once(')').and_then(|(_, rest)| rest.split_whitespace().nth(1));
        if parent.and_then(|p| p.parse().ok()) == Some(pid) {
            found.push(id);
        }
    }
    found
}

/// A temporary directory with a short path (Unix sockets allow 107 bytes), removed with this value.
pub struct Directory(Option<tempfile::TempDir>, PathBuf);

impl Directory {
    pub fn new(prefix: &str) -> Directory {
        let base = std::env::var_os("PGRECALL_TEST_TMP").map_or_else(std::env::temp_dir, PathBuf::from);
        let dir = tempfile::Builder::new().prefix(&format!("pgrecall-{prefix}-")).tempdir_in(base);
        let dir = dir.expect("make a temporary directory");
        let path = dir.path().to_owned();
        tell("+dir", &path.display().to_string());
        Directory(Some(dir), path)
    }

    pub fn path(&self) -> &Path {
        &self.1
    }

    pub fn join(&self, name: impl AsRef<Path>) -> PathBuf {
        self.1.join(name)
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        if std::env::var_os("PGRECALL_TEST_KEEP").is_some() {
            tell("-dir", &self.1.display().to_string());
            self.0.take().map(tempfile::TempDir::keep);
        } else if let Some(dir) = self.0.take() {
            // What dies slowly may still write; the guard tries again in the end.
            if dir.close().is_ok() {
                tell("-dir", &self.1.display().to_string());
            }
        }
    }
}

/// A port of the loopback interface that is free now.
pub fn free_port() -> u16 {
    let socket = std::net::TcpListener::bind(("127.0.0.1", 0)).expect("bind a loopback port");
    socket.local_addr().expect("the port that was bound").port()
}
