//! The WAL that all streams of a process hold in memory, counted against one limit.
//!
//! Nobody waits here: a stream that finds the budget short stops reading beyond [`SHARE_MIN`] and lets go of what is stored.
//! So one whose store hangs holds at most its own buffer, and all others go on.
//!
//! A whole unit is compressed by as many threads at a time as there are processors: more of them would only hold more. Parts,
//! which are small and must be quick, do not wait for that. Housekeeping, which nobody waits for, reads as many stored units
//! at a time: after a start every environment has some to look at.
//!
//! Invariant: `held` is the sum of what is alive; it falls when the last copy of the bytes is dropped.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use bytes::Bytes;
use tokio::sync::{Semaphore, SemaphorePermit};

/// What every stream may hold also when the budget is short.
pub const SHARE_MIN: u64 = 1 << 20;

/// The limit and what is held of it.
#[derive(Debug)]
pub struct Budget {
    bytes_max: u64,
    held: AtomicU64,
    encoders: Semaphore,
    housekeepers: Semaphore,
}

impl Budget {
    pub fn new(bytes_max: u64) -> Arc<Budget> {
        let processors = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
        let (encoders, housekeepers) = (Semaphore::new(processors), Semaphore::new(processors));
        Arc::new(Budget { bytes_max, held: AtomicU64::new(0), encoders, housekeepers })
    }

    /// The turn of a whole unit to be encoded; `None` never comes, for nobody closes it.
    ///
    /// Cancel safety: whoever gives up leaves the queue.
    pub async fn encoder(&self) -> Option<SemaphorePermit<'_>> {
        self.encoders.acquire().await.ok()
    }

    /// The turn of a whole stored unit to be read for housekeeping; as [`Budget::encoder`].
    ///
    /// A store that hangs is found out by the listing before; one that hangs later keeps its turn until its request is given up.
    pub async fn housekeeper(&self) -> Option<SemaphorePermit<'_>> {
        self.housekeepers.acquire().await.ok()
    }

    /// Whether more is held than should be.
    pub fn is_short(&self) -> bool {
        self.held.load(Ordering::Relaxed) > self.bytes_max
    }
}

/// Bytes that count until they are dropped.
#[derive(Debug)]
pub struct Held {
    bytes: Vec<u8>,
    counted: u64,
    budget: Arc<Budget>,
}

impl Held {
    pub fn new(budget: &Arc<Budget>) -> Held {
        Held { bytes: Vec::new(), counted: 0, budget: Arc::clone(budget) }
    }

    /// What is held, in exchange for nothing.
    pub fn take(&mut self) -> Held {
        let nothing = self.copy(&[]);
        std::mem::replace(self, nothing)
    }

    /// A copy of `bytes` that counts against the same budget.
    pub fn copy(&self, bytes: &[u8]) -> Held {
        let mut copy = Held::new(&self.budget);
        copy.extend(bytes);
        copy
    }

    pub fn extend(&mut self, bytes: &[u8]) {
        self.bytes.extend_from_slice(bytes);
        // A vector that grows has room for more than it has: that is memory, too.
        let now = self.bytes.capacity() as u64;
        self.budget.held.fetch_add(now - self.counted, Ordering::Relaxed);
        self.counted = now;
    }

    /// The bytes, to be shared; they count as long as a copy is alive.
    pub fn freeze(self) -> Bytes {
        Bytes::from_owner(self)
    }
}

impl AsRef<[u8]> for Held {
    fn as_ref(&self) -> &[u8] {
        &self.bytes
    }
}

impl Drop for Held {
    fn drop(&mut self) {
        self.budget.held.fetch_sub(self.counted, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn bytes_count_until_their_last_copy_is_dropped() {
        let budget = Budget::new(1000);
        let mut held = Held::new(&budget);
        held.extend(&[1; 600]);
        assert!(!budget.is_short());
        let mut other = Held::new(&budget);
        other.extend(&[2; 600]);
        assert!(budget.is_short());
        let shared = held.freeze();
        let copy = shared.slice(10..20);
        drop(shared);
        assert!(budget.is_short());
        drop(copy);
        assert!(!budget.is_short());
        drop(other);
        assert_eq!(budget.held.load(Ordering::Relaxed), 0);
    }
}
