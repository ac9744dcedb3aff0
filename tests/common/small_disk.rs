//! A file system of a few megabytes, seen by one process alone.

use std::path::Path;
use std::process::Command;

/// Mounts a file system of `$1` MiB at `$2`, and becomes the rest as the user that calls. Ends with 125 when it cannot be mounted.
const SCRIPT: &str = r#"
size=$1 place=$2 user=$3 group=$4; shift 4
mount -t tmpfs -o size="$size"m,mode=0777 tmpfs "$place" || exit 125
exec unshare -U --map-user="$user" --map-group="$group" "$@"
"#;

/// The command as one that sees such a file system at `place`, a directory.
pub fn within(command: &Command, place: &Path, mib: u32) -> Command {
    let mut inside = Command::new("unshare");
    inside.args(["-rm", "sh", "-c", SCRIPT, "sh", &mib.to_string()]).arg(place);
    let (user, group) = (rustix::process::getuid().as_raw(), rustix::process::getgid().as_raw());
    inside.args([user.to_string(), group.to_string()]).arg(command.get_program()).args(command.get_args());
    inside.env_clear().envs(command.get_envs().filter_map(|(name, value)| Some((name, value?))));
    if let Some(dir) = command.get_current_dir() {
        inside.current_dir(dir);
    }
    inside
}

/// Whether the kernel lets this user have one.
pub fn is_possible(place: &Path) -> bool {
    within(&Command::new("true"), place, 1).output().is_ok_and(|done| done.status.success())
}
