//! `pgrecall jobs`: the long work of the daemon; without one, as the store knows it.

use std::fmt::Write as _;

use clap::{Args, Subcommand};
use hyper::Method;

use super::{Context, remote, times};
use crate::config::{Config, Environment};
use crate::control::client::{Client, ClientError};
use crate::control::protocol::{JobReport, Jobs};
use crate::daemon::jobs::{JobId, JobRecord};
use crate::error::{Code, Failure};
use crate::repository::job;
use crate::util::nearest::nearest;
use crate::util::{clock, units};

/// Jobs of one environment that are read from the store.
const SHOWN_MAX: usize = 50;

#[derive(Debug, Subcommand)]
pub enum Verb {
    /// List the jobs, oldest first
    List {
        /// One environment instead of all
        #[arg(value_name = "ENV")]
        environment: Option<String>,
    },
    /// Show a job with its log and its outcome
    Show(JobArgument),
    /// Watch a job until it ends; its outcome is that of this command
    Follow(JobArgument),
    /// Ask a job to end
    Cancel(JobArgument),
}

#[derive(Debug, Args)]
pub struct JobArgument {
    /// The id of the job, or the end of it
    #[arg(value_name = "JOB")]
    job: String,
}

pub async fn run(context: &Context, verb: Verb) -> Result<(), Failure> {
    let client = Client::new(&context.socket());
    match verb {
        Verb::List { environment } => {
            let jobs = list(context, &client, environment.as_deref()).await?;
            context.output.result(&jobs, show_list);
            Ok(())
        }
        Verb::Show(argument) => {
            let jobs = list(context, &client, None).await?;
            let job = find(&argument.job, &jobs)?;
            context.output.result(job, show);
            Ok(())
        }
        Verb::Follow(argument) => {
            let job = find(&argument.job, &daemon_jobs(&client, None).await?)?.job.clone();
            let report = remote::follow(context, &client, &job).await?;
            remote::show_end(context, report)
        }
        Verb::Cancel(argument) => {
            let job = find(&argument.job, &daemon_jobs(&client, None).await?)?.job.clone();
            let report: JobReport = client.ask(Method::POST, &format!("/v1/jobs/{job}/cancel"), None).await?;
            context.output.result(&report, |report| match report.is_final {
                true => format!("job {} has ended already: {}", report.job, report.state),
                false => format!("job {} is asked to end", report.job),
            });
            Ok(())
        }
    }
}

async fn daemon_jobs(client: &Client, environment: Option<&str>) -> Result<Jobs, ClientError> {
    let query = environment.map(|name| format!("?environment={name}")).unwrap_or_default();
    client.ask(Method::GET, &format!("/v1/jobs{query}"), None).await
}

/// What the daemon says; without one, what is stored.
async fn list(context: &Context, client: &Client, environment: Option<&str>) -> Result<Jobs, Failure> {
    match daemon_jobs(client, environment).await {
        Ok(jobs) => return Ok(jobs),
        Err(ClientError::NoDaemon(_)) => {}
        Err(ClientError::Failed(failure)) => return Err(failure),
    }
    let config: Config = context.load_config()?;
    let wanted: Vec<&Environment> = match environment {
        Some(name) => vec![config.environment(name)?],
        None => config.environments.values().collect(),
    };
    let mut jobs = Vec::new();
    for environment in wanted {
        let repository = match environment.open_repository().await {
            Ok(repository) => repository,
            // Nothing was ever stored there.
            Err(failure) if failure.code == Code::NotFound => continue,
            Err(failure) => return Err(failure),
        };
        let loaded = job::load_newest(&repository, SHOWN_MAX).await?;
        jobs.extend(loaded.jobs.into_iter().map(|(fact, last)| JobReport::from(&JobRecord::stored(fact, last))));
    }
    jobs.sort_by(|a, b| a.job.cmp(&b.job));
    Ok(Jobs { jobs })
}

