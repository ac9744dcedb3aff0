//! `pgrecall backups ENV`: what can be restored from, read from the store alone.

use clap::Args;
use hyper::Method;

use super::{Context, EnvironmentArgument, remote, store_state};
use crate::error::{Code, Failure};

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    environment: EnvironmentArgument,
}

pub async fn run(context: &Context, arguments: Arguments) -> Result<(), Failure> {
    if let Some(client) = context.daemon_of_another() {
        let path = format!("/v1/environments/{}/backups", arguments.environment.name);
        return remote::show(context, &client, Method::GET, &path, None).await;
    }
    let config = context.load_config()?;
    let environment = arguments.environment.find(&config)?;
    let Some(state) = store_state::load(environment).await? else {
        return Err(Failure::new(
            Code::NotFound,
            format!("list backups of {}: nothing is stored yet", environment.name),
        )
        .hint("Start `pgrecall daemon`, or ask for a first backup with `pgrecall backup`."));
    };
    context.output.result(&state, |state| state.show_backups(environment.time_zone));
    match state.damaged_backups.first() {
        Some(damaged) => Err(damaged.error.clone()),
        None => Ok(()),
    }
}
