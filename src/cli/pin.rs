//! `pgrecall pin add|list|remove`: what is kept beyond the recovery window.

use clap::{Args, Subcommand};
use hyper::Method;
use serde_json::json;

use super::{Context, EnvironmentArgument, remote};
use crate::control::client::Client;
use crate::daemon::service::PinAsked;
use crate::error::{Code, Failure};
use crate::lineage::Target;
use crate::lineage::moment::Request;
use crate::lineage::moment::target::{ParseTargetError, parse_time};
use crate::operations::pin::{self, PinRequest};
use crate::pg::{TimelineId, Timestamp};
use crate::util::clock;
use crate::util::percent;
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
    // The environment is a `name` already.
    #[arg(long = "name", id = "pin", value_name = "NAME")]
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
    if let Some(client) = context.daemon_of_another() {
        return ask_daemon(context, &client, verb).await;
    }
    let config = context.load_config()?;
    match verb {
        Verb::Add(arguments) => {
            let environment = arguments.environment.find(&config)?;
            let request = request_of(&arguments)?;
            let repository = environment.open_repository().await?;
            let pin = pin::add(&repository, environment.name.as_str(), &request).await?;
            context.output.result(&json!({ "pin": pin }), |_| pin.show(environment.time_zone));
        }
        Verb::List(arguments) => {
            let environment = arguments.environment.find(&config)?;
            let pins = pin::list(&environment.open_repository().await?).await?;
            context.output.result(&json!({ "pins": pins }), |_| pin::show_all(&pins, environment.time_zone));
        }
        Verb::Remove(arguments) => {
            let environment = arguments.environment.find(&config)?;
            let pin = pin::remove(&environment.open_repository().await?, &arguments.pin).await?;
            context.output.result(&json!({ "pin": pin }), |_| pin.show_removed());
        }
    }
    Ok(())
}

async fn ask_daemon(context: &Context, client: &Client, verb: Verb) -> Result<(), Failure> {
    let place = |environment: &EnvironmentArgument| format!("/v1/environments/{}/pins", environment.name);
    match verb {
        Verb::Add(Add { environment, at, timeline, name, until }) => {
            let asked = PinAsked { name, at, timeline, until: read_until(&until)?.to_string() };
            let body = remote::body(&asked);
            remote::show(context, client, Method::POST, &place(&environment), Some(&body)).await
        }
        Verb::List(List { environment }) => {
            remote::show(context, client, Method::GET, &place(&environment), None).await
        }
        Verb::Remove(Remove { environment, pin }) => {
            let path = format!("{}/{}", place(&environment), percent::encode(&pin));
            remote::show(context, client, Method::DELETE, &path, None).await
        }
    }
}

fn request_of(arguments: &Add) -> Result<PinRequest, Failure> {
    let wrong = |error: ParseTargetError| Failure::new(Code::Usage, format!("understand the moment: {error}"));
    let target: Target = arguments.at.parse().map_err(wrong)?;
    let timeline = arguments.timeline.map(TimelineId);
    let owner = std::env::var("SUDO_USER").or_else(|_| std::env::var("USER"));
    let owner = owner.unwrap_or_else(|_| format!("uid {}", rustix::process::getuid().as_raw()));
    Ok(PinRequest {
        name: arguments.name.clone(),
        moment: Request { target, exclusive: false, timeline },
        until: read_until(&arguments.until)?,
        owner,
    })
}

fn read_until(text: &str) -> Result<Timestamp, Failure> {
    match parse_duration(text) {
        Ok(length) => Ok(Timestamp::from(clock::now() + length)),
        Err(_) => parse_time(text).map_err(|error| {
            let failure = Failure::new(Code::Usage, format!("understand --until: {error}"));
            failure.hint("Write a time with its zone, or a length of time from now on, such as 90d.")
        }),
    }
}
