//! Which rounds, and how many, of a test that goes by chance: `PGRECALL_SEED` and `PGRECALL_ROUNDS`.

use rand::{SeedableRng, rngs::StdRng};

pub fn number(name: &str) -> Option<u64> {
    std::env::var(name).ok()?.parse().ok()
}

/// How many rounds, and what decides in them. Says both, so that a failure can be seen again.
pub fn rounds(usual: u64) -> (u64, StdRng) {
    let rounds = number("PGRECALL_ROUNDS").unwrap_or(usual);
    let seed = number("PGRECALL_SEED").unwrap_or(std::process::id().into());
    println!("PGRECALL_SEED={seed} PGRECALL_ROUNDS={rounds}");
    (rounds, StdRng::seed_from_u64(seed))
}
