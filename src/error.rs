//! What a person or a script is told when something did not work.

use std::fmt;

use serde::{Deserialize, Serialize};

/// Why a command failed, in a form that stays the same between releases: scripts branch on the code or the exit status.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Code {
    /// A defect of this program or something nobody foresaw.
    Internal,
    /// Wrong arguments on the command line.
    Usage,
    /// The configuration cannot be used.
    Configuration,
    /// The target cannot be reached, or is not unique.
    UnreachableTarget,
    /// The store cannot be reached or refuses.
    Store,
    /// PostgreSQL cannot be reached or refuses.
    Postgres,
    /// Stored bytes are not what they should be.
    Corrupt,
    /// Another cluster, another writer or other content stands in the way.
    Conflict,
    /// Not on this host: space, a program, a library, a directory that is not empty.
    Host,
    /// What was asked for does not exist.
    NotFound,
    /// An environment that was asked about is not protected now.
    Unprotected,
    /// Whoever asked has no right to it.
    Denied,
    /// Somebody pressed Ctrl-C or stopped the service.
    Cancelled,
}

impl Code {
    /// The exit status of a command that failed so; documented in `docs/exit-codes.md`.
    pub fn exit_status(self) -> u8 {
        match self {
            Code::Internal => 1,
            Code::Usage => 2,
            Code::Configuration => 3,
            Code::UnreachableTarget => 4,
            Code::Store => 5,
            Code::Postgres => 6,
            Code::Corrupt => 7,
            Code::Conflict => 8,
            Code::Host => 9,
            Code::NotFound => 10,
            Code::Unprotected => 11,
            Code::Denied => 12,
            Code::Cancelled => 130,
        }
    }
}

/// An error at the boundary: what happened, to what, and what to do.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Failure {
    pub code: Code,
    /// Verb and object in the present tense, without `failed to`: `store segment … of …: access denied`.
    pub message: String,
    /// A full sentence that an operator can act on.
    pub hint: Option<String>,
    /// Whether the same call may work later without anybody doing anything.
    pub retryable: bool,
}

impl Failure {
    pub fn new(code: Code, message: impl Into<String>) -> Self {
        Failure { code, message: message.into(), hint: None, retryable: false }
    }

    #[must_use]
    pub fn hint(mut self, hint: impl Into<String>) -> Self {
        self.hint = Some(hint.into());
        self
    }

    #[must_use]
    pub fn retryable(mut self) -> Self {
        self.retryable = true;
        self
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)
    }
}

impl std::error::Error for Failure {}
