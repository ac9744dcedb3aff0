//! What a person is told about a repository that cannot be used.

use super::format::RepositoryError;
use super::store::StoreError;
use crate::error::{Code, Failure};

impl From<RepositoryError> for Failure {
    fn from(error: RepositoryError) -> Failure {
        let (text, hint) = (error.to_string(), error.hint());
        match error {
            RepositoryError::Store(error) => store_failure(&error, text),
            RepositoryError::Corrupt { .. } | RepositoryError::Malformed { .. } => Failure::new(Code::Corrupt, text),
            RepositoryError::IdentityGone(_) => {
                let failure = Failure::new(Code::Corrupt, text);
                hint.map_or(failure.clone(), |hint| failure.hint(hint))
            }
            RepositoryError::Missing(_) => Failure::new(Code::NotFound, format!("open the repository: {text}"))
                .hint("The daemon makes it when it first stores WAL; or `repository` names another place."),
            RepositoryError::Version { .. } => {
                Failure::new(Code::Configuration, format!("open the repository: {text}"))
                    .hint("Use a newer version of this program.")
            }
            RepositoryError::KeyMissing(_)
            | RepositoryError::NotEncrypted(_)
            | RepositoryError::OtherMasterKey { .. } => {
                Failure::new(Code::Configuration, format!("open the repository: {text}"))
                    .hint("`encryption.master_key_file` or `…_env` must give the key of the first backup, or none.")
            }
            RepositoryError::Stopping => Failure::new(Code::Cancelled, "go on: the program is stopping"),
        }
    }
}

fn store_failure(error: &StoreError, text: String) -> Failure {
    let code = match error {
        StoreError::Settings(_) => Code::Configuration,
        StoreError::NotFound { .. } => Code::NotFound,
        StoreError::TooShort { .. } | StoreError::TooLarge { .. } => Code::Corrupt,
        StoreError::Refused { .. } | StoreError::Unavailable { .. } => Code::Store,
    };
    let failure = Failure::new(code, text);
    let failure = if error.is_retryable() { failure.retryable() } else { failure };
    match error.hint() {
        Some(hint) => failure.hint(hint),
        None => failure,
    }
}
