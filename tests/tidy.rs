//! The house rules that a compiler does not know: which module may use which, sizes, calls that are banned.
//!
//! A scan of the text, line by line: simple enough to read, and every violation is reported at once. Test code (from
//! `#[cfg(test)]` on, and files named `tests.rs`) is exempt from all but the rules for the whole tree.
#![allow(clippy::panic, reason = "a test")]

use std::fmt::Write as _;
use std::path::{Path, PathBuf};

/// Module, and the modules of this crate that it may use besides itself. The crate's documentation says why.
const LAYERS: &[(&str, &[&str])] = &[
    ("util", &["error"]),
    ("error", &["util"]),
    ("telemetry", &["util", "error"]),
    ("pg", &[]),
    ("wal", &["pg"]),
    ("lineage", &["pg", "wal"]),
    ("repository", LOW),
    ("replication", LOW),
    ("instance", LOW),
    ("archive", MIDDLE),
    ("backup", MIDDLE),
    ("restore", MIDDLE),
    ("retention", MIDDLE),
    ("find", MIDDLE),
    ("dump", MIDDLE),
    ("notify", MIDDLE),
    ("doctor", MIDDLE),
    ("operations", UPPER),
    ("config", &[UPPER_STR, "operations"]),
    ("daemon", &[UPPER_STR, "operations", "config", "telemetry"]),
    ("control", &["daemon", "util", "error"]),
    ("cli", &[UPPER_STR, "operations", "config", "control", "daemon", "telemetry"]),
];
const LOW: &[&str] = &["pg", "wal", "lineage", "util", "error"];
const MIDDLE: &[&str] = &["pg", "wal", "lineage", "util", "error", "repository", "replication", "instance"];
const UPPER: &[&str] = &[UPPER_STR];
/// Stands for everything up to layer 4.
const UPPER_STR: &str = "*4";
const UP_TO_4: &[&str] = &[
    "pg",
    "wal",
    "lineage",
    "util",
    "error",
    "repository",
    "replication",
    "instance",
    "archive",
    "backup",
    "restore",
    "retention",
    "find",
    "dump",
    "notify",
    "doctor",
];
/// Modules that do no input or output, and what they must not touch.
const PURE: &[&str] = &["pg", "wal", "lineage"];
const IMPURE: &[&str] = &["tokio::", "object_store::", "tracing::", "std::fs", "std::net", "std::process"];

/// A text that must not appear in code, the places where it may, and why.
const BANNED: &[(&str, &[&str], &str)] = &[
    (".unwrap()", &[], "say why it holds with expect, or return an error"),
    ("thread::sleep", &["restore/checksums.rs"], "wait on a condition with a deadline"),
    ("println!", &["cli", "main.rs"], "only the command line prints"),
    ("fs::write(", &["util/durable_fs.rs"], "use util::durable_fs"),
    ("fs::rename(", &["util/durable_fs.rs"], "use util::durable_fs"),
    ("Utc::now", &["util/clock.rs"], "use util::clock::now, or take the time as an argument"),
    ("SystemTime::now", &["util/clock.rs"], "use util::clock::now, or take the time as an argument"),
    ("unbounded_channel", &[], "queues are bounded"),
    ("env::set_var", &[], "global state"),
    ("dbg!", &[], "left from debugging"),
    ("#[allow(unsafe_code", &["control/peer.rs"], "no unsafe code but to ask for the groups of a peer"),
];

const FILE_LINES_MAX: usize = 600;
const FUNCTION_LINES_MAX: usize = 70;

#[test]
fn the_tree_is_tidy() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let mut found = String::new();
    for file in files(&root.join("src"), &["rs"]) {
        let text = read(&file);
        let name = relative(&file, &root.join("src"));
        if !name.ends_with("tests.rs") {
            let code = without_tests(&text);
            check_layers(&name, code, &mut found);
            check_banned(&name, code, &mut found);
            check_sizes(&format!("src/{name}"), code, &mut found);
        }
    }
    for file in files(&root.join("tests"), &["rs"]) {
        let text = read(&file);
        check_sizes(&relative(&file, root), &text, &mut found);
    }
    for place in ["src", "tests", "benches", "scripts", "docs", ".ci"] {
        for file in files(&root.join(place), &["rs", "py", "md", "toml", "sh", ""]) {
            check_whole_tree(&relative(&file, root), &read(&file), &mut found);
        }
    }
    assert!(found.is_empty(), "house rules (see the layers and limits in tests/tidy.rs):\n{found}");
}

fn check_layers(name: &str, code: &str, found: &mut String) {
    let module = name.split(['/', '.']).next().unwrap_or_default();
    if ["lib", "main"].contains(&module) {
        return;
    }
    let Some((_, allowed)) = LAYERS.iter().find(|(m, _)| *m == module) else {
        report(found, name, 1, &format!("module {module} has no layer: add it to tests/tidy.rs"));
        return;
    };
    let may = |used: &str| {
        used == module || allowed.contains(&used) || (allowed.contains(&UPPER_STR) && UP_TO_4.contains(&used))
    };
    for (number, line) in code_lines(code) {
        for used in used_modules(line) {
            if LAYERS.iter().any(|(m, _)| *m == used) && !may(used) {
                report(found, name, number, &format!("{module} must not use {used}"));
            }
        }
        if PURE.contains(&module) {
            for what in IMPURE.iter().filter(|what| line.contains(**what)) {
                report(found, name, number, &format!("{module} is pure and must not use {what}"));
            }
        }
    }
}

