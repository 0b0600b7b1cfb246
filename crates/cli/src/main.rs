//! The command line, with one file per verb. Only this crate prints, shows progress, reads the environment and chooses
//! exit codes.

mod bench;
mod console;
mod data_check;
mod device;
mod devices;
mod eval;
mod generate;
mod host;
mod inspect;
mod merge;
mod open;
mod plan;
mod plot;
mod quantize;
mod quickstart;
mod report;
mod rows;
mod train;
mod values;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

use crate::console::{Console, misuse};
use crate::host::launch;

#[global_allocator]
static ALLOCATOR: kernels::RecyclingAllocator = kernels::RecyclingAllocator::new();

const AFTER_HELP: &str = "\
Exit codes: 0 success; 1 error; 2 wrong usage or recipe; 4 a check found a difference; 5 too little memory; 6 a loss or \
gradient is not finite; 7 the loss diverged too often; 8 a rank waited too long for others; 130 or 143 stopped by Ctrl-C or SIGTERM.

Environment variables: MOEFORGE_DEVICE names the device of verbs without --device; HF_HUB_CACHE or HF_HOME locates the Hugging Face cache; XDG_CACHE_HOME locates the cache of tokenized rows; \
NO_COLOR turns colors off.";

/// Threads for each logical CPU that still make sense, if only to measure. They wait for each other, and each has a stack.
const MOST_THREADS_PER_CPU: usize = 16;

/// Fine-tune, evaluate, quantize and run DeepSeek mixture-of-experts models on your own machine.
#[derive(Debug, Parser)]
#[command(
    version,
    propagate_version = true,
    arg_required_else_help = true,
    after_help = AFTER_HELP
)]
struct Cli {
    #[command(subcommand)]
    verb: Verb,
    /// Print only results and errors.
    #[arg(short, long, global = true)]
    quiet: bool,
    /// Print details: opened models, unused tensors, memory.
    #[arg(short, long, global = true, conflicts_with = "quiet")]
    verbose: bool,
    /// Number of worker threads. Default: one per logical CPU.
    #[arg(long, global = true, value_name = "N")]
    threads: Option<usize>,
}

#[derive(Debug, Subcommand)]
enum Verb {
    // The help of a verb is the doc comment of its arguments, unless it has one here.
    /// Run the full pipeline on the bundled model and data: evaluate, train, merge, quantize, generate.
    Quickstart(quickstart::Args),
    Inspect(inspect::Args),
    Plan(plan::verb::Args),
    #[command(subcommand)]
    Data(data_check::Data),
    Train(train::Args),
    FindLr(train::find_lr::Args),
    /// Write an HTML report of a run: curves, expert load, samples, recipe.
    Report(report::Args),
    ResumeCheck(train::resume_check::Args),
    Eval(eval::Args),
    Compare(eval::compare::Args),
    Experts(eval::experts::Args),
    Logits(eval::logits::Args),
    Generate(generate::Args),
    Chat(generate::chat::Args),
    Merge(merge::Args),
    ExportAdapter(merge::adapter::Args),
    Quantize(quantize::Args),
    Survival(eval::survival::Args),
    Precision(train::precision::Args),
    #[command(subcommand)]
    Bench(bench::Bench),
    Devices(devices::Args),
}

fn main() -> ExitCode {
    let cli: Cli = console::arguments::parse();
    let console = Console::new(cli.quiet || launch::is_silent(), cli.verbose);
    let threads = cli.threads.or_else(launch::threads).unwrap_or(0);
    let verb = cli.verb;
    // The program runs on one of the pool's workers, from which the kernels' parallel loops start at once. A thread
    // outside the pool would hand each loop over and sleep. Workers get the stack size of a main thread.
    let pool = rayon::ThreadPoolBuilder::new()
        .num_threads(threads)
        .stack_size(8 << 20);
    let result = match expect_threads(threads).map(|()| pool.build_global()) {
        Ok(Ok(())) => rayon::scope(|_| run(verb, &console)),
        Ok(Err(error)) => Err(error.into()),
        Err(error) => Err(error),
    };
    match result {
        Ok(code) => code,
        Err(error) => {
            let error = launch::with_rank(error);
            console.error(&error);
            console::exit_code(&error)
        }
    }
}

fn expect_threads(threads: usize) -> anyhow::Result<()> {
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get());
    let most = MOST_THREADS_PER_CPU * cpus;
    if threads <= most {
        return Ok(());
    }
    Err(misuse(format!(
        "`--threads`: expected at most {most}, {MOST_THREADS_PER_CPU} for each logical CPU, found {threads}"
    )))
}

fn run(verb: Verb, console: &Console) -> anyhow::Result<ExitCode> {
    if !matches!(verb, Verb::Train(_) | Verb::Bench(bench::Bench::Train(_))) {
        launch::expect_alone()?;
    }
    match verb {
        Verb::Quickstart(args) => quickstart::run(&args, console),
        Verb::Inspect(args) => inspect::run(&args, console),
        Verb::Plan(args) => plan::verb::run(&args, console),
        Verb::Data(data_check::Data::Check(args)) => data_check::run(&args, console),
        Verb::Train(args) => train::run(&args, console),
        Verb::FindLr(args) => train::find_lr::run(&args, console),
        Verb::Report(args) => report::run(&args, console),
        Verb::ResumeCheck(args) => train::resume_check::run(&args, console),
        Verb::Eval(args) => eval::run(&args, console),
        Verb::Compare(args) => eval::compare::run(&args, console),
        Verb::Experts(args) => eval::experts::run(&args, console),
        Verb::Logits(args) => eval::logits::run(&args, console),
        Verb::Generate(args) => generate::run(&args, console),
        Verb::Chat(args) => generate::chat::run(&args, console),
        Verb::Merge(args) => merge::run(&args, console),
        Verb::ExportAdapter(args) => merge::adapter::run(&args, console),
        Verb::Quantize(args) => quantize::run(&args, console),
        Verb::Survival(args) => eval::survival::run(&args, console),
        Verb::Precision(args) => train::precision::run(&args, console),
        Verb::Bench(bench) => bench::run(&bench, console),
        Verb::Devices(args) => devices::run(&args, console),
    }
}
