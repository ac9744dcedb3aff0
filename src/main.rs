use std::process::ExitCode;

use clap::Parser as _;

fn main() -> ExitCode {
    pgrecall::cli::run(pgrecall::cli::Arguments::parse())
}
