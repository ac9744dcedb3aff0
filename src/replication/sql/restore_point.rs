//! A named restore point, on disk when it is returned.
//!
//! Source: `xlogfuncs.c` (`pg_create_restore_point`), `xlog.c` (`XLogRestorePoint` does not flush), `logicalfuncs.c`
//! (`pg_logical_emit_message`, which everybody may call), 14–18.

use super::{Sql, literal};
use crate::pg::Lsn;
use crate::replication::ReplicationError;

/// PostgreSQL's own limit (`MAXFNAMELEN`), with the zero at the end.
pub const RESTORE_POINT_NAME_BYTES_MAX: usize = 63;

impl Sql {
    /// Writes a restore point and flushes the WAL; gives the end of its record. The record alone would wait in memory until
    /// somebody commits, so a message is committed behind it, without waiting for any standby.
    ///
    /// # Errors
    /// `MissingGrant` with the statement that gives the right; `Server` on a standby.
    pub async fn create_restore_point(&mut self, name: &str) -> Result<Lsn, ReplicationError> {
        let name = literal(name);
        let sql = format!(
            "BEGIN; SET LOCAL synchronous_commit = local; \
             SELECT pg_catalog.pg_create_restore_point({name})::text AS lsn; \
             SELECT pg_catalog.pg_logical_emit_message(true, 'pgrecall', {name}); COMMIT"
        );
        let asked = self.query_all(&sql).await;
        let results =
            asked.map_err(|error| self.missing_grant(error, "EXECUTE ON FUNCTION pg_create_restore_point(text)"))?;
        let text = results.iter().find_map(|rows| rows.text(0, "lsn"));
        let parsed = text.as_deref().and_then(|text| text.parse().ok());
        parsed.ok_or_else(|| ReplicationError::protocol(format!("a restore point at {text:?}")))
    }
}
