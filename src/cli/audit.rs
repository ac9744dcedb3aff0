//! `pgrecall audit ENV`: who did what, from the store alone, and whether the record is whole.

use std::fmt::Write as _;

use clap::Args;
use hyper::Method;

use super::{Context, EnvironmentArgument, times};
use crate::error::{Code, Failure};
use crate::repository::audit::{self, Outcome, Record};
use crate::util::clock;

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    environment: EnvironmentArgument,
    /// How many of the newest acts to show; all of them are checked
    #[arg(long, value_name = "N", default_value_t = 100)]
    last: usize,
}

pub async fn run(context: &Context, arguments: Arguments) -> Result<(), Failure> {
    let name = &arguments.environment.name;
    let (record, zone) = match context.daemon_of_another() {
        Some(client) => {
            let path = format!("/v1/environments/{name}/audit?last={}", arguments.last);
            (client.ask::<Record>(Method::GET, &path, None).await?, chrono_tz::Tz::UTC)
        }
        None => {
            let config = context.load_config()?;
            let environment = arguments.environment.find(&config)?;
            let repository = environment.open_repository().await?;
            (audit::check(&repository, arguments.last).await?, environment.time_zone)
        }
    };
    context.output.result(&record, |record| show(record, zone));
    if record.problems.is_empty() {
        return Ok(());
    }
    let message =
        format!("check the record of {name}: {} problems, {}", record.problems.len(), record.problems.join("; "));
    let hint =
        "Somebody or something changed it in the store: compare it with the daemon's log, which has every act, too.";
    Err(Failure::new(Code::Corrupt, message).hint(hint))
}

fn show(record: &Record, zone: chrono_tz::Tz) -> String {
    let now = clock::now();
    let mut text = String::new();
    for recorded in &record.acts {
        let act = &recorded.act;
        let outcome = match act.outcome {
            Outcome::Allowed => "",
            Outcome::Refused => " refused",
            Outcome::Failed => " failed",
            Outcome::Late => " note",
        };
        let role = act.role.as_deref().unwrap_or("no role");
        let _ = write!(text, "{}  {} ({role}): {}{outcome}", times::show(act.at, zone, now), act.user, act.request);
        let named = [("job", &act.job), ("ticket", &act.ticket)];
        for (what, value) in named.into_iter().filter_map(|(what, value)| Some((what, value.as_ref()?))) {
            let _ = write!(text, ", {what} {value}");
        }
        if act.detail.as_object().is_some_and(|fields| !fields.is_empty()) {
            let _ = write!(text, " {}", act.detail);
        }
        if let Some(why) = &act.why {
            let _ = write!(text, ": {why}");
        }
        if act.unlisted > 0 {
            let _ = write!(text, " (and {} more shortly before)", act.unlisted);
        }
        text.push('\n');
    }
    let shown = record.acts.len() as u64;
    let earlier = record.count.saturating_sub(shown);
    let verdict = if record.problems.is_empty() { "every chain holds" } else { "the record is not whole" };
    let _ = write!(text, "{} acts", record.count);
    if earlier > 0 {
        let _ = write!(text, ", the newest {shown} shown");
    }
    let _ = write!(text, "; {verdict}");
    text
}
