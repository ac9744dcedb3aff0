//! The rules of removal under a scheduler that decides after every request to the store who goes on, who dies, and which
//! copy of a request lands late.

#![allow(clippy::indexing_slicing, clippy::panic, reason = "tests")]

mod calls_tests;
mod model_tests;
mod thirty_days_tests;
mod window_tests;
mod world_tests;
