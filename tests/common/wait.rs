//! Waiting for a condition, with a deadline and a sentence that says what was waited for.

use std::future::Future;
use std::time::{Duration, Instant};

const STEP: Duration = Duration::from_millis(20);

/// Calls `probe` until it gives a value; fails the test after `seconds`.
#[track_caller]
pub fn for_value<T>(what: &str, seconds: u64, mut probe: impl FnMut() -> Option<T>) -> T {
    let deadline = Instant::now() + Duration::from_secs(seconds);
    loop {
        if let Some(value) = probe() {
            return value;
        }
        assert!(Instant::now() < deadline, "waited {seconds} s in vain for: {what}");
        std::thread::sleep(STEP);
    }
}

/// Calls `probe` until it is true; fails the test after `seconds`.
#[track_caller]
pub fn until(what: &str, seconds: u64, mut probe: impl FnMut() -> bool) {
    for_value(what, seconds, || probe().then_some(()));
}

/// Like [`for_value`], for an asynchronous probe.
pub async fn for_value_async<T, F>(what: &str, seconds: u64, mut probe: impl FnMut() -> F) -> T
where
    F: Future<Output = Option<T>>,
{
    let deadline = Instant::now() + Duration::from_secs(seconds);
    loop {
        if let Some(value) = probe().await {
            return value;
        }
        assert!(Instant::now() < deadline, "waited {seconds} s in vain for: {what}");
        tokio::time::sleep(STEP).await;
    }
}

/// Like [`until`], for an asynchronous probe.
pub async fn until_async<F>(what: &str, seconds: u64, mut probe: impl FnMut() -> F)
where
    F: Future<Output = bool>,
{
    let deadline = Instant::now() + Duration::from_secs(seconds);
    while !probe().await {
        assert!(Instant::now() < deadline, "waited {seconds} s in vain for: {what}");
        tokio::time::sleep(STEP).await;
    }
}

/// Whether `probe` stays true for `millis`: for what must *not* happen. The only wait that lasts its full time.
pub fn stays(millis: u64, mut probe: impl FnMut() -> bool) -> bool {
    let end = Instant::now() + Duration::from_millis(millis);
    while Instant::now() < end {
        if !probe() {
            return false;
        }
        std::thread::sleep(STEP);
    }
    true
}
