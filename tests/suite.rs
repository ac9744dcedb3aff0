//! Every integration test in one program: linking once is what makes them quick to build.

mod cli;
