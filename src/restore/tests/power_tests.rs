//! What a power cut may take: everything that was not synced. `strace` records what a process does to its files.
//!
//! A file's content is there after the cut when it was synced after the last write to it; a name when its directory was
//! synced after the name was made, and so up to the first directory that had been there before. A file system may keep more,
//! never less: what holds for these holds for every cut that is possible.

use std::collections::{BTreeMap, HashMap};
use std::path::{Path, PathBuf};
use std::process::Command;

use super::*;

const TRACED: &str = "PGRECALL_TRACED";
const CALLS: &str = "openat,write,pwrite64,writev,pwritev,ftruncate,fallocate,copy_file_range,fsync,fdatasync,syncfs,\
    rename,renameat,renameat2,link,linkat,symlink,symlinkat,mkdir,mkdirat,unlink,unlinkat";
/// Opened by the traced process to say how far it is; never there.
const MARK: &str = "/pgrecall-mark/";

/// The process that is traced; by itself it does nothing.
#[tokio::test]
async fn the_traced_process() {
    let Some(folder) = std::env::var_os(TRACED).map(PathBuf::from) else { return };
    let mark = |what: &str| drop(std::fs::File::open(format!("{MARK}{what}")));
    let location = crate::repository::Location::File(folder.join("new/repository"));
    let settings = crate::repository::store::StoreSettings::default();
    let store = crate::repository::Store::open(&location, "shop", settings).expect("open");
    let dir = tempfile::tempdir_in(&folder).expect("temporary directory");
    // The place itself was there before.
    crate::util::durable_fs::sync_directory(&folder).expect("sync");
    let world = World::over(store, dir, None).await;
    world.fill().await;
    mark("stored");
    let plan = world.plan(stop(0x80_5000)).await.expect("plan");
    world.restore(&plan, "data").await.expect("restore");
    mark("restored");
    world.assert_restored("data", &files());
}

/// One thing in the file system.
#[derive(Debug, Clone, Copy, Default)]
struct Node {
    changed: u64,
    synced: u64,
}

#[derive(Debug, Default)]
struct Disk {
    now: u64,
    nodes: Vec<Node>,
    /// Name, what it is a name of, since when.
    names: BTreeMap<PathBuf, (usize, u64)>,
    /// Last sync of a directory, by its path.
    directories: HashMap<PathBuf, u64>,
    synced_all: u64,
    marks: Vec<String>,
    problems: Vec<String>,
}

impl Disk {
    fn make(&mut self, path: &Path) -> usize {
        if let Some((node, _)) = self.names.get(path) {
            return *node;
        }
        self.nodes.push(Node { changed: self.now, synced: 0 });
        self.names.insert(path.to_owned(), (self.nodes.len() - 1, self.now));
        self.nodes.len() - 1
    }

    fn write(&mut self, path: &Path) {
        if self.names.contains_key(path) {
            let node = self.make(path);
            self.nodes[node].changed = self.now;
        }
    }

    fn sync(&mut self, path: &Path, begun: u64) {
        if let Some((node, _)) = self.names.get(path) {
            let synced = &mut self.nodes[*node].synced;
            *synced = begun.max(*synced);
        }
        self.directories.insert(path.to_owned(), begun);
    }

    /// Whether a cut now leaves the whole of `path`; names that were there before the trace stay.
    fn keeps(&self, path: &Path) -> bool {
        let content = self.names.get(path).is_none_or(|(node, _)| {
            let node = self.nodes[*node];
            node.synced >= node.changed || self.synced_all >= node.changed
        });
        let named = path.ancestors().all(|name| {
            let since = self.names.get(name).map_or(0, |(_, since)| *since);
            let synced = name.parent().and_then(|parent| self.directories.get(parent)).copied().unwrap_or(0);
            since <= synced.max(self.synced_all)
        });
        content && named
    }

    fn lost_below(&self, folder: &str, but: &[&str]) -> Vec<PathBuf> {
        let below = self.names.keys().filter(|path| path.to_string_lossy().contains(folder));
        let looked = below.filter(|path| !but.iter().any(|text| path.to_string_lossy().contains(text)));
        looked.filter(|path| !self.keeps(path)).cloned().collect()
    }

    /// What must hold after every single call.
    fn check(&mut self, made: &Path) {
        let text = made.to_string_lossy().into_owned();
        let Some((root, inside)) = text.split_once("/data/") else { return };
        if inside == "global/pg_control" {
            let lost = self.lost_below("/data", &["global/pg_control", "state.json"]);
            if !lost.is_empty() {
                self.problems.push(format!("a server could start although a cut takes {lost:?}"));
            }
        } else if !inside.starts_with(target::FOLDER) {
            let marker = PathBuf::from(root).join("data").join(target::FOLDER).join("state.json");
            if !self.names.contains_key(&marker) || !self.keeps(&marker) {
                self.problems.push(format!("{inside} is made before the marker would outlast a cut"));
            }
        }
    }