/// The job of that id; the end of an id is enough when no other job has it.
fn find<'j>(wanted: &str, jobs: &'j Jobs) -> Result<&'j JobReport, Failure> {
    let mut fitting =
        jobs.jobs.iter().filter(|job| job.job == wanted || (wanted.len() >= 4 && job.job.ends_with(wanted)));
    let failure = match (fitting.next(), fitting.next()) {
        (Some(job), None) => return Ok(job),
        (Some(_), Some(_)) => Failure::new(Code::Usage, format!("find job {wanted}: several jobs have that end")),
        (None, _) => Failure::new(Code::NotFound, format!("find job {wanted}")),
    };
    let ids = jobs.jobs.iter().map(|job| job.job.as_str());
    Err(match nearest(wanted, ids).filter(|_| wanted.parse::<JobId>().is_ok() || wanted.len() > 12) {
        Some(meant) => failure.hint(format!("Did you mean {meant}?")),
        None => failure.hint("`pgrecall jobs list` names those that there are."),
    })
}

fn show_list(jobs: &Jobs) -> String {
    if jobs.jobs.is_empty() {
        return "no jobs".to_owned();
    }
    let mut text = String::new();
    for job in &jobs.jobs {
        let _ = write!(text, "{}  {:<11} {:<8} {}  by {}", job.job, job.state, job.kind, job.environment, job.asked_by);
        if let Some(ticket) = &job.ticket {
            let _ = write!(text, ", {ticket}");
        }
        if let (Some(phase), false) = (&job.phase, job.is_final) {
            let _ = write!(text, ", {phase}");
        }
        text.push('\n');
    }
    text
}

fn show(job: &JobReport) -> String {
    let mut text = format!("{} of {}, {}\nasked for by {}", job.kind, job.environment, job.state, job.asked_by);
    if let Some(ticket) = &job.ticket {
        let _ = write!(text, " for {ticket}");
    }
    let _ = write!(text, "\naccepted {}", time(&job.accepted_at));
    if let Some(ended) = &job.ended_at {
        let _ = write!(text, "\nended {}", time(ended));
    } else if let Some(phase) = &job.phase {
        let total = job.bytes_total.map(|total| format!(" of {}", units::show_bytes(total))).unwrap_or_default();
        let _ = write!(text, "\n{phase}: {}{total}", units::show_bytes(job.bytes_done));
    }
    for line in &job.log {
        let _ = write!(text, "\n  {}  {}", line.at, line.text);
    }
    if let Some(words) = job.result.as_ref().and_then(|result| result["text"].as_str()) {
        let _ = write!(text, "\n{words}");
    }
    if let Some(error) = &job.error {
        let _ = write!(text, "\nfailed to {error}");
        if let Some(hint) = &error.hint {
            let _ = write!(text, "\nhint: {hint}");
        }
    }
    text
}

/// A time as it was sent, in words.
fn time(text: &str) -> String {
    let parsed = text.parse::<chrono::DateTime<chrono::Utc>>();
    parsed.map_or_else(|_| text.to_owned(), |time| times::show(time.into(), chrono_tz::Tz::UTC, clock::now()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_job_is_found_by_its_id_or_the_end_of_it_and_a_slip_is_recognised() {
        let report = |id: &str| {
            let job = serde_json::json!({
                "job": id, "environment": "shop", "kind": "backup", "state": "done", "is_final": true, "asked_by": "ada",
                "ticket": null, "request": {}, "daemon": "", "accepted_at": "", "began_at": null, "ended_at": null,
                "phase": null, "bytes_done": 0, "bytes_total": null, "cancel_asked": false, "log": [], "result": null,
                "error": null
            });
            serde_json::from_value(job).expect("a report")
        };
        let jobs = Jobs { jobs: vec![report("20261128t034550z_68e1f7"), report("20261128t034551z_0041f7")] };
        let found = |wanted| find(wanted, &jobs).map(|job| job.job.as_str()).map_err(|f| f.hint.unwrap_or_default());
        assert_eq!(found("20261128t034550z_68e1f7"), Ok("20261128t034550z_68e1f7"));
        assert_eq!(found("0041f7"), Ok("20261128t034551z_0041f7"));
        assert_eq!(found("20261128t034550z_68e1f8"), Err("Did you mean 20261128t034550z_68e1f7?".into()));
        assert!(found("1f7").is_err() && found("backup").is_err());
    }
}
