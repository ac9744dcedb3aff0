//! What a customer or an auditor is given of an incident: Markdown, or the same as JSON.

use std::fmt::Write as _;

use serde::Serialize;
use serde_json::Value;

use super::{Entry, Log, What};
use crate::pg::Timestamp;

/// All of it, in the order in which it happened.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct Report {
    pub environment: String,
    pub ticket: String,
    pub is_open: bool,
    pub opened_at: Option<Timestamp>,
    pub opened_by: Option<String>,
    pub reason: Option<String>,
    pub closed_at: Option<Timestamp>,
    pub outcome: Option<String>,
    /// Everybody who did something.
    pub people: Vec<String>,
    /// What was restored, to which second and position, and what the checks said.
    pub restored: Vec<Entry>,
    pub entries: Vec<Entry>,
    /// Entries that are damaged and missing here.
    pub unreadable: usize,
}

impl Report {
    pub fn new(environment: &str, log: &Log) -> Report {
        let opened = log.entries.iter().find(|entry| entry.what == What::Opened);
        let closed = log.entries.iter().rev().find(|entry| entry.what == What::Closed).filter(|_| !log.is_open());
        let text = |entry: Option<&Entry>, field: &str| {
            entry.and_then(|entry| entry.document.get(field)).and_then(Value::as_str).map(str::to_owned)
        };
        let mut people: Vec<String> = log.entries.iter().map(|entry| entry.by.clone()).collect();
        people.sort_unstable();
        people.dedup();
        Report {
            environment: environment.to_owned(),
            ticket: log.ticket.to_string(),
            is_open: log.is_open(),
            opened_at: opened.map(|entry| entry.at),
            opened_by: opened.map(|entry| entry.by.clone()),
            reason: text(opened, "reason"),
            closed_at: closed.map(|entry| entry.at),
            outcome: text(closed, "outcome"),
            people,
            restored: log.entries.iter().filter(|entry| entry.what == What::Restored).cloned().collect(),
            entries: log.entries.clone(),
            unreadable: log.unreadable,
        }
    }

    pub fn markdown(&self) -> String {
        let mut text = format!("# Incident {} of {}\n\n", escaped(&self.ticket), escaped(&self.environment));
        let said = |value: &Option<String>| value.as_deref().map_or_else(|| "not said".to_owned(), escaped);
        let at = |time: Option<Timestamp>| time.map_or_else(|| "not yet".to_owned(), shown);
        let _ = writeln!(text, "* Opened: {} by {}", at(self.opened_at), said(&self.opened_by));
        let _ = writeln!(text, "* Why: {}", said(&self.reason));
        let _ = writeln!(text, "* Closed: {}", at(self.closed_at));
        if !self.is_open {
            let _ = writeln!(text, "* Outcome: {}", said(&self.outcome));
        }
        let people: Vec<String> = self.people.iter().map(|name| escaped(name)).collect();
        let _ = writeln!(text, "* Who took part: {}", people.join(", "));
        text.push_str("\n## Restored\n\n");
        if self.restored.is_empty() {
            text.push_str("Nothing.\n");
        }
        for entry in &self.restored {
            let _ = writeln!(text, "* {} by {}: {}", shown(entry.at), escaped(&entry.by), escaped(&entry.text));
            write_facts(&mut text, &entry.document);
        }
        text.push_str("\n## What was done\n\n| when (UTC) | who | what | |\n|---|---|---|---|\n");
        for entry in &self.entries {
            let (at, by) = (shown(entry.at), escaped(&entry.by));
            let _ = writeln!(text, "| {at} | {by} | {} | {} |", entry.what.as_str(), escaped(&entry.text));
        }
        if self.unreadable > 0 {
            let _ = writeln!(text, "\n{} entries are damaged in the store and missing here.", self.unreadable);
        }
        text
    }
}

/// The plain fields of a document, and lists of texts, one line each.
fn write_facts(text: &mut String, document: &Value) {
    let Some(fields) = document.as_object() else { return };
    for (name, value) in fields {
        let value = match value {
            Value::String(value) => value.clone(),
            Value::Number(_) | Value::Bool(_) => value.to_string(),
            Value::Array(list) if !list.is_empty() => {
                list.iter().filter_map(Value::as_str).collect::<Vec<_>>().join("; ")
            }
            _ => continue,
        };
        if !value.is_empty() {
            let _ = writeln!(text, "  * {}: {}", escaped(&name.replace('_', " ")), escaped(&value));
        }
    }
}

/// To the second: nobody reads more.
fn shown(time: Timestamp) -> String {
    time.to_chrono().map_or_else(|| time.to_string(), |time| time.format("%Y-%m-%d %H:%M:%S").to_string())
}

/// What people wrote stays on its line and in its cell.
fn escaped(text: &str) -> String {
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        match c {
            '\n' | '\r' => out.push(' '),
            '|' | '\\' | '`' | '*' | '_' | '<' | '[' | ']' => {
                out.push('\\');
                out.push(c);
            }
            c => out.push(c),
        }
    }
    out
}
