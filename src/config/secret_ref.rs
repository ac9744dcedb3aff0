//! Where a secret lies: a file or a variable of the process environment, never the configuration itself.

use std::fmt;
use std::os::unix::fs::PermissionsExt;
use std::path::PathBuf;

use zeroize::Zeroize;

use crate::util::secret::Secret;

/// Longest secret file that is read; a key or a password is far shorter.
const SECRET_BYTES_MAX: u64 = 64 * 1024;

/// A reference to a secret; the secret itself is read by [`SecretRef::load`] when it is needed, so that somebody who
/// only restores needs no password of the database.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum SecretRef {
    File(PathBuf),
    Variable(String),
}

/// Why a secret cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum SecretError {
    #[error("read {path}: {source}")]
    Read { path: PathBuf, source: std::io::Error },
    #[error("read {path}: everybody on this host may read it (mode {mode:04o}); run `chmod o= {path}`")]
    Exposed { path: PathBuf, mode: u32 },
    #[error("read {path}: it is {reason}")]
    Content { path: PathBuf, reason: &'static str },
    #[error("read the environment variable {name}: it is {reason}")]
    Variable { name: String, reason: &'static str },
}

impl SecretRef {
    /// Reads the secret; a line end after it is not part of it.
    ///
    /// # Errors
    /// When it is missing, empty, not UTF-8, or in a file that everybody may read.
    pub fn load(&self) -> Result<Secret, SecretError> {
        match self {
            SecretRef::File(path) => load_file(path.clone()),
            SecretRef::Variable(name) => match std::env::var(name) {
                Ok(text) if text.is_empty() => Err(SecretError::Variable { name: name.clone(), reason: "empty" }),
                Ok(text) => Ok(Secret::new(text)),
                Err(std::env::VarError::NotPresent) => {
                    Err(SecretError::Variable { name: name.clone(), reason: "not set" })
                }
                Err(std::env::VarError::NotUnicode(_)) => {
                    Err(SecretError::Variable { name: name.clone(), reason: "not UTF-8" })
                }
            },
        }
    }
}

impl fmt::Display for SecretRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            SecretRef::File(path) => write!(f, "file {}", path.display()),
            SecretRef::Variable(name) => write!(f, "environment variable {name}"),
        }
    }
}

fn load_file(path: PathBuf) -> Result<Secret, SecretError> {
    use std::io::Read as _;
    let mut bytes = Vec::new();
    let opened = std::fs::File::open(&path).and_then(|file| {
        let metadata = file.metadata()?;
        file.take(SECRET_BYTES_MAX + 1).read_to_end(&mut bytes)?;
        Ok(metadata)
    });
    let metadata = match opened {
        Ok(metadata) => metadata,
        Err(source) => return Err(SecretError::Read { path, source }),
    };
    let mode = metadata.permissions().mode() & 0o7777;
    if metadata.is_file() && mode & 0o004 != 0 {
        bytes.zeroize();
        return Err(SecretError::Exposed { path, mode });
    }
    if bytes.len() as u64 > SECRET_BYTES_MAX {
        bytes.zeroize();
        return Err(SecretError::Content { path, reason: "longer than 64 KiB" });
    }
    let Ok(mut text) = String::from_utf8(bytes) else {
        return Err(SecretError::Content { path, reason: "not UTF-8" });
    };
    let kept = text.trim_end_matches(['\n', '\r']).len();
    text.truncate(kept);
    if text.is_empty() {
        return Err(SecretError::Content { path, reason: "empty" });
    }
    Ok(Secret::new(text))
}
