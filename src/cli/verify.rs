//! `pgrecall verify ENV`: the repository against itself.

use clap::Args;

use super::progress::Progress;
use super::{Context, EnvironmentArgument, TicketArgument, remote};
use crate::daemon::jobs::verify::VerifyAsked;
use crate::error::{Code, Failure};
use crate::operations::verify;
use crate::repository::inspect::{InspectSettings, inspect};

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    environment: EnvironmentArgument,
    /// Read and hash the data too, of all objects or of about so many of a hundred
    #[arg(long, value_name = "PERCENT", num_args = 0..=1, require_equals = true, default_missing_value = "100",
          value_parser = clap::value_parser!(u8).range(1..=100))]
    read_data: Option<u8>,
    /// Which objects a partial reading takes: another number takes others
    #[arg(long, value_name = "N", default_value_t = 0, requires = "read_data")]
    sample: u32,
    /// Go on after this object, as an interrupted reading said
    #[arg(long, value_name = "OBJECT", requires = "read_data")]
    after: Option<String>,
    #[command(flatten)]
    ticket: TicketArgument,
}

pub async fn run(context: &Context, arguments: Arguments) -> Result<(), Failure> {
    if let Some(client) = context.daemon_of_another() {
        let path = format!("/v1/environments/{}/verify", arguments.environment.name);
        let asked = VerifyAsked {
            read_percent: arguments.read_data.unwrap_or(0),
            sample: arguments.sample,
            after: arguments.after,
        };
        let body = arguments.ticket.with(remote::body(&asked));
        let report = remote::run_job(context, &client, &path, &body).await?;
        return remote::show_end(context, report);
    }
    let config = context.load_config()?;
    let environment = arguments.environment.find(&config)?;
    let repository = environment.open_repository().await?;
    let settings = InspectSettings {
        read_percent: arguments.read_data.unwrap_or(0),
        sample: arguments.sample,
        after: arguments.after,
    };
    let mut progress = Progress::new(context.output);
    progress.show("looking at what is stored", 0, None);
    let mut after = settings.after.clone();
    let inspection = inspect(&repository, &settings, |seen| {
        after.clone_from(&seen.after);
        progress.show("reading", seen.bytes, Some(seen.bytes_total));
    });
    let report = tokio::select! {
        biased;
        () = super::interrupted() => None,
        report = inspection => Some(report?),
    };
    drop(progress);
    let Some(report) = report else {
        let failure = Failure::new(Code::Cancelled, format!("verify {}: interrupted", environment.name));
        return Err(match after {
            Some(after) => failure.hint(format!("Go on with --after '{after}'.")),
            None => failure,
        });
    };
    context.output.result(&report, verify::show);
    verify::judge(environment.name.as_str(), &report)
}