/// The modules after `crate::` in a line, also in braces: `use crate::{pg::Lsn, wal}`.
fn used_modules(line: &str) -> Vec<&str> {
    let mut modules = Vec::new();
    for after in line.split("crate::").skip(1) {
        let group = after.strip_prefix('{').map_or(after, |inside| inside.split("};").next().unwrap_or(inside));
        let mut depth = 0;
        let mut start = 0;
        let parts = if group.len() == after.len() { vec![after] } else { split_top(group, &mut depth, &mut start) };
        for part in parts {
            let word = part.trim().split(|c: char| !c.is_alphanumeric() && c != '_').next().unwrap_or_default();
            modules.push(word);
        }
    }
    modules
}

/// Splits at the commas that are not within braces.
fn split_top<'a>(group: &'a str, depth: &mut i32, start: &mut usize) -> Vec<&'a str> {
    let mut parts = Vec::new();
    for (at, c) in group.char_indices() {
        match c {
            '{' => *depth += 1,
            '}' => *depth -= 1,
            ',' if *depth == 0 => {
                parts.push(&group[*start..at]);
                *start = at + 1;
            }
            _ => {}
        }
    }
    parts.push(&group[*start..]);
    parts
}

fn check_banned(name: &str, code: &str, found: &mut String) {
    for (number, line) in code_lines(code) {
        for (text, places, why) in BANNED {
            let here = line.match_indices(text).any(|(at, _)| {
                // `println!` is not `eprintln!`, and `fs::write(` is not `durable_fs::write(`.
                let before = line[..at].chars().next_back();
                text.starts_with(['.', '#']) || !before.is_some_and(|c| c.is_alphanumeric() || c == '_')
            });
            if here && !places.iter().any(|p| name == *p || name.starts_with(&format!("{p}/"))) {
                report(found, name, number, &format!("{text}: {why}"));
            }
        }
    }
}

fn check_sizes(name: &str, code: &str, found: &mut String) {
    let lines: Vec<&str> = code.lines().collect();
    if lines.len() > FILE_LINES_MAX {
        report(found, name, lines.len(), &format!("a file has at most {FILE_LINES_MAX} lines without its tests"));
    }
    for (start, line) in lines.iter().enumerate() {
        let body = line.trim_start();
        let words = body.split('(').next().unwrap_or_default();
        let is_function = words.split_whitespace().any(|w| w == "fn")
            && ["fn ", "pub", "async ", "const ", "unsafe "].iter().any(|w| body.starts_with(w));
        if !is_function {
            continue;
        }
        let indent = &line[..line.len() - body.len()];
        let close = format!("{indent}}}");
        let end = lines[start..].iter().position(|l| *l == close || (l.ends_with(';') && *l == *line));
        if let Some(length) = end.map(|e| e + 1).filter(|length| *length > FUNCTION_LINES_MAX) {
            let what = format!("a function of {length} lines; {FUNCTION_LINES_MAX} is the limit");
            report(found, name, start + 1, &what);
        }
    }
}

fn check_whole_tree(name: &str, text: &str, found: &mut String) {
    if name == "tests/tidy.rs" {
        return;
    }
    for (index, line) in text.lines().enumerate() {
        let mut rule = |bad: bool, what: &str| {
            if bad {
                report(found, name, index + 1, what);
            }
        };
        let rust = name.ends_with(".rs");
        rule(rust && line.contains("#[ignore"), "a slow test asks for PGRECALL_SLOW=1; none is ignored");
        rule(rust && line.contains("#[should_panic"), "check the error instead");
        let word = |w: &str| line.split(|c: char| !c.is_alphanumeric()).any(|x| x == w);
        rule(rust && (word("TODO") || word("FIXME") || word("XXX")), "say it in an issue");
        let path = ["/root/", "/home/"].iter().any(|p| line.contains(p));
        rule(path, "a path of one machine");
    }
}

/// The lines that are not comments, with their numbers.
fn code_lines(code: &str) -> impl Iterator<Item = (usize, &str)> {
    code.lines().enumerate().map(|(i, l)| (i + 1, l)).filter(|(_, l)| !l.trim_start().starts_with("//"))
}

/// What comes before the module of tests.
fn without_tests(text: &str) -> &str {
    text.find("#[cfg(test)]\nmod ").map_or(text, |at| &text[..at])
}

fn report(found: &mut String, name: &str, line: usize, what: &str) {
    writeln!(found, "  {name}:{line}: {what}").expect("write to a string");
}

fn read(file: &Path) -> String {
    let bytes = std::fs::read(file).unwrap_or_else(|e| panic!("read {}: {e}", file.display()));
    String::from_utf8_lossy(&bytes).into_owned()
}

fn relative(file: &Path, root: &Path) -> String {
    file.strip_prefix(root).unwrap_or(file).display().to_string()
}

/// The files below `dir` whose names end so, sorted; none when there is no such directory.
fn files(dir: &Path, extensions: &[&str]) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let Ok(entries) = std::fs::read_dir(dir) else { return found };
    for path in entries.flatten().map(|e| e.path()) {
        if path.is_dir() {
            found.extend(files(&path, extensions));
        } else if extensions.contains(&path.extension().and_then(|e| e.to_str()).unwrap_or_default()) {
            found.push(path);
        }
    }
    found.sort();
    found
}

#[test]
fn uses_are_seen_in_every_form() {
    let check = |line, expected: &[&str]| assert_eq!(used_modules(line), expected, "{line}");
    check("use crate::pg::Lsn;", &["pg"]);
    check("use crate::{pg::{Lsn, TimelineId}, wal};", &["pg", "wal"]);
    check("fn f(x: crate::util::Digest) -> crate::error::Failure {", &["util", "error"]);
    check("use super::x;", &[]);
}
