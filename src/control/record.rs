//! What is put on record of a request: who, what, with which right, and what came of it.

use std::collections::BTreeMap;
use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use serde_json::Value;
use tokio::time::Instant;
use tracing::warn;

use super::auth::{Permit, Refusal};
use crate::daemon::access::Caller;
use crate::daemon::audit::{Act, Outcome, Weight, journal};
use crate::daemon::jobs::JobId;
use crate::daemon::service::Service;
use crate::error::Failure;
use crate::util::clock;

/// Refusals of one person that are listed each in a minute; of more only the number is.
pub const REFUSALS_LISTED: u32 = 10;
const MINUTE: Duration = Duration::from_secs(60);
/// People whose refusals are counted; who comes after that is not listed while nobody is forgotten.
const PEOPLE_MAX: usize = 1000;

/// The act of a request that may be done.
pub fn allowed(permit: &Permit, job: Option<&JobId>) -> Act {
    let (request, caller) = (permit.request(), permit.caller());
    Act {
        at: clock::now().into(),
        uid: Some(caller.uid),
        user: caller.user.clone(),
        role: Some(permit.role().as_str().to_owned()),
        request: request.name().to_owned(),
        job: job.or(request.job()).map(ToString::to_string),
        ticket: request.ticket().map(str::to_owned),
        detail: request.detail(),
        outcome: Outcome::Allowed,
        why: None,
        unlisted: 0,
    }
}

/// Puts an act on record before it is done; what is about the daemon itself, in every environment.
pub async fn put_down(service: &Service, permit: &Permit, act: &Act) -> Result<(), Failure> {
    let weight = permit.request().weight();
    if let Some(environment) = permit.environment() {
        return service.audit.record(environment, act.clone(), weight).await;
    }
    let names = service.repositories.names();
    let records = names.iter().map(|name| service.audit.record(name, act.clone(), weight));
    futures::future::join_all(records).await.into_iter().collect()
}

/// A read goes to the log alone; those of the daemon's own user not even there.
pub fn read(service: &Service, permit: &Permit, act: &Act) {
    if !service.access.is_owner(permit.caller().uid) {
        journal(permit.environment(), act);
    }
}

/// An act that was allowed could not be done.
pub async fn failed(service: &Service, permit: &Permit, act: Act, failure: &Failure) {
    let act = Act {
        at: clock::now().into(),
        outcome: Outcome::Failed,
        why: Some(failure.to_string()),
        detail: Value::Null,
        ..act
    };
    if let Err(failure) = put_down(service, permit, &act).await {
        warn!(error = %failure, "put a failed act on record: failed");
    }
}

/// Counts refusals, so that somebody who may nothing cannot fill the store with them.
#[derive(Default)]
pub struct Refusals(Mutex<BTreeMap<u32, Count>>);

struct Count {
    since: Instant,
    listed: u32,
    unlisted: u64,
}

impl Refusals {
    /// Puts a refusal on record, in the environment that it was about if there is one.
    pub async fn put_down(&self, service: &Service, caller: &Caller, request: &str, refusal: &Refusal) {
        let unlisted = match self.count(caller.uid, Instant::now()) {
            Some(unlisted) => unlisted,
            None => return,
        };
        let act = Act {
            at: clock::now().into(),
            uid: Some(caller.uid),
            user: caller.user.clone(),
            role: refusal.role.map(|role| role.as_str().to_owned()),
            request: request.to_owned(),
            job: None,
            ticket: None,
            detail: Value::Null,
            outcome: Outcome::Refused,
            why: Some(refusal.failure.to_string()),
            unlisted,
        };
        let known = refusal.environment.as_deref().filter(|name| service.repositories.environment(name).is_ok());
        match known {
            Some(environment) => {
                if let Err(failure) = service.audit.record(environment, act, Weight::Reversible).await {
                    warn!(error = %failure, "put a refusal on record: failed");
                }
            }
            None => journal(None, &act),
        }
    }

    /// Whether this one is listed, and how many before it were not.
    fn count(&self, uid: u32, now: Instant) -> Option<u64> {
        let mut people = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        people.retain(|_, count| count.unlisted > 0 || now.duration_since(count.since) < MINUTE);
        if people.len() >= PEOPLE_MAX && !people.contains_key(&uid) {
            return None;
        }
        let count = people.entry(uid).or_insert(Count { since: now, listed: 0, unlisted: 0 });
        if now.duration_since(count.since) >= MINUTE {
            count.since = now;
            count.listed = 0;
        }
        if count.listed >= REFUSALS_LISTED {
            count.unlisted = count.unlisted.saturating_add(1);
            return None;
        }
        count.listed = count.listed.saturating_add(1);
        Some(std::mem::take(&mut count.unlisted))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ten_refusals_a_minute_are_listed_and_the_next_says_how_many_were_not() {
        let (refusals, start) = (Refusals::default(), Instant::now());
        for _ in 0..REFUSALS_LISTED {
            assert_eq!(refusals.count(7, start), Some(0));
        }
        for _ in 0..500 {
            assert_eq!(refusals.count(7, start), None);
        }
        assert_eq!(refusals.count(8, start), Some(0), "another person");
        assert_eq!(refusals.count(7, start + MINUTE), Some(500));
        assert_eq!(refusals.count(7, start + MINUTE), Some(0));
    }
}
