use std::process::ExitCode;

/// Gives memory back soon after a backup, which the system's allocator does not; `.cargo/config.toml` says how soon.
#[global_allocator]
static ALLOCATOR: tikv_jemallocator::Jemalloc = tikv_jemallocator::Jemalloc;

fn main() -> ExitCode {
    match pgrecall::cli::parse() {
        Ok(arguments) => pgrecall::cli::run(arguments),
        Err(status) => status,
    }
}
