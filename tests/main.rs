//! The integration tests: one binary, because every binary more would link burn once more.
//!
//! A module per theme. A test of one function belongs at the foot of the file that has the function; what needs
//! several crates, the binary, the goldens or the repository itself belongs here.

/// The binary: answers, refusals, exit codes, and runs that are killed.
mod cli;
/// Thousands of files that are not what they should be: no panic, and no more memory than they are worth.
mod fuzz;
/// What the compiler and clippy do not see: arrows between crates, sizes, names, READMEs, links.
mod tidy;
