//! Pins by hand: the backup and the WAL that lead to a moment stay until a day.

use std::fmt::Write as _;
use std::time::Duration;

use chrono_tz::Tz;
use serde::Serialize;

use super::{locate, times};
use crate::error::{Code, Failure};
use crate::lineage::Target;
use crate::lineage::moment::Request;
use crate::pg::Timestamp;
use crate::repository::layout::{PinName, Ticket};
use crate::repository::pin::{self, ListedPin, Pin, PinError};
use crate::repository::{Repository, RepositoryError};
use crate::util::clock;

/// How long what is there when an incident is opened is kept; the pin can be removed, and another one made.
const INCIDENT_KEPT: Duration = Duration::from_hours(30 * 24);

/// What is to be kept.
#[derive(Debug, Clone)]
pub struct PinRequest {
    pub name: String,
    pub moment: Request,
    pub until: Timestamp,
    pub owner: String,
}

/// A pin, as it is told.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct PinReport {
    pub name: String,
    pub target: String,
    pub until: Option<Timestamp>,
    pub incarnation: String,
    pub backup: String,
    pub end_lsn: Option<String>,
    pub owner: Option<String>,
    pub made_at: Option<Timestamp>,
    /// Of a restore that runs.
    pub temporary: bool,
    /// Why it cannot be read: it holds until it is removed.
    pub damaged: Option<String>,
}

impl PinReport {
    pub fn show(&self, zone: Tz) -> String {
        let now = clock::now();
        let mut text = format!("{:?}: {} from backup {}\n", self.name, self.target, self.backup);
        if let Some(until) = self.until {
            let _ = writeln!(text, "    until {}", times::show(until, zone, now));
        }
        if let Some(owner) = &self.owner {
            let kind = if self.temporary { ", for as long as it reads" } else { "" };
            let _ = writeln!(text, "    by {owner}{kind}");
        }
        if let Some(damaged) = &self.damaged {
            let _ = writeln!(text, "    it cannot be read, and holds until it is removed: {damaged}");
        }
        text
    }

    pub fn show_removed(&self) -> String {
        format!("{:?} is pinned no more", self.name)
    }
}

/// All of them, for people.
pub fn show_all(pins: &[PinReport], zone: Tz) -> String {
    match pins.is_empty() {
        true => "nothing is pinned".to_owned(),
        false => pins.iter().map(|pin| pin.show(zone)).collect(),
    }
}

/// Pins what leads to a moment.
///
/// # Errors
/// `Conflict` when the name is taken or the backup leaves just now, `UnreachableTarget` when there is no way to the moment.
pub async fn add(repository: &Repository, environment: &str, request: &PinRequest) -> Result<PinReport, Failure> {
    let taken = pin::list(repository).await?;
    if taken.iter().any(|listed| listed.pin.as_ref().is_ok_and(|pin| pin.name == request.name)) {
        let failure = Failure::new(Code::Conflict, format!("pin {:?}: a pin has this name already", request.name));
        return Err(failure.hint("Give it another name, or remove the other one after this one is there."));
    }
    let now = clock::now();
    if request.until <= now.into() {
        return Err(Failure::new(Code::Usage, format!("pin until {}: that is past", request.until)));
    }
    let (_, plan, _) = locate::plan_any(repository, environment, &request.moment, None).await?;
    let incarnation = plan.incarnation().map_err(|error| Failure::new(Code::Internal, error.to_string()))?;
    let name = PinName { incarnation, backup: plan.backup.id.clone(), random: rand::random() };
    let pin = Pin {
        name: request.name.clone(),
        target: request.moment.target.to_string(),
        timeline: plan.stop.timeline,
        end_lsn: plan.stop.end_lsn,
        until: request.until,
        made_at: now.into(),
        owner: request.owner.clone(),
        temporary: false,
    };
    pin::add(repository, &name, &pin).await.map_err(pin_failure)?;
    // WAL of a tail has no marks: that it is still there now that the pin is, is the proof.
    let again = locate::plan_any(repository, environment, &request.moment, Some(incarnation.ordinal)).await;
    if let Err(failure) = again {
        pin::remove(repository, &name).await?;
        return Err(failure);
    }
    Ok(report(&ListedPin { name, last_modified: now, pin: Ok(pin) }))
}

/// Every pin, those of running restores too.
///
/// # Errors
/// As the store says.
pub async fn list(repository: &Repository) -> Result<Vec<PinReport>, RepositoryError> {
    Ok(pin::list(repository).await?.iter().map(report).collect())
}

/// Removes the pin of this name; one that cannot be read is named as `list` does.
///
/// # Errors
/// `NotFound` when there is none.
pub async fn remove(repository: &Repository, name: &str) -> Result<PinReport, Failure> {
    let listed = pin::list(repository).await?;
    let named = |listed: &&ListedPin| report(listed).name == name;
    let Some(found) = listed.iter().find(named) else {
        let failure = Failure::new(Code::NotFound, format!("remove pin {name:?}: there is no pin of this name"));
        let names = listed.iter().map(|listed| format!("{:?}", report(listed).name)).collect::<Vec<_>>();
        return Err(match names.is_empty() {
            true => failure,
            false => failure.hint(format!("There are {}.", names.join(", "))),
        });
    };
    pin::remove(repository, &found.name).await?;
    Ok(report(found))
}

/// Pins the present for an incident, for [`INCIDENT_KEPT`]; says so in a sentence.
///
/// # Errors
/// As [`add`].
pub async fn keep_present(
    repository: &Repository,
    environment: &str,
    ticket: &Ticket,
    by: &str,
) -> Result<String, Failure> {
    let now = clock::now();
    let until = Timestamp::from(now + INCIDENT_KEPT);
    let name = format!("incident {ticket} at {}", Timestamp::from(now));
    let moment = Request { target: Target::Latest, exclusive: false, timeline: None };
    let request = PinRequest { name, moment, until, owner: by.to_owned() };
    let pinned = add(repository, environment, &request).await?;
    Ok(format!("backup {} and the WAL from its start on are pinned until {until}", pinned.backup))
}

fn report(listed: &ListedPin) -> PinReport {
    let ListedPin { name, pin, .. } = listed;
    let known = pin.as_ref().ok();
    PinReport {
        name: known.map_or_else(|| name.to_string(), |pin| pin.name.clone()),
        target: known.map_or_else(|| "unknown".to_owned(), |pin| pin.target.clone()),
        until: known.map(|pin| pin.until),
        incarnation: name.incarnation.to_string(),
        backup: name.backup.to_string(),
        end_lsn: known.map(|pin| pin.end_lsn.to_string()),
        owner: known.map(|pin| pin.owner.clone()),
        made_at: known.map(|pin| pin.made_at),
        temporary: known.is_some_and(|pin| pin.temporary),
        damaged: pin.as_ref().err().cloned(),
    }
}

fn pin_failure(error: PinError) -> Failure {
    let text = error.to_string();
    match error {
        PinError::Repository(error) => error.into(),
        PinError::Leaving(_) => Failure::new(Code::Conflict, text).retryable().hint(
            "A prune is deciding about it, or died while it did. Try again, or pin a moment that a later backup leads to.",
        ),
        PinError::Gone(_) => Failure::new(Code::Conflict, text)
            .hint("It left the window while this was planned: pin a moment within the window."),
    }
}
