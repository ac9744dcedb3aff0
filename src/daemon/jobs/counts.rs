//! How many jobs have ended, and how often stores failed, since the start of the daemon.

use std::sync::PoisonError;
use std::sync::atomic::Ordering;

use super::{JobKind, JobSpec, JobState, Jobs};

/// Of one environment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Counts {
    pub environment: String,
    pub store_errors: u64,
    /// Of every kind and outcome, those too that there were none of.
    pub jobs: Vec<(JobKind, JobState, u64)>,
}

impl Jobs {
    /// Of every configured environment.
    pub fn counts(&self) -> Vec<Counts> {
        let ended = self.0.ended.lock().unwrap_or_else(PoisonError::into_inner);
        let of = |environment: String| {
            let outcomes = JobKind::ALL.iter().flat_map(|kind| JobState::FINAL.map(|state| (*kind, state)));
            let count = |(kind, state)| {
                let count = ended.get(&(environment.clone(), kind, state)).copied().unwrap_or(0);
                (kind, state, count)
            };
            let jobs = outcomes.map(count).collect();
            let store_errors = self.0.repositories.store_errors(&environment).load(Ordering::Relaxed);
            Counts { environment, store_errors, jobs }
        };
        self.0.repositories.names().into_iter().map(of).collect()
    }

    pub(super) fn count(&self, spec: &JobSpec, state: JobState) {
        let mut ended = self.0.ended.lock().unwrap_or_else(PoisonError::into_inner);
        *ended.entry((spec.environment.clone(), spec.kind, state)).or_default() += 1;
    }
}
