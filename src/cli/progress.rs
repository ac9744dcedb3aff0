//! How far something is: a bar on a terminal, a line now and then elsewhere, nothing beside JSON.

use std::time::{Duration, Instant};

use indicatif::{ProgressBar, ProgressStyle};

use super::output::Output;
use crate::util::units::show_bytes;

/// Between two lines where there is no terminal.
const LINE_EVERY: Duration = Duration::from_secs(10);
const REDRAW_EVERY: Duration = Duration::from_millis(250);

/// Progress in bytes, on standard error.
pub struct Progress {
    output: Output,
    bar: Option<ProgressBar>,
    last_line: Option<Instant>,
    label: String,
}

impl Progress {
    pub fn new(output: Output) -> Self {
        use std::io::IsTerminal as _;
        let terminal = !output.is_json() && std::io::stderr().is_terminal();
        Progress { output, bar: terminal.then(ProgressBar::no_length), last_line: None, label: String::new() }
    }

    /// Shows `done` of `total` bytes of what `label` says; another label is shown at once.
    pub fn show(&mut self, label: &str, done: u64, total: Option<u64>) {
        if self.output.is_json() {
            return;
        }
        let is_new = self.label != label;
        if is_new {
            label.clone_into(&mut self.label);
        }
        if let Some(bar) = &self.bar {
            if is_new {
                let form = if total.is_some() {
                    "{msg} {wide_bar} {bytes}/{total_bytes} {bytes_per_sec} {eta}"
                } else {
                    "{spinner} {msg} {bytes} {bytes_per_sec}"
                };
                bar.set_style(ProgressStyle::with_template(form).unwrap_or_else(|_| ProgressStyle::default_bar()));
                bar.enable_steady_tick(REDRAW_EVERY);
                bar.set_message(self.label.clone());
            }
            match total {
                Some(total) => bar.set_length(total.max(done)),
                None => bar.unset_length(),
            }
            bar.set_position(done);
            return;
        }
        if is_new || self.last_line.is_none_or(|at| at.elapsed() >= LINE_EVERY) {
            self.last_line = Some(Instant::now());
            match (done, total) {
                (0, None | Some(0)) => self.output.note(format_args!("{label}")),
                (done, Some(total)) => {
                    self.output.note(format_args!("{label}: {} of {}", show_bytes(done), show_bytes(total)));
                }
                (done, None) => self.output.note(format_args!("{label}: {}", show_bytes(done))),
            }
        }
    }

    /// A line that stays.
    pub fn note(&self, line: &str) {
        match &self.bar {
            Some(bar) => bar.suspend(|| self.output.note(line)),
            None if self.output.is_json() => {}
            None => self.output.note(line),
        }
    }
}

impl Drop for Progress {
    fn drop(&mut self) {
        if let Some(bar) = &self.bar {
            bar.finish_and_clear();
        }
    }
}
