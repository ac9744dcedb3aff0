//! `pgrecall plan ENV --to TARGET [--into DIR]`: what a restore would do, exactly; reads only.

use clap::Args;
use hyper::Method;

use super::places::PlacesArguments;
use super::target::TargetArguments;
use super::{Context, remote};
use crate::error::Failure;
use crate::operations::planned::Planned;

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    target: TargetArguments,
    #[command(flatten)]
    places: PlacesArguments,
}

pub async fn run(context: &Context, arguments: Arguments) -> Result<(), Failure> {
    if let Some(client) = context.daemon_of_another() {
        let path = format!("/v1/environments/{}/plan", arguments.target.environment.name);
        let asked = remote::body(&arguments.target.asked());
        return remote::show(context, &client, Method::POST, &path, Some(&asked)).await;
    }
    let config = context.load_config()?;
    let environment = arguments.target.environment.find(&config)?;
    let repository = environment.open_repository().await?;
    let mut planned = arguments.target.plan(environment, &repository).await?;
    arguments.places.measure(&mut planned.plan)?;
    context.output.result(&planned, Planned::show);
    Ok(())
}
