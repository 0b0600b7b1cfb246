//! The command line: one file per verb. Printing, progress, environment and exit codes live here and nowhere else.

mod bench;
mod console;
mod data_check;
mod eval;
mod experts;
mod find_lr;
mod generate;
mod inspect;
mod logits;
mod merge;
mod open;
mod plot;
mod precision;
mod quantize;
mod quickstart;
mod report;
mod resume_check;
mod survival;
mod train;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::console::Console;

#[global_allocator]
static ALLOCATOR: kernels::RecyclingAllocator = kernels::RecyclingAllocator::new();

/// Fine-tunes DeepSeek mixture-of-experts models on the machine you own, says how much better they got, and runs them.
#[derive(Debug, Parser)]
#[command(version, propagate_version = true, arg_required_else_help = true)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
    /// Print less: results and errors only.
    #[arg(short, long, global = true)]
    quiet: bool,
    /// Print more: what was opened and how, and the memory held.
    #[arg(short, long, global = true, conflicts_with = "quiet")]
    verbose: bool,
    /// Worker threads; default: one per core.
    #[arg(long, global = true, value_name = "N")]
    threads: Option<usize>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    /// Show what a model is: family, sizes, tensors, number formats.
    Inspect(inspect::Args),
    /// Look at training data as the model will see it.
    #[command(subcommand)]
    Data(data_check::Data),
    /// Train: pretrain, fine-tune, or LoRA, as a recipe says.
    Train(train::Args),
    /// Look for a learning rate: a short run with a growing one, a plot, a suggestion.
    FindLr(find_lr::Args),
    /// Write a page with a run's curves, the load of its experts, its samples and its recipe.
    Report(report::Args),
    /// Train a recipe twice, the second time killed again and again, and compare the results bit for bit.
    ResumeCheck(resume_check::Args),
    /// Measure: loss, perplexity, bits per byte, multiple choice; several models side by side.
    Eval(eval::Args),
    /// Compare what two models predict, and which experts they choose.
    Compare(eval::compare::Args),
    /// Measure which experts a task uses, and write the part of a recipe that trains those.
    Experts(experts::Args),
    /// Write the logits of given token ids, for comparing implementations.
    Logits(logits::Args),
    /// Continue a prompt.
    Generate(generate::Args),
    /// Talk with a model.
    Chat(generate::chat::Args),
    /// Fold an adapter into its model.
    Merge(merge::Args),
    /// Write an adapter as a GGUF file for llama.cpp.
    ExportAdapter(merge::adapter::Args),
    /// Write a model in another number format.
    Quantize(quantize::Args),
    /// Measure what survives of an adapter's effect when it is merged and rounded.
    Survival(survival::Args),
    /// Compare training in f32, bf16 and FP8 on a recipe.
    Precision(precision::Args),
    /// Measure how fast this machine is with a model, and against what it could be.
    #[command(subcommand)]
    Bench(bench::Bench),
    /// The whole road on the repository's own base and data, printing the verbs it runs.
    Quickstart(quickstart::Args),
}

fn main() -> ExitCode {
    let cli = Cli::parse();
    let console = Console::new(cli.quiet, cli.verbose);
    let (verb, threads) = (cli.verb, cli.threads.unwrap_or(0));
    // The whole program runs on one of the pool's workers: from there the kernels' parallel loops start at once,
    // where a thread outside would hand each one over and sleep. Workers get the stack of a main thread.
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .stack_size(8 << 20);
    let result = match pool.build_global() {
        Ok(()) => rayon::scope(|_| run(verb, &console)),
        Err(error) => Err(error.into()),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            console.error(&error);
            console::exit_code(&error)
        }
    }
}

fn run(verb: Verb, console: &Console) -> anyhow::Result<ExitCode> {
    match verb {
        Verb::Inspect(args) => inspect::run(&args, console),
        Verb::Data(data_check::Data::Check(args)) => data_check::run(&args, console),
        Verb::Train(args) => train::run(&args, console),
        Verb::FindLr(args) => find_lr::run(&args, console),
        Verb::Report(args) => report::run(&args, console),
        Verb::ResumeCheck(args) => resume_check::run(&args, console),
        Verb::Eval(args) => eval::run(&args, console),
        Verb::Compare(args) => eval::compare::run(&args, console),
        Verb::Experts(args) => experts::run(&args, console),
        Verb::Logits(args) => logits::run(&args, console),
        Verb::Generate(args) => generate::run(&args, console),
        Verb::Chat(args) => generate::chat::run(&args, console),
        Verb::Merge(args) => merge::run(&args, console),
        Verb::ExportAdapter(args) => merge::adapter::run(&args, console),
        Verb::Quantize(args) => quantize::run(&args, console),
        Verb::Survival(args) => survival::run(&args, console),
        Verb::Precision(args) => precision::run(&args, console),
        Verb::Bench(bench) => bench::run(&bench, console),
        Verb::Quickstart(args) => quickstart::run(&args, console),
    }
}
