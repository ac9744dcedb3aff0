//! Reads a TOML text key by key and collects every problem with its line.
//!
//! A [`Section`] is one table of the file, with the tables it inherits from behind it: a key is looked up in the first
//! table that has it. Each key that is asked for becomes known; [`Section::finish`] reports the others. Nothing here
//! knows what a key means.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::fmt;
use std::ops::RangeInclusive;
use std::time::Duration;

use serde::Serialize;
use toml::de::{DeTable, DeValue};

use crate::util::nearest::nearest;
use crate::util::units::{parse_bytes, parse_duration, show_bytes, show_duration};

/// One thing that is wrong in a configuration file.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize)]
pub struct Problem {
    pub line: usize,
    /// The path of the key, such as `environment.shop.rpo`; empty where the text is no TOML at all.
    pub key: String,
    pub message: String,
}

impl fmt::Display for Problem {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.key.as_str() {
            "" => write!(f, "line {}: {}", self.line, self.message),
            key => write!(f, "line {}: {key}: {}", self.line, self.message),
        }
    }
}

/// The text being read and what was found wrong with it.
pub struct Document<'t> {
    text: &'t str,
    problems: RefCell<BTreeSet<Problem>>,
    schema: RefCell<BTreeSet<String>>,
}

/// A value with its place in the file.
#[derive(Debug, Clone)]
pub struct Located<T> {
    pub value: T,
    pub line: usize,
    pub key: String,
}

/// One table and those it inherits from.
pub struct Section<'d> {
    document: &'d Document<'d>,
    /// Own table first; each with the path of its keys.
    layers: Vec<(String, &'d DeTable<'d>)>,
    path: String,
    line: usize,
    schema_path: String,
    known: RefCell<Vec<(&'static str, Inherit)>>,
}

/// How a quantity with a unit is written.
struct Quantity<T, E> {
    example: &'static str,
    parse: fn(&str) -> Result<T, E>,
    show: fn(T) -> String,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Inherit {
    Yes,
    No,
}

impl<'t> Document<'t> {
    pub fn new(text: &'t str) -> Self {
        Document { text, problems: RefCell::default(), schema: RefCell::default() }
    }

    /// Parses the text; errors of the syntax become problems.
    pub fn parse(&self) -> DeTable<'t> {
        let (table, errors) = DeTable::parse_recoverable(self.text);
        for error in errors {
            let at = error.span().map_or(0, |span| span.start);
            self.report(self.line_at(at), "", error.message());
        }
        table.into_inner()
    }

    pub fn report(&self, line: usize, key: &str, message: impl Into<String>) {
        self.problems.borrow_mut().insert(Problem { line, key: key.to_owned(), message: message.into() });
    }

    pub fn has_problems(&self) -> bool {
        !self.problems.borrow().is_empty()
    }

    /// Every problem in the order of the lines.
    pub fn into_problems(self) -> Vec<Problem> {
        self.problems.into_inner().into_iter().collect()
    }

    /// Every key that was asked for, with `*` for the name of an environment.
    #[cfg(test)]
    pub fn schema(&self) -> BTreeSet<String> {
        self.schema.borrow().clone()
    }

    pub fn root(&'t self, table: &'t DeTable<'t>) -> Section<'t> {
        Section {
            document: self,
            layers: vec![(String::new(), table)],
            path: String::new(),
            line: 1,
            schema_path: String::new(),
            known: RefCell::default(),
        }
    }

    fn line_at(&self, offset: usize) -> usize {
        self.text.bytes().take(offset).filter(|b| *b == b'\n').count() + 1
    }
}

fn join(path: &str, key: &str) -> String {
    if path.is_empty() { key.to_owned() } else { format!("{path}.{key}") }
}

impl<'d> Section<'d> {
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Line and path of this table, for problems that are found after it was read.
    pub fn place(&self) -> (usize, String) {
        (self.line, self.path.clone())
    }

    /// Reports a problem with this table as a whole.
    pub fn report(&self, message: impl Into<String>) {
        self.document.report(self.line, &self.path, message);
    }

    pub fn report_at<T>(&self, place: &Located<T>, message: impl Into<String>) {
        self.document.report(place.line, &place.key, message);
    }

    fn find(&self, key: &'static str, inherit: Inherit) -> Option<Located<&'d DeValue<'d>>> {
        self.learn(key, inherit);
        let layers = if inherit == Inherit::Yes { self.layers.len() } else { 1 };
        self.layers.iter().take(layers).find_map(|(path, table)| {
            let value = table.get(key)?;
            let line = self.document.line_at(value.span().start);
            Some(Located { value: value.get_ref(), line, key: join(path, key) })
        })
    }

