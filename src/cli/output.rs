//! Standard output and standard error, as a person or a script wants them.
//!
//! A reader that goes away (`pgrecall backups shop | head -1`) is not an error: what is left is not printed.

use std::fmt;
use std::io::{self, Write};

use serde::Serialize;

use crate::error::Failure;

/// Where results go and in which form.
#[derive(Debug, Clone, Copy)]
pub struct Output {
    json: bool,
}

#[derive(Serialize)]
struct FailureDocument<'a> {
    error: &'a Failure,
}

impl Output {
    pub fn new(json: bool) -> Self {
        Output { json }
    }

    pub fn is_json(self) -> bool {
        self.json
    }

    /// The result of a verb: a JSON document, or the text that `text` makes.
    pub fn result<T: Serialize>(self, document: &T, text: impl FnOnce(&T) -> String) {
        if self.json {
            self.document(document);
        } else {
            self.line(text(document).trim_end());
        }
    }

    /// Empties the terminal, when there is one.
    pub fn clear(self) {
        use std::io::IsTerminal as _;
        if !self.json && io::stdout().is_terminal() {
            let _ = write!(io::stdout().lock(), "\x1b[H\x1b[2J");
        }
    }

    /// A line of text on standard output.
    pub fn line(self, line: impl fmt::Display) {
        write_line(io::stdout().lock(), line);
    }

    /// A line on standard error: progress and remarks.
    pub fn note(self, line: impl fmt::Display) {
        write_line(io::stderr().lock(), line);
    }

    /// `error: failed to …` and `hint: …`, or both as JSON.
    pub fn failure(self, failure: &Failure) {
        if self.json {
            write_document(io::stderr().lock(), &FailureDocument { error: failure });
            return;
        }
        self.note(format_args!("error: failed to {}", failure.message));
        if let Some(hint) = &failure.hint {
            self.note(format_args!("hint: {hint}"));
        }
    }

    fn document<T: Serialize>(self, document: &T) {
        write_document(io::stdout().lock(), document);
    }
}

fn write_document<T: Serialize>(mut to: impl Write, document: &T) {
    // Writing JSON fails for the same reasons as writing a line, and is treated the same.
    let _ = serde_json::to_writer_pretty(&mut to, document).map_err(io::Error::from).and_then(|()| writeln!(to));
}

fn write_line(mut to: impl Write, line: impl fmt::Display) {
    let _ = writeln!(to, "{line}");
}
