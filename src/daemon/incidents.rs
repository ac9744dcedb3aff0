//! Incidents, as people ask for them over the control socket.

use serde_json::json;

use super::service::{Service, Shown};
use crate::error::{Code, Failure};
use crate::operations::incident::report::Report;
use crate::operations::incident::{self, By, Log};
use crate::repository::Ticket;

impl Service {
    /// Those of an environment, by ticket.
    ///
    /// # Errors
    /// As the store says.
    pub async fn incidents(&self, environment: &str) -> Result<Shown, Failure> {
        let repository = self.repositories.get(environment).await?;
        let mut lines = Vec::new();
        let mut reports = Vec::new();
        for ticket in crate::repository::incident::list(&repository).await? {
            let report = Report::new(environment, &incident::load(&repository, &ticket).await?);
            let state = if report.is_open { "open" } else { "closed" };
            let opened = report.opened_at.map_or_else(String::new, |at| format!(" since {at}"));
            lines.push(format!("{ticket}  {state}{opened}  {}", report.reason.as_deref().unwrap_or_default()));
            reports.push(json!({ "ticket": ticket, "is_open": report.is_open, "opened_at": report.opened_at,
                "opened_by": report.opened_by, "reason": report.reason, "closed_at": report.closed_at }));
        }
        let text = if lines.is_empty() { "no incident".to_owned() } else { lines.join("\n") };
        Ok(Shown::new(&json!({ "incidents": reports }), text))
    }

    /// The report of an incident.
    ///
    /// # Errors
    /// When there is none of that ticket.
    pub async fn incident(&self, environment: &str, ticket: &str) -> Result<Shown, Failure> {
        let repository = self.repositories.get(environment).await?;
        Ok(shown(environment, &incident::load(&repository, &read_ticket(ticket)?).await?))
    }

    /// Closes an incident and gives its report.
    ///
    /// # Errors
    /// When it is not open.
    pub async fn close_incident(
        &self,
        environment: &str,
        ticket: &str,
        by: &str,
        outcome: Option<&str>,
    ) -> Result<Shown, Failure> {
        let repository = self.repositories.get(environment).await?;
        Ok(shown(environment, &incident::close(&repository, &read_ticket(ticket)?, By(by), outcome).await?))
    }
}

/// The report, in words as Markdown.
pub fn shown(environment: &str, log: &Log) -> Shown {
    let report = Report::new(environment, log);
    let text = report.markdown();
    Shown::new(&report, text)
}

/// # Errors
/// With the form that a ticket has.
pub fn read_ticket(text: &str) -> Result<Ticket, Failure> {
    text.parse().map_err(|_| {
        let short: String = text.chars().take(80).collect();
        Failure::new(Code::Usage, format!("understand the ticket {short:?}"))
            .hint("A ticket has 1 to 48 letters, digits, `.`, `_` and `-`.")
    })
}
