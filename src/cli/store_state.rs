//! What the store alone says about an environment, for `status` and `backups`.

use crate::config::Environment;
use crate::error::{Code, Failure};
use crate::operations::state;
pub use crate::operations::state::StoreState;

/// Reads the state; `None` when no cluster was ever archived there.
pub async fn load(environment: &Environment) -> Result<Option<StoreState>, Failure> {
    match environment.open_repository().await {
        Ok(repository) => state::load(&repository).await,
        Err(failure) if failure.code == Code::NotFound => Ok(None),
        Err(failure) => Err(failure),
    }
}
