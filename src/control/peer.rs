//! Who is at the other end of a connection: the kernel's word, taken when the connection was made.

use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd};

use tokio::net::UnixStream;

use crate::daemon::access::Peer;

/// More groups than the kernel gives anybody: `NGROUPS_MAX`.
const GROUPS_MAX: usize = 65_536;

/// The peer's user, process, and all of its groups.
///
/// # Errors
/// When the kernel does not say; nobody is let in then.
pub fn peer(stream: &UnixStream) -> io::Result<Peer> {
    let credentials = stream.peer_cred()?;
    let mut groups = supplementary_groups(stream.as_fd())?;
    if !groups.contains(&credentials.gid()) {
        groups.push(credentials.gid());
    }
    Ok(Peer { uid: credentials.uid(), pid: credentials.pid(), groups })
}

/// `SO_PEERGROUPS` (Linux 4.13). No crate wraps it safely; asking `/proc` or the group database instead would say what is true
/// now, perhaps of another process, and not what was when the connection was made.
fn supplementary_groups(socket: BorrowedFd<'_>) -> io::Result<Vec<u32>> {
    const START: usize = 64;
    let mut groups: Vec<libc::gid_t> = vec![0; START];
    loop {
        let room = groups.len() * size_of::<libc::gid_t>();
        let mut bytes = libc::socklen_t::try_from(room).map_err(|_| io::ErrorKind::InvalidData)?;
        #[allow(unsafe_code, reason = "no safe wrapper exists for SO_PEERGROUPS")]
        // SAFETY: the descriptor is open for as long as it is borrowed; the kernel writes at most `bytes` bytes, which is the
        // length of the buffer, and then sets `bytes` to what it wrote or would have to write.
        let result = unsafe {
            libc::getsockopt(
                socket.as_raw_fd(),
                libc::SOL_SOCKET,
                libc::SO_PEERGROUPS,
                groups.as_mut_ptr().cast(),
                &raw mut bytes,
            )
        };
        let count = usize::try_from(bytes).unwrap_or(0) / size_of::<libc::gid_t>();
        if result == 0 {
            groups.truncate(count);
            return Ok(groups);
        }
        let error = io::Error::last_os_error();
        if error.raw_os_error() != Some(libc::ERANGE) || count <= groups.len() || count > GROUPS_MAX {
            return Err(error);
        }
        groups.resize(count, 0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn the_kernel_names_the_user_and_every_group() {
        let (one, _other) = UnixStream::pair().expect("a pair of sockets");
        let peer = peer(&one).expect("the kernel says");
        assert_eq!(peer.uid, rustix::process::geteuid().as_raw());
        let own = rustix::process::getgroups().expect("own groups");
        for group in own.iter().map(|group| group.as_raw()).chain([rustix::process::getegid().as_raw()]) {
            assert!(peer.groups.contains(&group), "{group} in {:?}", peer.groups);
        }
        assert_eq!(peer.pid, i32::try_from(std::process::id()).ok());
    }
}
