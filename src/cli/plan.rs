//! `pgrecall plan ENV --to TARGET [--into DIR]`: what a restore would do, exactly; reads only.

use clap::Args;

use super::Context;
use super::places::PlacesArguments;
use super::target::{Planned, TargetArguments};
use crate::error::Failure;

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    target: TargetArguments,
    #[command(flatten)]
    places: PlacesArguments,
}

pub async fn run(context: &Context, arguments: Arguments) -> Result<(), Failure> {
    let config = context.load_config()?;
    let environment = arguments.target.environment.find(&config)?;
    let repository = environment.open_repository().await?;
    let mut planned = arguments.target.plan(environment, &repository).await?;
    arguments.places.measure(&mut planned.plan)?;
    context.output.result(&planned, Planned::show);
    Ok(())
}
