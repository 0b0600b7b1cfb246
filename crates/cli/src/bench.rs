//! `moeforge bench`: how fast this machine is with a model, and how fast it could be.

mod scratch;
mod subject;
mod table;
mod train;

use std::process::ExitCode;

use crate::console::Console;

/// What is measured.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Bench {
    /// Time training steps on made-up tokens, for every combination of batch, length and number of experts.
    Train(train::Args),
}

pub(crate) fn run(bench: &Bench, console: &Console) -> anyhow::Result<ExitCode> {
    match bench {
        Bench::Train(args) => train::run(args, console),
    }
}
