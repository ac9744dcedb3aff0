//! `pgrecall verify ENV`: the repository against itself.

use std::fmt::Write as _;

use clap::Args;

use super::progress::Progress;
use super::{Context, EnvironmentArgument};
use crate::error::{Code, Failure};
use crate::repository::inspect::{InspectSettings, Report, Severity, inspect};
use crate::util::units::show_bytes;

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
}

pub async fn run(context: &Context, arguments: Arguments) -> Result<(), Failure> {
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
    context.output.result(&report, show);
    if report.is_sound() {
        return Ok(());
    }
    let problems = report.findings.iter().filter(|finding| finding.severity == Severity::Problem).count() as u64;
    let count = problems.saturating_add(report.more_findings);
    Err(Failure::new(Code::Corrupt, format!("verify {}: {count} problems", environment.name))
        .hint("Take a new backup now; what the problems name is not restorable from here."))
}

fn show(report: &Report) -> String {
    let mut text = format!(
        "{} backups, {} packs, {} WAL objects, {} stored",
        report.backups,
        report.packs,
        report.wal_objects,
        show_bytes(report.stored_bytes)
    );
    if report.read.objects > 0 {
        let _ = write!(text, "\n{} objects read, {}", report.read.objects, show_bytes(report.read.bytes));
    }
    for finding in &report.findings {
        let kind = if finding.severity == Severity::Note { "note" } else { "problem" };
        let _ = write!(text, "\n{kind}: {}: {}", finding.object, finding.what);
    }
    if report.more_findings > 0 {
        let _ = write!(text, "\nand {} more", report.more_findings);
    }
    if report.is_sound() {
        text.push_str("\nsound");
    }
    text
}
