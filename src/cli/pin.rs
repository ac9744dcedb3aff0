//! `pgrecall pin add|list|remove`: what is kept beyond the recovery window.

use std::fmt::Write as _;

use chrono_tz::Tz;
use clap::{Args, Subcommand};

use super::{Context, EnvironmentArgument, times};
use crate::error::{Code, Failure};
use crate::lineage::Target;
use crate::lineage::moment::Request;
use crate::lineage::moment::target::{ParseTargetError, parse_time};
use crate::operations::pin::{self, PinReport, PinRequest};
use crate::pg::{TimelineId, Timestamp};
use crate::util::clock;
use crate::util::units::parse_duration;

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Keep the backup and the WAL that lead to a moment, until a day
    Add(Add),
    /// Name what is pinned, by people and by running restores
    List(List),
    /// Let what was pinned go with the window again
    Remove(Remove),
}

#[derive(Debug, Args)]
pub struct Add {
    #[command(flatten)]
    environment: EnvironmentArgument,
    /// The moment, in the forms that `restore --to` takes
    #[arg(long, value_name = "TARGET")]
    at: String,
    /// The timeline of the moment, instead of the one that is archived now
    #[arg(long, value_name = "N")]
    timeline: Option<u32>,
    /// What to call it
    #[arg(long, value_name = "NAME")]
    name: String,
    /// How long: a time with its zone, or from now on ('90d')
    #[arg(long, value_name = "WHEN")]
    until: String,
}

#[derive(Debug, Args)]
pub struct List {
    #[command(flatten)]
    environment: EnvironmentArgument,
}

#[derive(Debug, Args)]
pub struct Remove {
    #[command(flatten)]
    environment: EnvironmentArgument,
    /// Its name, as `pin list` shows it
    #[arg(value_name = "NAME")]
    pin: String,
}

pub async fn run(context: &Context, verb: Verb) -> Result<(), Failure> {
    let config = context.load_config()?;
    match verb {
        Verb::Add(arguments) => {
            let environment = arguments.environment.find(&config)?;
            let request = request_of(&arguments)?;
            let repository = environment.open_repository().await?;
            let report = pin::add(&repository, environment.name.as_str(), &request).await?;
            context.output.result(&report, |report| show(report, environment.time_zone));
        }
        Verb::List(arguments) => {
            let environment = arguments.environment.find(&config)?;
            let pins = pin::list(&environment.open_repository().await?).await?;
            context.output.result(&pins, |pins| match pins.is_empty() {
                true => "nothing is pinned".to_owned(),
                false => pins.iter().map(|pin| show(pin, environment.time_zone)).collect(),
            });
        }
        Verb::Remove(arguments) => {
            let environment = arguments.environment.find(&config)?;
            let report = pin::remove(&environment.open_repository().await?, &arguments.pin).await?;
            context.output.result(&report, |report| format!("{:?} is pinned no more", report.name));
        }
    }
    Ok(())
}

fn request_of(arguments: &Add) -> Result<PinRequest, Failure> {
    let wrong = |error: ParseTargetError| Failure::new(Code::Usage, format!("understand the moment: {error}"));
    let target: Target = arguments.at.parse().map_err(wrong)?;
    let timeline = arguments.timeline.map(TimelineId);
    let until = match parse_duration(&arguments.until) {
        Ok(length) => Timestamp::from(clock::now() + length),
        Err(_) => parse_time(&arguments.until).map_err(|error| {
            let failure = Failure::new(Code::Usage, format!("understand --until: {error}"));
            failure.hint("Write a time with its zone, or a length of time from now on, such as 90d.")
        })?,
    };
    let owner = std::env::var("SUDO_USER").or_else(|_| std::env::var("USER"));
    let owner = owner.unwrap_or_else(|_| format!("uid {}", rustix::process::getuid().as_raw()));
    Ok(PinRequest {
        name: arguments.name.clone(),
        moment: Request { target, exclusive: false, timeline },
        until,
        owner,
    })
}

fn show(pin: &PinReport, zone: Tz) -> String {
    let now = clock::now();
    let mut text = format!("{:?}: {} from backup {}\n", pin.name, pin.target, pin.backup);
    if let Some(until) = pin.until {
        let _ = writeln!(text, "    until {}", times::show(until, zone, now));
    }
    if let Some(owner) = &pin.owner {
        let kind = if pin.temporary { ", for as long as it reads" } else { "" };
        let _ = writeln!(text, "    by {owner}{kind}");
    }
    if let Some(damaged) = &pin.damaged {
        let _ = writeln!(text, "    it cannot be read, and holds until it is removed: {damaged}");
    }
    text
}
