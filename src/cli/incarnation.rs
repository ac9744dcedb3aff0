//! `pgrecall incarnation open ENV --confirm ENV`: the way on after a conflict.
//!
//! The old past stays, with its window; WAL and backups of the server as it is now go below the next ordinal.

use clap::{Args, Subcommand};
use serde::Serialize;

use super::{Context, EnvironmentArgument, server};
use crate::error::{Code, Failure};
use crate::repository::identity::{self, Identity};
use crate::util::clock;

/// PostgreSQL's default and the only block size that this program reads.
const BLOCK_BYTES: u32 = 8192;

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// Begin a new past: the server was replaced or set back, and archiving is to go on with it as it is now
    Open(Open),
}

#[derive(Debug, Args)]
pub struct Open {
    #[command(flatten)]
    environment: EnvironmentArgument,
    /// The environment's name once more
    #[arg(long, value_name = "ENV")]
    confirm: String,
}

#[derive(Debug, Serialize)]
struct Report {
    incarnation: String,
    previous: Option<String>,
    server: String,
    timeline: u32,
    flush_lsn: String,
}

pub async fn run(context: &Context, Verb::Open(arguments): Verb) -> Result<(), Failure> {
    if arguments.confirm != arguments.environment.name {
        let message =
            format!("open an incarnation of {}: --confirm names another environment", arguments.environment.name);
        return Err(Failure::new(Code::Usage, message));
    }
    let config = context.load_config()?;
    let environment = arguments.environment.find(&config)?;
    let repository = environment.open_repository().await?;
    let previous = identity::current(&repository).await?;
    let mut primary = server::primary(environment, &environment.connect()?).await?;
    let identity = Identity {
        system_id: primary.identity.system_id,
        major: primary.session.major()?,
        segment_size: primary.session.segment_size().await?,
        block_size: BLOCK_BYTES,
        opened_at: clock::now().into(),
        reason: "opened by an operator".to_owned(),
    };
    let opened = identity::open_next(&repository, identity).await?;
    primary.session.close().await;
    let report = Report {
        incarnation: opened.incarnation.to_string(),
        previous: previous.map(|known| known.incarnation.to_string()),
        server: primary.host,
        timeline: primary.identity.timeline.0,
        flush_lsn: primary.identity.flush_lsn.to_string(),
    };
    context.output.result(&report, |report| {
        format!(
            "incarnation {} is open for {} (timeline {}, {}); a running daemon goes on by itself, and a first backup follows",
            report.incarnation, report.server, report.timeline, report.flush_lsn
        )
    });
    Ok(())
}
