//! `moeforge bench`: the speed of this machine with a model, and the share of the machine's peak that it reaches.

mod generation;
mod peak;
mod scratch;
mod spread;
mod subject;
mod sweep;
mod table;
mod training;

use std::process::ExitCode;

use crate::console::Console;

/// What to measure.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Bench {
    /// Time training steps on synthetic tokens, for all combinations of batch size, length and number of experts.
    Train(training::Args),
    /// Time prefill of synthetic prompts, for all combinations of batch size and length.
    Prefill(generation::PrefillArgs),
    /// Time token-by-token decoding, for all combinations of batch size and prompt length.
    Decode(generation::DecodeArgs),
}

pub(crate) fn run(bench: &Bench, console: &Console) -> anyhow::Result<ExitCode> {
    match bench {
        Bench::Train(args) => training::run(args, console),
        Bench::Prefill(args) => generation::prefill(args, console),
        Bench::Decode(args) => generation::decode(args, console),
    }
}
