//! `pgrecall backups ENV`: what can be restored from, read from the store alone.

use std::fmt::Write as _;

use chrono_tz::Tz;
use clap::Args;

use super::store_state;
use super::{Context, EnvironmentArgument, times};
use crate::error::{Code, Failure};
use crate::operations::state::StoreState;
use crate::util::clock;
use crate::util::units::show_bytes;

#[derive(Debug, Args)]
pub struct Arguments {
    #[command(flatten)]
    environment: EnvironmentArgument,
}

pub async fn run(context: &Context, arguments: Arguments) -> Result<(), Failure> {
    let config = context.load_config()?;
    let environment = arguments.environment.find(&config)?;
    let Some(state) = store_state::load(environment).await? else {
        return Err(Failure::new(
            Code::NotFound,
            format!("list backups of {}: nothing is stored yet", environment.name),
        )
        .hint("Start `pgrecall daemon`, or ask for a first backup with `pgrecall backup`."));
    };
    context.output.result(&state, |state| show(state, environment.time_zone));
    match state.damaged_backups.first() {
        Some(damaged) => Err(damaged.error.clone()),
        None => Ok(()),
    }
}

fn show(state: &StoreState, zone: Tz) -> String {
    let now = clock::now();
    let mut text = String::new();
    if state.backups.is_empty() && state.damaged_backups.is_empty() {
        text.push_str("no backup yet");
    }
    for backup in &state.backups {
        let _ = writeln!(text, "{}  {}", backup.id, times::show(backup.stopped_at, zone, now));
        let _ = writeln!(
            text,
            "    PostgreSQL {}, timeline {}, WAL {} to {}, {} in {} files, {} stored{}",
            backup.server_version,
            backup.timeline,
            backup.start_lsn,
            backup.stop_lsn,
            show_bytes(backup.bytes),
            backup.files,
            show_bytes(backup.stored_bytes),
            if backup.from_standby { ", from a standby" } else { "" },
        );
        if backup.damaged_blocks > 0 {
            let _ = writeln!(text, "    the server reported {} damaged blocks", backup.damaged_blocks);
        }
    }
    for damaged in &state.damaged_backups {
        let _ = writeln!(text, "{}  cannot be used: failed to {}", damaged.id, damaged.error);
    }
    text
}
