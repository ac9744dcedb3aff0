//! As whom a restored cluster is reached.

use std::path::Path;
use std::time::Duration;

use crate::instance::{Address, Session};
use crate::pg::page::PAGE_BYTES;
use crate::pg::roles::{Role, roles_file, roles_of_page};

/// A page or two hold the roles of most clusters; more than this is not looked at.
const FILE_BYTES_MAX: u64 = 64 << 20;

const LIMIT: Duration = Duration::from_secs(5);

/// The address with a role that the server knows: the one wished for, or else one of the superusers in the directory.
/// `None` while none of them gets a session.
pub async fn known_role(address: &Address, database: &str, data_directory: &Path) -> Option<Address> {
    if Session::open(address, database, LIMIT).await.is_ok() {
        return Some(address.clone());
    }
    for user in superusers(data_directory) {
        let other = Address { user, ..address.clone() };
        if Session::open(&other, database, LIMIT).await.is_ok() {
            tracing::info!(user = %other.user, "the cluster has no role {}, use another superuser", address.user);
            return Some(other);
        }
    }
    None
}

/// Names of superusers that may log in, the one that `initdb` made first. Empty when the files cannot be read.
pub fn superusers(data_directory: &Path) -> Vec<String> {
    let read = || {
        let global = data_directory.join("global");
        let file = roles_file(&std::fs::read(global.join("pg_filenode.map")).ok()?)?;
        let path = global.join(file.to_string());
        let small = std::fs::metadata(&path).ok()?.len() <= FILE_BYTES_MAX;
        small.then(|| std::fs::read(path).ok()).flatten()
    };
    let bytes = read().unwrap_or_default();
    let mut roles: Vec<Role> = bytes.chunks(PAGE_BYTES).flat_map(roles_of_page).collect();
    roles.retain(|role| role.is_superuser && role.can_login);
    roles.sort();
    let mut names: Vec<String> = roles.into_iter().map(|role| role.name).collect();
    names.dedup();
    names
}
