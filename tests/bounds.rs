//! What is bounded: the room that a restore takes, and the memory for many relations.

use std::path::Path;
use std::process::{Command, Stdio};

use crate::common::guard::{Directory, Process};
use crate::common::pgrecall::{Answer, Environment, Pgrecall, Store};
use crate::common::postgres::{Cluster, run};
use crate::common::{NEWEST, compare, slow, wait};

/// Mounts a file system of `$1` MiB at `$2`, seen by nobody else, and runs the rest there as the user that calls. Ends with 124
/// when that leaves something in it, with 125 when it cannot be mounted.
const IN_SMALL_FILE_SYSTEM: &str = r#"
size=$1 place=$2 user=$3 group=$4; shift 4
mount -t tmpfs -o size="$size"m,mode=0777 tmpfs "$place" || exit 125
unshare -U --map-user="$user" --map-group="$group" "$@"; status=$?
[ $status = 0 ] || [ -z "$(ls -A "$place")" ] || exit 124
exit $status
"#;

/// A command of this host in such a file system; `None` where the kernel lets no ordinary user mount one.
fn in_small_file_system(host: &Pgrecall, place: &Path, mib: u32, args: &[&str]) -> Option<Answer> {
    let command = host.command(args);
    let mut inside = Command::new("unshare");
    inside.args(["-rm", "sh", "-c", IN_SMALL_FILE_SYSTEM, "sh", &mib.to_string()]).arg(place);
    let (user, group) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    inside.args([user.to_string(), group.to_string()]).arg(command.get_program()).args(command.get_args());
    inside.env_clear().envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    let done = inside.current_dir(host.scratch()).stdin(Stdio::null()).output().expect("run unshare");
    let text = |bytes: Vec<u8>| String::from_utf8_lossy(&bytes).into_owned();
    let (status, stdout, stderr) = (done.status.code().unwrap_or(-1), text(done.stdout), text(done.stderr));
    let denied = stderr.contains("unshare: ") || status == 125;
    (!denied).then_some(Answer { status, stdout, stderr })
}

#[test]
fn a_disk_too_small_is_said_before_anything_is_fetched() {
    let (cluster, dir) = (Cluster::start_new(NEWEST), Directory::new("small"));
    let store = dir.join("repository");
    let mut host = Pgrecall::new(&[Environment::new("shop", Store::Directory(store.clone())).cluster(&cluster)]);
    host.start(&[&cluster]);
    host.wait_for_backup("shop");
    host.wait_stored(&cluster, cluster.flush_lsn());
    host.stop();
    let place = dir.join("disk");
    std::fs::create_dir(&place).unwrap();
    let data = place.join("data").display().to_string();
    // Nothing could be fetched: whoever tried would say that.
    let (here, away) = (store.join("shop"), dir.join("packs"));
    run(Command::new("cp").arg("-a").arg(&here).arg(&away));
    run(Command::new("find").arg(&here).args(["-name", "*.pack", "-delete"]));

    let Some(planned) = in_small_file_system(&host, &place, 100, &["plan", "shop", "--into", &data]) else {
        println!("not checked: the kernel lets no ordinary user mount a file system");
        return;
    };
    let missing = format!("free on {} (for {data})", place.display());
    assert!(planned.stdout.contains("missing   disk space: ") && planned.stdout.contains(&missing), "{planned:?}");
    for more in [&[][..], &["--no-start"]] {
        let restore = [&["restore", "shop", "--into", &data], more].concat();
        let refused = in_small_file_system(&host, &place, 100, &restore).expect("as before");
        assert!(refused.status == 9 && refused.stderr.contains(&missing), "{refused:?}");
        assert!(refused.stderr.contains("Make room"), "{refused:?}");
    }

    std::fs::remove_dir_all(&here).unwrap();
    std::fs::rename(&away, &here).unwrap();
    let restore = ["restore", "shop", "--into", &data, "--no-start"];
    let restored = in_small_file_system(&host, &place, 400, &restore).expect("as before");
    assert_eq!(restored.status, 0, "{restored:?}");
}

/// The most memory that a process has had, in bytes; `None` when it has ended.
fn peak_bytes(pid: u32) -> Option<u64> {
    let status = std::fs::read_to_string(format!("/proc/{pid}/status")).ok()?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"))?;
    Some(line.trim().trim_end_matches(" kB").parse::<u64>().expect("a number") * 1024)
}

/// Runs a command to its end; gives the most memory that it was seen to have.
fn peak_of(command: &mut Command) -> u64 {
    let mut process = Process::spawn(command.stdout(Stdio::null()).stderr(Stdio::null()));
    let mut peak = 0;
    let status = wait::for_value("the command to end", 600, || {
        peak = peak_bytes(process.pid()).unwrap_or(peak);
        process.ended()
    });
    assert!(status.success(), "{command:?}: {status}");
    peak
}

fn files_below(place: &Path) -> usize {
    let entries = std::fs::read_dir(place).into_iter().flatten().flatten();
    entries.map(|e| if e.path().is_dir() { files_below(&e.path()) } else { 1 }).sum()
}

/// 20 000 relations, with `PGRECALL_SLOW=1` 100 000.
#[test]
fn many_relations_are_backed_up_and_restored_within_the_memory_and_after_a_kill() {
    const MEMORY_MAX: u64 = 256 << 20;
    let tables = if slow() { 50_000 } else { 10_000 };
    let (cluster, dir) = (Cluster::start_new(NEWEST), Directory::new("many"));
    for first in (0..tables).step_by(1000) {
        cluster.query(&format!(
            "DO $$ BEGIN FOR n IN {first}..{first} + 999 LOOP \
             EXECUTE format('CREATE TABLE t%s AS SELECT %s AS n; CREATE INDEX ON t%s (n)', n, n, n); END LOOP; END $$"
        ));
    }
    let store = Store::Directory(dir.join("repository"));
    let mut host = Pgrecall::new(&[Environment::new("shop", store).cluster(&cluster)]);
    host.start(&[&cluster]);
    host.wait_for_backup("shop");
    host.wait_stored(&cluster, cluster.flush_lsn());
    let daemon_peak = peak_bytes(host.daemon().pid()).expect("it runs");
    let expected = compare::fingerprint(&cluster);
    host.stop();
    let files = host.json(&["backups", "shop"])["backups"][0]["files"].as_u64().expect("a number");
    assert!(files > 2 * tables, "{files} files");

    let into = dir.join("restored");
    let shown = into.display().to_string();
    let restore = ["restore", "shop", "--into", &shown, "--no-start"];
    let mut broken_off = Process::spawn(host.command(&restore).stdout(Stdio::null()).stderr(Stdio::null()));
    wait::until("some files to be restored", 60, || files_below(&into) > 1000);
    broken_off.kill();
    assert!(!into.join("global/pg_control").exists(), "it was killed on the way");
    let restore_peak = peak_of(&mut host.command(&restore));
    println!("{tables} tables, {files} files: backup {} MiB, restore {} MiB", daemon_peak >> 20, restore_peak >> 20);
    assert!(daemon_peak < MEMORY_MAX && restore_peak < MEMORY_MAX);

    let mut copy = Cluster::adopt(NEWEST, &into);
    copy.start();
    copy.wait_writable();
    compare::assert_same(&expected, &compare::fingerprint(&copy));
}
