//! The target of a restore on the command line, and the plan for it: shared by `plan` and `restore`.

use clap::Args;

use super::EnvironmentArgument;
use crate::config::Environment;
use crate::error::Failure;
use crate::operations::planned::{Here, Planned, TargetAsked};
use crate::repository::Repository;

#[derive(Debug, Args)]
pub struct TargetArguments {
    #[command(flatten)]
    pub environment: EnvironmentArgument,
    /// What to restore to: latest, a time with its zone ('2026-11-23 14:05:00+01:00', '2026-11-23T13:05Z',
    /// '2026-11-23 14:05 Europe/Berlin'), lsn:X/Y, xid:N, name:RESTORE_POINT, backup:ID
    #[arg(long, value_name = "TARGET", default_value = "latest")]
    to: String,
    /// Stop just before the target instead of just after it
    #[arg(long)]
    exclusive: bool,
    /// The timeline to end on, instead of the one that is archived now
    #[arg(long, value_name = "N")]
    timeline: Option<u32>,

    /// The past to look in, where `incarnation open` began another: 1 is the first [default: the one that holds the time
    /// or the backup, else the newest]
    #[arg(long, value_name = "ORDINAL")]
    incarnation: Option<u32>,
}

impl TargetArguments {
    pub fn asked(&self) -> TargetAsked {
        TargetAsked {
            to: self.to.clone(),
            exclusive: self.exclusive,
            timeline: self.timeline,
            incarnation: self.incarnation,
        }
    }

    /// Finds the exact stop and plans the way there; reads only.
    pub async fn plan(&self, environment: &Environment, repository: &Repository) -> Result<Planned, Failure> {
        let here = Here {
            environment: environment.name.as_str(),
            zone: environment.time_zone,
            postgres_bin_dirs: &environment.restore.postgres_bin_dirs,
        };
        self.asked().plan(here, repository).await
    }
}