    fn learn(&self, key: &'static str, inherit: Inherit) {
        self.known.borrow_mut().push((key, inherit));
        self.document.schema.borrow_mut().insert(join(&self.schema_path, key));
    }

    fn as_text(&self, found: Located<&'d DeValue<'d>>) -> Option<Located<String>> {
        match found.value.as_str() {
            Some("") => self.document.report(found.line, &found.key, "is empty"),
            Some(text) => return Some(Located { value: text.to_owned(), line: found.line, key: found.key }),
            None => {
                self.document.report(found.line, &found.key, format!("must be a text in quotes, not {}", kind(&found)))
            }
        }
        None
    }

    pub fn text(&self, key: &'static str) -> Option<Located<String>> {
        self.find(key, Inherit::Yes).and_then(|found| self.as_text(found))
    }

    /// A text that belongs to this table alone.
    pub fn own_text(&self, key: &'static str) -> Option<Located<String>> {
        self.find(key, Inherit::No).and_then(|found| self.as_text(found))
    }

    /// Which of several keys that exclude each other is written, in the first table that has one of them.
    pub fn one_of(&self, keys: &[&'static str]) -> Option<(&'static str, Located<String>)> {
        keys.iter().for_each(|key| self.learn(key, Inherit::Yes));
        let (path, table) = self.layers.iter().find(|(_, table)| keys.iter().any(|key| table.contains_key(*key)))?;
        let mut written = keys.iter().filter_map(|key| table.get(*key).map(|value| (*key, value)));
        let (key, value) = written.next()?;
        let line = self.document.line_at(value.span().start);
        let found = Located { value: value.get_ref(), line, key: join(path, key) };
        if let Some((other, _)) = written.next() {
            self.document.report(line, &found.key, format!("cannot be used together with {other}"));
        }
        self.as_text(found).map(|text| (key, text))
    }

    pub fn parsed<T>(&self, key: &'static str, parse: impl Fn(&str) -> Result<T, String>) -> Option<T> {
        let text = self.text(key)?;
        parse(&text.value).map_err(|message| self.report_at(&text, message)).ok()
    }

    pub fn duration(&self, key: &'static str, default: Duration, range: RangeInclusive<Duration>) -> Duration {
        let quantity = Quantity { example: "\"30s\"", parse: parse_duration, show: show_duration };
        self.quantity(key, &quantity, &range).unwrap_or(default)
    }

    pub fn bytes(&self, key: &'static str, default: u64, range: RangeInclusive<u64>) -> u64 {
        let quantity = Quantity { example: "\"16MiB\"", parse: parse_bytes, show: show_bytes };
        self.quantity(key, &quantity, &range).unwrap_or(default)
    }

    fn quantity<T: PartialOrd + Copy, E: ToString>(
        &self,
        key: &'static str,
        quantity: &Quantity<T, E>,
        range: &RangeInclusive<T>,
    ) -> Option<T> {
        let text = self.with_unit(key, quantity.example)?;
        let problem = match (quantity.parse)(&text.value) {
            Ok(value) if range.contains(&value) => return Some(value),
            Ok(_) => {
                let (low, high) = ((quantity.show)(*range.start()), (quantity.show)(*range.end()));
                format!("{:?} is not between {low} and {high}", text.value)
            }
            Err(error) => error.to_string(),
        };
        self.report_at(&text, problem);
        None
    }

    /// A quantity as text; a bare number is refused, because nobody can see whether `30` are seconds or minutes.
    fn with_unit(&self, key: &'static str, example: &str) -> Option<Located<String>> {
        let found = self.find(key, Inherit::Yes)?;
        let bare = found.value.is_integer()
            || found.value.is_float()
            || found
                .value
                .as_str()
                .is_some_and(|text| text.trim().bytes().all(|b| b.is_ascii_digit()) && !text.is_empty());
        if bare {
            self.document.report(found.line, &found.key, format!("needs a unit, in quotes, such as {example}"));
            return None;
        }
        self.as_text(found)
    }

    pub fn integer(&self, key: &'static str, default: u32, range: RangeInclusive<u32>) -> u32 {
        let Some(found) = self.find(key, Inherit::Yes) else { return default };
        let number = found.value.as_integer().and_then(|n| u32::from_str_radix(n.as_str(), n.radix()).ok());
        if let Some(value) = number.filter(|value| range.contains(value)) {
            return value;
        }
        let message = format!("must be a whole number between {} and {}", range.start(), range.end());
        self.document.report(found.line, &found.key, message);
        default
    }

    pub fn boolean(&self, key: &'static str) -> Option<bool> {
        let found = self.find(key, Inherit::Yes)?;
        if found.value.as_bool().is_none() {
            self.document.report(found.line, &found.key, format!("must be true or false, not {}", kind(&found)));
        }
        found.value.as_bool()
    }

    pub fn text_list(&self, key: &'static str) -> Option<Vec<Located<String>>> {
        let found = self.find(key, Inherit::Yes)?;
        let Some(array) = found.value.as_array() else {
            self.document.report(found.line, &found.key, format!("must be a list of texts, not {}", kind(&found)));
            return None;
        };
        let items = array.iter().map(|item| Located {
            value: item.get_ref(),
            line: self.document.line_at(item.span().start),
            key: found.key.clone(),
        });
        Some(items.filter_map(|item| self.as_text(item)).collect())
    }

    /// The table `key`, with the tables of that name that are inherited; one that nobody wrote is empty.
    pub fn table(&self, key: &'static str) -> Section<'d> {
        self.learn(key, Inherit::Yes);
        let mut line = None;
        let mut layers = Vec::new();
        for (path, table) in &self.layers {
            let Some(value) = table.get(key) else { continue };
            let at = self.document.line_at(value.span().start);
            match value.get_ref() {
                DeValue::Table(inner) => {
                    line.get_or_insert(at);
                    layers.push((join(path, key), inner));
                }
                other => {
                    self.document.report(at, &join(path, key), format!("must be a table, not a {}", other.type_str()));
                }
            }
        }
        Section {
            document: self.document,
            path: layers.first().map_or_else(|| join(&self.path, key), |(path, _)| path.clone()),
            layers,
            line: line.unwrap_or(self.line),
            schema_path: join(&self.schema_path, key),
            known: RefCell::default(),
        }
    }

    /// Whether anybody wrote this table.
    pub fn is_written(&self) -> bool {
        !self.layers.is_empty()
    }

    /// The tables below `key`, one a name, each inheriting from the table `base` of this one.
    pub fn named_tables(&self, key: &'static str, base: &'static str) -> Vec<(Located<String>, Section<'d>)> {
        let behind = self.table(base).layers;
        let section = self.table(key);
        let mut out = Vec::new();
        let entries = section.layers.iter().flat_map(|(path, table)| table.iter().map(move |entry| (path, entry)));
        for (path, (name, value)) in entries {
            let at = Located {
                value: name.get_ref().to_string(),
                line: self.document.line_at(name.span().start),
                key: join(path, name.get_ref()),
            };
            let DeValue::Table(table) = value.get_ref() else {
                section.report_at(&at, "must be a table");
                continue;
            };
            let mut layers = vec![(at.key.clone(), table)];
            layers.extend(behind.iter().cloned());
            let named = Section {
                document: self.document,
                layers,
                path: at.key.clone(),
                line: self.document.line_at(value.span().start),
                schema_path: format!("{}.*", join(&self.schema_path, key)),
                known: RefCell::default(),
            };
            out.push((at, named));
        }
        out.sort_by_key(|(at, _)| at.line);
        out
    }

    /// Reports every key that nobody asked for.
    pub fn finish(self) {
        let known = self.known.borrow();
        for (depth, (path, table)) in self.layers.iter().enumerate() {
            for name in table.keys() {
                let line = self.document.line_at(name.span().start);
                let name: &str = name.get_ref();
                match known.iter().find(|(known, _)| *known == name) {
                    Some((_, Inherit::No)) if depth > 0 => {
                        self.document.report(
                            line,
                            &join(path, name),
                            "cannot be inherited: write it in each environment",
                        );
                    }
                    Some(_) => {}
                    None => {
                        let meant = nearest(name, known.iter().map(|(known, _)| *known));
                        let meant = meant.map(|meant| format!(" (did you mean {meant}?)")).unwrap_or_default();
                        self.document.report(line, &join(path, name), format!("unknown key{meant}"));
                    }
                }
            }
        }
    }
}

fn kind(found: &Located<&DeValue<'_>>) -> String {
    match found.value.type_str() {
        name @ ("integer" | "array") => format!("an {name}"),
        name => format!("a {name}"),
    }
}
