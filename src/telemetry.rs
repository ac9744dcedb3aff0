//! Logs on standard error, as text or as JSON lines.
//!
//! Under systemd the journal adds the time itself; there a line begins with its priority (`<4>`), so that
//! `journalctl -p warning` finds it, and carries no time of its own.

use std::fmt;
use std::str::FromStr;

use tracing::{Event, Level, Subscriber};
use tracing_subscriber::EnvFilter;
use tracing_subscriber::fmt::format::{Format, Full, Writer};
use tracing_subscriber::fmt::{FmtContext, FormatEvent, FormatFields};
use tracing_subscriber::registry::LookupSpan;

/// The process environment variable that overrides the level for one run.
pub const LEVEL_VARIABLE: &str = "PGRECALL_LOG";

/// How a log line looks.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum LogFormat {
    #[default]
    Text,
    Json,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Settings {
    pub format: LogFormat,
    /// A level, or directives such as `info,pgrecall::archive=debug`.
    pub level: String,
}

impl Default for Settings {
    fn default() -> Self {
        Settings { format: LogFormat::Text, level: "info".to_owned() }
    }
}

impl FromStr for LogFormat {
    type Err = String;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "text" => Ok(LogFormat::Text),
            "json" => Ok(LogFormat::Json),
            _ => Err(format!("{text:?} is neither \"text\" nor \"json\"")),
        }
    }
}

/// Checks that a text is a level or a list of directives.
///
/// # Errors
/// A sentence that names the forms.
pub fn parse_level(text: &str) -> Result<String, String> {
    let wrong = || {
        format!(
            "{text:?} is not a level (error, warn, info, debug, trace) or a list such as \"info,pgrecall::archive=debug\""
        )
    };
    // A single unknown word would be taken for the name of a module, and everything else would fall silent.
    let bare = text.split(',').filter(|part| !part.contains('='));
    let levels_only = bare.into_iter().all(|part| part == "off" || part.parse::<Level>().is_ok());
    match EnvFilter::builder().parse(text) {
        Ok(_) if levels_only => Ok(text.to_owned()),
        _ => Err(wrong()),
    }
}

/// Installs the process's subscriber; a second call changes nothing.
pub fn start(settings: &Settings) {
    let level = std::env::var(LEVEL_VARIABLE).ok().filter(|text| parse_level(text).is_ok());
    let filter = EnvFilter::builder().parse_lossy(level.as_deref().unwrap_or(&settings.level));
    let builder = tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr);
    // Failure means that a subscriber is there already.
    let _ = match (settings.format, is_journal()) {
        (LogFormat::Json, _) => builder.json().flatten_event(true).with_span_list(false).try_init(),
        (LogFormat::Text, true) => builder.event_format(Journal::new()).try_init(),
        (LogFormat::Text, false) => {
            use std::io::IsTerminal as _;
            builder.with_target(false).with_ansi(std::io::stderr().is_terminal()).try_init()
        }
    };
}

/// Whether standard error leads to the journal: `JOURNAL_STREAM` names its device and inode.
fn is_journal() -> bool {
    let Ok(text) = std::env::var("JOURNAL_STREAM") else { return false };
    let Ok(stat) = rustix::fs::fstat(std::io::stderr()) else { return false };
    text == format!("{}:{}", stat.st_dev, stat.st_ino)
}

/// The priority of the line as syslog counts it, then the line.
struct Journal(Format<Full, ()>);

impl Journal {
    fn new() -> Self {
        Journal(Format::default().without_time().with_level(false).with_target(false).with_ansi(false))
    }
}

impl<S, N> FormatEvent<S, N> for Journal
where
    S: Subscriber + for<'a> LookupSpan<'a>,
    N: for<'a> FormatFields<'a> + 'static,
{
    fn format_event(&self, context: &FmtContext<'_, S, N>, mut writer: Writer<'_>, event: &Event<'_>) -> fmt::Result {
        let priority = match *event.metadata().level() {
            Level::ERROR => 3,
            Level::WARN => 4,
            Level::INFO => 6,
            Level::DEBUG | Level::TRACE => 7,
        };
        write!(writer, "<{priority}>")?;
        self.0.format_event(context, writer, event)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_misspelt_level_is_not_taken_for_a_module() {
        assert!(parse_level("info").is_ok());
        assert!(parse_level("warn,pgrecall::archive=debug").is_ok());
        assert!(parse_level("inf").is_err());
        assert!(parse_level("pgrecall=loud").is_err());
    }
}
