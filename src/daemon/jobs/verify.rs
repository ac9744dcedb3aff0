//! Holding a repository against itself, as a job.

use async_trait::async_trait;
use futures::FutureExt as _;
use serde::{Deserialize, Serialize};
use serde_json::Value;

use super::{JobContext, Work};
use crate::daemon::service::Shown;
use crate::error::{Code, Failure};
use crate::operations::verify;
use crate::repository::inspect::{InspectSettings, inspect};

/// How much is looked at.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct VerifyAsked {
    /// Read the data of about so many of a hundred objects; 0 reads none.
    #[serde(default)]
    pub read_percent: u8,
    #[serde(default)]
    pub sample: u32,
    /// Go on after this object.
    #[serde(default)]
    pub after: Option<String>,
}

pub struct VerifyWork(pub VerifyAsked);

#[async_trait]
impl Work for VerifyWork {
    async fn run(&self, job: &JobContext) -> Result<Value, Failure> {
        let VerifyAsked { read_percent, sample, after } = self.0.clone();
        let settings = InspectSettings { read_percent: read_percent.min(100), sample, after };
        job.progress("looking at what is stored", 0, None);
        let inspection = inspect(&job.repository, &settings, |seen| {
            job.progress("reading", seen.bytes, Some(seen.bytes_total));
        });
        let name = &job.spec.environment;
        let report = tokio::select! {
            biased;
            () = job.cancel.cancelled() => return Err(Failure::new(Code::Cancelled, format!("verify {name}: it was cancelled"))),
            report = inspection.boxed() => report?,
        };
        verify::show(&report).lines().for_each(|line| job.log(line));
        verify::judge(name, &report)?;
        let text = verify::show(&report);
        Ok(Shown::new(&report, text).into_result())
    }
}
