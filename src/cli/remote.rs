//! What the running daemon does for a command.

use hyper::Method;
use serde::Serialize;
use serde_json::Value;

use super::progress::Progress;
use super::{Context, interrupted};
use crate::control::client::Client;
use crate::control::protocol::{Accepted, JobReport};
use crate::error::{Code, Failure};

/// A request's words.
pub fn body(words: &impl Serialize) -> Value {
    serde_json::to_value(words).expect("our own types are representable in JSON")
}

/// Asks for a document and prints it.
pub async fn show(
    context: &Context,
    client: &Client,
    method: Method,
    path: &str,
    body: Option<&Value>,
) -> Result<(), Failure> {
    let document: Value = client.ask(method, path, body).await?;
    print(context, document);
    Ok(())
}

/// Begins a job and follows it to its end; the job goes on when this process does not.
///
/// # Errors
/// As the job says.
pub async fn run_job(context: &Context, client: &Client, path: &str, body: &Value) -> Result<JobReport, Failure> {
    let accepted: Accepted = client.ask(Method::POST, path, Some(body)).await?;
    if !context.output.is_json() {
        context.output.note(format_args!("job {}", accepted.job));
    }
    follow(context, client, &accepted.job).await
}

/// Follows a job to its end.
///
/// # Errors
/// As the job says, and when this process is interrupted.
pub async fn follow(context: &Context, client: &Client, job: &str) -> Result<JobReport, Failure> {
    let mut progress = Progress::new(context.output);
    let followed = client.follow(job, |report| {
        report.log.iter().for_each(|line| progress.note(&line.text));
        progress.show(report.phase.as_deref().unwrap_or(&report.state), report.bytes_done, report.bytes_total);
    });
    let report = tokio::select! {
        biased;
        () = interrupted() => {
            let failure = Failure::new(Code::Cancelled, format!("wait for job {job}: interrupted"));
            return Err(failure.hint(format!("It goes on: `pgrecall jobs follow {job}`, `pgrecall jobs cancel {job}`.")));
        }
        followed = followed => followed?,
    };
    match &report.error {
        Some(error) => Err(error.clone()),
        None => Ok(report),
    }
}

/// Prints what came of a job.
pub fn show_end(context: &Context, report: JobReport) -> Result<(), Failure> {
    print(context, report.result.unwrap_or(Value::Null));
    Ok(())
}

/// A document with its words in `text`.
pub fn print(context: &Context, mut document: Value) {
    let text = document.as_object_mut().and_then(|fields| fields.remove("text"));
    context.output.result(&document, |document| match text {
        Some(Value::String(text)) => text,
        _ => document.to_string(),
    });
}
