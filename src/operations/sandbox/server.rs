//! The server of a sandbox: started again when it has ended, stopped, asked whether it runs.

use std::time::Duration;

use tokio::time::Instant;

use super::Area;
use super::record::Record;
use crate::error::{Code, Failure};
use crate::instance::locate::locate;
use crate::instance::postmaster::Status;
use crate::instance::server::stop_found;
use crate::instance::{Postmaster, Server, Settings, Start};

/// Between two looks at a server that starts.
const LOOK: Duration = Duration::from_millis(50);
/// Replay after a crash of a copy that was written to may take a while.
const START_LIMIT: Duration = Duration::from_secs(600);
const STOP_LIMIT: Duration = Duration::from_secs(60);

impl Area {
    /// The running server of a sandbox, also one that another process started.
    pub(super) fn postmaster(&self, record: &Record) -> Result<Option<Postmaster>, Failure> {
        let data = self.data(record);
        Postmaster::find(&data)
            .map_err(|error| Failure::new(Code::Host, format!("look for the server on {}: {error}", data.display())))
    }

    /// Starts the server of a sandbox and waits until it takes sessions.
    pub(super) async fn start_server(&self, record: &Record) -> Result<i32, Failure> {
        let failed =
            |why: String| Failure::new(Code::Host, format!("start the server of sandbox {}: {why}", record.id));
        let installation =
            locate(record.major, &record.postgres_bin_dirs).map_err(|error| failed(error.to_string()))?;
        let data = self.data(record);
        let log_file = data.join("pgrecall.log");
        let start = Start {
            installation: &installation,
            data_directory: &data,
            log_file: &log_file,
            overrides: &Settings::new(),
        };
        let mut server = Server::start(&start).map_err(|error| failed(format!("{error:#}")))?;
        let begin = Instant::now();
        loop {
            let exited = server.exit_status().map_err(|error| failed(format!("{error:#}")))?;
            let _ = server.poll_log();
            if exited.is_some() {
                return Err(failed(server.failure()));
            }
            if self.postmaster(record)?.is_some_and(|found| found.status == Some(Status::Ready)) {
                return Ok(server.pid());
            }
            if begin.elapsed() > START_LIMIT {
                let _ = server.stop(STOP_LIMIT).await;
                return Err(failed(format!("it was not ready in time: {}", server.failure())));
            }
            tokio::time::sleep(LOOK).await;
        }
    }

    /// Stops the server of a sandbox, whoever started it. Says whether one ran.
    pub(super) async fn stop_server(&self, record: &Record) -> Result<bool, Failure> {
        let Some(found) = self.postmaster(record)? else { return Ok(false) };
        let stopped = stop_found(&found, &self.data(record), STOP_LIMIT).await;
        stopped.map_err(|error| {
            Failure::new(Code::Host, format!("stop the server of sandbox {}: {error:#}", record.id))
        })?;
        Ok(true)
    }
}
