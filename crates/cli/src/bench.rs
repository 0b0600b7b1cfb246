//! `moeforge bench`: the speed of this machine with a model, and the share of the machine's peak that it reaches.

mod generation;
mod memory_table;
mod peak;
mod spread;
mod subject;
mod sweep;
mod table;
mod training;

use std::process::ExitCode;

use crate::console::Console;

/// Benchmark training, prefill and decoding: speed, and its share of the machine's peak.
#[derive(Debug, clap::Subcommand)]
pub(crate) enum Bench {
    Train(training::Args),
    Prefill(generation::PrefillArgs),
    Decode(generation::DecodeArgs),
    Memory(memory_table::Args),
}

pub(crate) fn run(bench: &Bench, console: &Console) -> anyhow::Result<ExitCode> {
    match bench {
        Bench::Train(args) => training::run(args, console),
        Bench::Prefill(args) => generation::prefill(args, console),
        Bench::Decode(args) => generation::decode(args, console),
        Bench::Memory(args) => memory_table::run(args, console),
    }
}
