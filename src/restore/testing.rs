//! Restores of the synthetic repository.

use std::path::PathBuf;
use std::sync::Arc;

use super::plan::{Plan, Stop};
use super::{gather, run};
use crate::pg::Lsn;
use crate::repository::testing::{Files, T1, World};

pub fn stop(lsn: u64) -> Stop {
    Stop { timeline: T1, lsn: Lsn(lsn), inclusive: false, end_lsn: Lsn(lsn + 100) }
}

impl World {
    pub async fn plan(&self, stop: Stop) -> Result<Plan, gather::GatherError> {
        let request = gather::PlanRequest { environment: "shop", stop, backup: None, lacks: &[] };
        gather::plan(&self.repository, &self.known, &request).await
    }

    pub async fn restore(&self, plan: &Plan, into: &str) -> Result<run::Restored, run::RestoreError> {
        run::run(&self.repository, plan.clone(), &self.path(into), &self.options(into), Arc::default()).await
    }

    pub fn options(&self, into: &str) -> run::RestoreOptions {
        let mut options = run::RestoreOptions::default();
        options.tablespaces.under = Some(self.path(&format!("{into}-spaces")));
        options
    }

    /// Compares a restored directory with the files of the backup.
    pub fn assert_restored(&self, into: &str, files: &Files) {
        let space = self.path(&format!("{into}-spaces")).join("16500");
        for (path, (mode, content)) in files {
            let place = match path.strip_prefix("pg_tblspc/16500/") {
                Some(inside) => space.join(inside),
                None => self.path(into).join(path),
            };
            let found = std::fs::read(&place).unwrap_or_else(|e| panic!("{}: {e}", place.display()));
            if path == "tablespace_map" {
                assert_eq!(String::from_utf8(found).expect("text"), format!("16500 {}\n", space.display()));
                continue;
            }
            assert!(found == *content, "{path} differs");
            let meta = std::fs::metadata(&place).expect("there");
            assert_eq!(std::os::unix::fs::PermissionsExt::mode(&meta.permissions()) & 0o777, *mode, "{path}");
        }
        let left = walk(&self.path(into)).into_iter().filter(|p| p.to_string_lossy().contains(".pgrecall-new"));
        assert_eq!(left.count(), 0);
    }
}

pub fn walk(directory: &std::path::Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    for entry in std::fs::read_dir(directory).expect("list").flatten() {
        if entry.file_type().expect("type").is_dir() {
            found.extend(walk(&entry.path()));
        } else {
            found.push(entry.path());
        }
    }
    found.sort();
    found
}
