//! Where a restore puts things, on the command line: shared by `plan` and `restore`.

use std::path::{Path, PathBuf};

use clap::Args;

use crate::error::{Code, Failure};
use crate::restore::space::FileSystem;
use crate::restore::target::{TablespacePlaces, TargetDirectory};
use crate::restore::{Plan, RestoreError};

#[derive(Debug, Args)]
pub struct PlacesArguments {
    /// The directory to restore into: empty, or not there yet
    #[arg(long, value_name = "DIR")]
    into: Option<PathBuf>,
    /// Where a tablespace goes
    #[arg(long, value_name = "OLD=NEW", value_parser = parse_tablespace, requires = "into")]
    tablespace: Vec<(PathBuf, PathBuf)>,
    /// Where all other tablespaces go, each in a directory named by its oid
    #[arg(long, value_name = "DIR", requires = "into")]
    tablespaces_under: Option<PathBuf>,
}

impl PlacesArguments {
    /// Whether somebody said where.
    pub fn is_chosen(&self) -> bool {
        self.into.is_some()
    }

    /// The absolute directory to restore into.
    pub fn directory(&self) -> Result<PathBuf, Failure> {
        let missing = || Failure::new(Code::Usage, "restore: --into names no directory");
        absolute(self.into.as_deref().ok_or_else(missing)?)
    }

    pub fn tablespaces(&self) -> TablespacePlaces {
        TablespacePlaces { moved: self.tablespace.clone(), under: self.tablespaces_under.clone() }
    }

    /// Adds to a plan what goes to which file system, once the places are named; what does not fit is missing.
    pub fn measure(&self, plan: &mut Plan) -> Result<(), Failure> {
        if self.into.is_none() {
            return Ok(());
        }
        let target = TargetDirectory::choose(&self.directory()?, plan, &self.tablespaces());
        let target = target.map_err(RestoreError::from)?;
        plan.file_systems = target.space(plan).map_err(RestoreError::from)?;
        let too_small = plan.file_systems.iter().filter(|found| found.is_too_small());
        plan.lacks.extend(too_small.map(|found: &FileSystem| format!("disk space: {found}")));
        let occupied = target.occupied(plan).map_err(RestoreError::from)?;
        plan.lacks.extend(occupied.into_iter().map(|place| {
            format!("the place of a tablespace that the replay makes: something is in {}", place.display())
        }));
        Ok(())
    }
}

pub fn absolute(path: &Path) -> Result<PathBuf, Failure> {
    std::path::absolute(path).map_err(|error| Failure::new(Code::Host, format!("find {}: {error}", path.display())))
}

fn parse_tablespace(text: &str) -> Result<(PathBuf, PathBuf), String> {
    match text.split_once('=') {
        Some((old, new)) if old.starts_with('/') && !new.is_empty() => Ok((old.into(), new.into())),
        _ => Err("write OLD=NEW, with OLD as the source has it".to_owned()),
    }
}
