use std::process::ExitCode;

fn main() -> ExitCode {
    match pgrecall::cli::parse() {
        Ok(arguments) => pgrecall::cli::run(arguments),
        Err(status) => status,
    }
}
