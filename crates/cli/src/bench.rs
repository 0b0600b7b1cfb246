//! `moeforge bench`: how fast this machine is with a model, and how fast it could be.

mod generation;
mod limit;
mod scratch;
mod spread;
mod subject;
mod sweep;
mod table;
mod training;

use std::process::ExitCode;

use crate::console::Console;

/// What is measured.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Bench {
    /// Time training steps on made-up tokens, for every combination of batch, length and number of experts.
    Train(training::Args),
    /// Time reading prompts of made-up tokens, for every combination of batch and length.
    Prefill(generation::PrefillArgs),
    /// Time writing tokens one after the other, for every combination of batch and length of the prompt.
    Decode(generation::DecodeArgs),
}

pub(crate) fn run(bench: &Bench, console: &Console) -> anyhow::Result<ExitCode> {
    match bench {
        Bench::Train(args) => training::run(args, console),
        Bench::Prefill(args) => generation::prefill(args, console),
        Bench::Decode(args) => generation::decode(args, console),
    }
}