    /// One call: its name, its arguments, when it was begun.
    fn call(&mut self, name: &str, arguments: &str, begun: u64) {
        let quoted: Vec<&Path> = arguments.split('"').skip(1).step_by(2).map(Path::new).collect();
        let of_descriptor = arguments.split_once('<').and_then(|(_, rest)| rest.split_once('>'));
        let of_descriptor = of_descriptor.map(|(path, _)| PathBuf::from(path));
        match (name, quoted.as_slice(), of_descriptor) {
            ("openat", [path], _) if path.starts_with(MARK) => {
                self.marks.push(path.to_string_lossy().into_owned());
                let folder = if path.ends_with("stored") { "/new" } else { "/data" };
                let lost = self.lost_below(folder, &[]);
                if !lost.is_empty() {
                    self.problems.push(format!("{} was said, but a cut takes {lost:?}", path.display()));
                }
            }
            ("openat", [path], _) if arguments.contains("O_CREAT") => {
                self.make(path);
                self.check(path);
            }
            ("mkdir" | "mkdirat", [path, ..], _) => {
                let node = self.make(path);
                // A directory's entries are names of their own.
                self.nodes[node].synced = u64::MAX;
                self.check(path);
            }
            ("symlink" | "symlinkat", [_, path], _) => {
                let node = self.make(path);
                self.nodes[node].synced = u64::MAX;
                self.check(path);
            }
            ("unlink" | "unlinkat", [path, ..], _) => drop(self.names.remove(*path)),
            ("rename" | "renameat" | "renameat2", [from, to], _) => {
                if let Some((node, _)) = self.names.remove(*from) {
                    self.names.insert(to.to_path_buf(), (node, self.now));
                    self.check(to);
                }
            }
            ("link" | "linkat", [from, to], _) => {
                if let Some((node, _)) = self.names.get(*from).copied() {
                    self.names.insert(to.to_path_buf(), (node, self.now));
                }
            }
            ("fsync" | "fdatasync", _, Some(path)) => self.sync(&path, begun),
            ("syncfs", _, Some(_)) => self.synced_all = begun.max(self.synced_all),
            (_, _, Some(path)) => self.write(&path),
            _ => {}
        }
    }

    /// Lines of `strace -f -y`; a call that others interrupt stands in two.
    fn read(log: &str) -> Disk {
        let (mut disk, mut unfinished) = (Disk::default(), HashMap::<&str, (String, u64)>::new());
        for line in log.lines() {
            disk.now += 1;
            let Some((pid, rest)) = line.split_once(' ') else { continue };
            let rest = rest.trim_start();
            if let Some(first) = rest.strip_suffix(" <unfinished ...>") {
                unfinished.insert(pid, (first.to_owned(), disk.now));
                continue;
            }
            let (text, begun) = match rest.strip_prefix("<... ").and_then(|r| r.split_once(" resumed>")) {
                Some((_, end)) => match unfinished.remove(pid) {
                    Some((first, begun)) => (first + end, begun),
                    None => continue,
                },
                None => (rest.to_owned(), disk.now),
            };
            let failed = text.rsplit_once(" = ").is_none_or(|(_, result)| result.starts_with("-1"));
            let Some((name, arguments)) = text.split_once('(') else { continue };
            if !failed || arguments.contains(MARK) {
                disk.call(name, arguments, begun);
            }
        }
        disk
    }
}

#[test]
fn what_was_reported_outlasts_a_power_cut_and_an_unfinished_restore_is_seen_to_be_one() {
    let folder = tempfile::tempdir().expect("temporary directory");
    let log = folder.path().join("log");
    let own = std::env::current_exe().expect("this program");
    let mut strace = Command::new("strace");
    strace.args(["-f", "-y", "-qq", "-s", "0", "-e", &format!("trace={CALLS}"), "-o"]).arg(&log).arg(own);
    strace.args(["--exact", "restore::tests::power_tests::the_traced_process"]).env(TRACED, folder.path());
    let ran = match strace.output() {
        Ok(ran) => ran,
        Err(error) => panic!("strace does not run ({error}): scripts/setup-tests installs it"),
    };
    assert!(ran.status.success(), "{}{}", String::from_utf8_lossy(&ran.stdout), String::from_utf8_lossy(&ran.stderr));
    let disk = Disk::read(&std::fs::read_to_string(&log).expect("a log"));
    assert_eq!(disk.marks.len(), 2, "{:?}", disk.marks);
    assert!(disk.names.len() > 60, "{} names were seen", disk.names.len());
    assert!(disk.problems.is_empty(), "{:#?}", disk.problems);
}
