//! What pgrecall may say in its log.

use std::path::Path;

/// The lines of level WARN or ERROR, in text or JSON, without those that contain one of the announced texts.
pub fn unannounced(log: &str, announced: &[String]) -> Vec<String> {
    let alarming = |line: &&str| {
        let mut words = line.split_whitespace().take(2);
        words.any(|w| w == "WARN" || w == "ERROR")
            || line.contains("\"level\":\"WARN\"")
            || line.contains("\"level\":\"ERROR\"")
            || line.contains("panicked at")
    };
    let known = |line: &&str| announced.iter().any(|text| line.contains(text.as_str()));
    log.lines().filter(alarming).filter(|line| !known(line)).map(str::to_owned).collect()
}

/// Fails the test when the log warns of something that the test did not announce.
#[track_caller]
pub fn check(file: &Path, announced: &[String]) {
    let log = String::from_utf8_lossy(&std::fs::read(file).unwrap_or_default()).into_owned();
    let found = unannounced(&log, announced);
    assert!(found.is_empty(), "pgrecall warned of what the test did not announce:\n  {}", found.join("\n  "));
}
