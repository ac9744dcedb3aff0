//! What can be reached: timelines, stored ranges and gaps, coverage, and the way from a target to an exact LSN; pure.
