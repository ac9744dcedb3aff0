//! What a repository held against itself says, in words.

use std::fmt::Write as _;

use crate::error::{Code, Failure};
use crate::repository::inspect::{Report, Severity};
use crate::util::units::show_bytes;

/// For people.
pub fn show(report: &Report) -> String {
    let mut text = format!(
        "{} backups, {} packs, {} WAL objects, {} stored",
        report.backups,
        report.packs,
        report.wal_objects,
        show_bytes(report.stored_bytes)
    );
    if report.read.objects > 0 {
        let _ = write!(text, "\n{} objects read, {}", report.read.objects, show_bytes(report.read.bytes));
    }
    for finding in &report.findings {
        let kind = if finding.severity == Severity::Note { "note" } else { "problem" };
        let _ = write!(text, "\n{kind}: {}: {}", finding.object, finding.what);
    }
    if report.more_findings > 0 {
        let _ = write!(text, "\nand {} more", report.more_findings);
    }
    if report.is_sound() {
        text.push_str("\nsound");
    }
    text
}

/// Whether nothing is wrong.
///
/// # Errors
/// With the number of problems.
pub fn judge(environment: &str, report: &Report) -> Result<(), Failure> {
    if report.is_sound() {
        return Ok(());
    }
    let problems = report.findings.iter().filter(|finding| finding.severity == Severity::Problem).count() as u64;
    let count = problems.saturating_add(report.more_findings);
    Err(Failure::new(Code::Corrupt, format!("verify {environment}: {count} problems"))
        .hint("Take a new backup now; what the problems name is not restorable from here."))
}
