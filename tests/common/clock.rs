//! Programs whose clock is set back by days, with libfaketime.

use std::path::{Path, PathBuf};
use std::process::Command;

use chrono::{DateTime, Utc};

/// The command's clock shows the time of so many days ago; what measures spans stays as it is.
pub fn set_back(command: &mut Command, days: u32) {
    if days > 0 {
        command.env("LD_PRELOAD", library()).env("FAKETIME", format!("-{days}d"));
        command.env("FAKETIME_DONT_FAKE_MONOTONIC", "1").env("DONT_FAKE_MONOTONIC", "1");
    }
}

/// Variables of a process whose clock shows `time` now, and goes on from there.
pub fn set_to(time: DateTime<Utc>) -> [(&'static str, String); 4] {
    let ahead = (time - Utc::now()).num_seconds();
    [
        ("LD_PRELOAD", library().display().to_string()),
        ("FAKETIME", format!("{ahead:+}")),
        ("FAKETIME_DONT_FAKE_MONOTONIC", "1".to_owned()),
        ("DONT_FAKE_MONOTONIC", "1".to_owned()),
    ]
}

fn library() -> PathBuf {
    let places = ["x86_64-linux-gnu/", "aarch64-linux-gnu/", ""];
    let mut places = places.iter().map(|place| Path::new("/usr/lib").join(place).join("faketime/libfaketimeMT.so.1"));
    places.find(|place| place.exists()).expect("libfaketime is missing: run scripts/setup-tests")
}
