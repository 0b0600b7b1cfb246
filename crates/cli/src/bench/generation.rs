//! `moeforge bench prefill` and `moeforge bench decode`: prompts read and tokens written as `moeforge generate` does it,
//! timed.
//!
//! Reading multiplies, so it is set against what the machine multiplies at most; writing reads every weight for every
//! token, so it is set against what the machine reads at most.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::bail;
use infer::{Engine, GenerateConfig, SampleConfig, Sequence};
use model::ExpertTraffic;
use serde_json::{Value, json};

use super::limit::{product_speeds, read_speeds};
use super::spread::Spread;
use super::subject::{Subject, ids};
use super::sweep::{Sweep, options};
use super::table::{Column, count, fraction_of, giga, mebibytes, median, seconds, spread};
use crate::console::Console;
use crate::inspect::parameters;
use crate::open::{CacheName, ComputeName, GuessArgs, MemoryArgs, cache_object, repack};
use crate::train::memory;

/// What is measured, and how.
#[derive(Debug, clap::Args)]
struct Args {
    /// Hugging Face folder, GGUF file, or `org/name` in the local Hugging Face cache. A folder with a `config.json` and no
    /// weights, or such a file, gets random ones in f32.
    model: String,
    /// Folder of a LoRA adapter (PEFT) to attach.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Sequences; several numbers with commas are measured one after the other.
    #[arg(long, value_name = "B", value_delimiter = ',', default_value = "1",
          value_parser = clap::value_parser!(u64).range(1..=1 << 10))]
    batch: Vec<u64>,
    /// What products with weights in ggml's blocks round activations to.
    #[arg(long, value_enum, default_value_t = ComputeName::Int8)]
    compute: ComputeName,
    #[command(flatten)]
    memory: MemoryArgs,
    /// In what form what attention reads of earlier tokens is held.
    #[arg(long, value_enum, value_name = "TYPE", default_value_t = CacheName::F16)]
    cache: CacheName,
    /// Runs that are timed, after one that is not.
    #[arg(long, value_name = "R", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    reps: u64,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// Times reading prompts: tokens per second, memory, time to open the model and to its first token, and the share of what
/// this machine multiplies at most.
#[derive(Debug, clap::Args)]
pub(crate) struct PrefillArgs {
    #[command(flatten)]
    args: Args,
    /// Tokens of a prompt; several with commas.
    #[arg(long, value_name = "S", value_delimiter = ',', default_value = "512",
          value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    seq: Vec<u64>,
}

/// Times writing tokens: tokens per second, memory, time to open the model and to its first token, and the share of what
/// this machine reads at most.
#[derive(Debug, clap::Args)]
pub(crate) struct DecodeArgs {
    #[command(flatten)]
    args: Args,
    /// Tokens of the prompt before them; several with commas.
    #[arg(long, value_name = "S", value_delimiter = ',', default_value = "1",
          value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    seq: Vec<u64>,
    /// Tokens that each sequence writes.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    tokens: u64,
    #[command(flatten)]
    guessing: GuessArgs,
}

/// How often the machine's limit is measured before the runs, and again after them.
const LIMITS: usize = 3;

/// The seed of random weights.
const SEED: u64 = 0;

/// What is timed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Prefill,
    /// So many tokens of each sequence, guessed ahead or not.
    Decode(u64, GuessArgs),
}

/// What one line of the table is of.
#[derive(Clone, Copy, Debug)]
struct Combination {
    phase: Phase,
    batch: u64,
    seq: u64,
}

/// The seconds of one run: those that its tokens took, and those to its first token.
#[derive(Clone, Copy, Debug)]
struct Timing {
    secs: f64,
    first_token_secs: f64,
    /// Tokens that were guessed before they were chosen, and those of them that were right.
    guessed: [usize; 2],
    /// Experts that were in memory when chosen, and others, in this run and those before it.
    experts: Option<ExpertTraffic>,
}

const PREFILL_COLUMNS: [Column; 9] = [
    Column("batch", 5, |result| count(&result["batch"])),
    Column("seq", 6, |result| count(&result["seq"])),
    TOKENS_PER_SECOND,
    SPREAD,
    PEAK,
    OPEN,
    FIRST_TOKEN,
    Column("GFLOP/s of limit", 16, |result| {
        fraction_of(result, "limit_flops_per_second")
    }),
    EXPERTS,
];

const DECODE_COLUMNS: [Column; 11] = [
    Column("batch", 5, |result| count(&result["batch"])),
    Column("prompt", 6, |result| count(&result["seq"])),
    TOKENS_PER_SECOND,
    SPREAD,
    PEAK,
    OPEN,
    FIRST_TOKEN,
    Column("MB/token", 8, |result| {
        format!("{:.1}", giga(&result["bytes_per_token"]) * 1e3)
    }),
    Column("GB/s of limit", 13, |result| {
        fraction_of(result, "limit_bytes_per_second")
    }),
    Column("guessed right", 13, |result| {
        let right = result["guessed_right_share"].as_f64();
        right.map_or_else(|| "-".into(), |share| format!("{:.1} %", 100.0 * share))
    }),
    EXPERTS,
];

const TOKENS_PER_SECOND: Column = Column("tokens/s", 8, |result| {
    format!("{:.1}", median(&result["tokens_per_second"]))
});
const SPREAD: Column = Column("(min to max)", 16, |result| {
    spread(&result["tokens_per_second"])
});
const PEAK: Column = Column("peak MiB", 8, |result| mebibytes(&result["peak_bytes"]));
const OPEN: Column = Column("open s", 6, |result| seconds(&result["open_seconds"]));
const FIRST_TOKEN: Column = Column("first token s", 13, |result| {
    seconds(&result["first_token_seconds"])
});

const EXPERTS: Column = Column("experts in memory", 17, |result| {
    let count = |key: &str| result["expert_cache"][key].as_f64();
    match (count("hits"), count("misses")) {
        (Some(hits), Some(misses)) => format!("{:.1} %", 100.0 * hits / (hits + misses).max(1.0)),
        _ => "-".into(),
    }
});

pub(crate) fn prefill(args: &PrefillArgs, console: &Console) -> anyhow::Result<ExitCode> {
    run(&args.args, &args.seq, Phase::Prefill, console)
}

pub(crate) fn decode(args: &DecodeArgs, console: &Console) -> anyhow::Result<ExitCode> {
    let phase = Phase::Decode(args.tokens, args.guessing);
    run(&args.args, &args.seq, phase, console)
}

fn run(args: &Args, seqs: &[u64], phase: Phase, console: &Console) -> anyhow::Result<ExitCode> {
    let subject = Subject::open(&args.model, None)?;
    if args.memory.memory_budget.is_some() && subject.is_random() {
        bail!(
            "--memory-budget: expected a model whose weights are in a file, found none in `{}`",
            args.model
        );
    }
    let mut combinations = Vec::new();
    for &batch in &args.batch {
        let of = |&seq| Combination { phase, batch, seq };
        combinations.extend(seqs.iter().map(of));
    }
    // What is wrong with any of them is said before the first one takes its time.
    for combination in &combinations {
        check(*combination, &subject)?;
    }
    let sweep = Sweep {
        measure: &|combination| measure(args, *combination, &subject, console),
        words: &|combination| words(args, *combination),
        title,
        columns: match phase {
            Phase::Prefill => &PREFILL_COLUMNS,
            Phase::Decode(..) => &DECODE_COLUMNS,
        },
    };
    sweep.run(&combinations, args.json, console)
}

impl Combination {
    /// Tokens that every sequence gets, the one that prefill ends with included.
    fn new_tokens(&self) -> u64 {
        match self.phase {
            Phase::Prefill => 1,
            Phase::Decode(tokens, _) => 1 + tokens,
        }
    }

    /// Whether tokens are guessed ahead.
    fn guessing(&self) -> GuessArgs {
        match self.phase {
            Phase::Prefill => GuessArgs::default(),
            Phase::Decode(_, guessing) => guessing,
        }
    }

    /// Tokens that a run is timed for, of all sequences.
    fn timed_tokens(&self) -> u64 {
        match self.phase {
            Phase::Prefill => self.batch * self.seq,
            Phase::Decode(tokens, _) => self.batch * tokens,
        }
    }
}

fn check(combination: Combination, subject: &Subject) -> anyhow::Result<()> {
    let limit = subject.config.max_position_embeddings as u64;
    let found = combination.seq + combination.new_tokens();
    if found > limit {
        bail!(
            "--seq {}: expected prompt and new tokens to fit the {limit} positions of {}, found {found} tokens",
            combination.seq,
            subject.name
        );
    }
    Ok(())
}

/// The command line that measures one combination.
fn words(args: &Args, combination: Combination) -> Vec<OsString> {
    let (verb, tokens) = match combination.phase {
        Phase::Prefill => ("prefill", None),
        Phase::Decode(tokens, _) => ("decode", Some(tokens)),
    };
    let mut words = vec![verb.into(), args.model.clone().into()];
    let numbers = [
        ("--batch", Some(combination.batch)),
        ("--seq", Some(combination.seq)),
        ("--tokens", tokens),
        ("--reps", Some(args.reps)),
    ];
    words.extend(options(numbers));
    words.extend(["--compute".into(), args.compute.name().into()]);
    words.extend(args.memory.words().into_iter().map(OsString::from));
    words.extend(["--cache".into(), args.cache.cache_type().name().into()]);
    if let Some(adapter) = &args.adapter {
        words.extend(["--adapter".into(), adapter.into()]);
    }
    if combination.guessing().speculative {
        words.push("--speculative".into());
    }
    words
}

/// One combination, in this process.
fn measure(
    args: &Args,
    combination: Combination,
    subject: &Subject,
    console: &Console,
) -> anyhow::Result<Value> {
    let compute = subject.compute(args.compute.compute())?;
    let limit = |runs| match combination.phase {
        Phase::Prefill => product_speeds(compute, runs),
        Phase::Decode(..) => read_speeds(runs),
    };
    let mut limits = limit(LIMITS);
    memory::forget_peak();
    let started = Instant::now();
    let (model, device) = subject.load(args.adapter.as_deref(), SEED, console)?;
    let mtp = subject.module(combination.guessing(), SEED, &device)?;
    let mut engine = Engine::new(model, args.compute.compute(), device);
    engine.mtp = mtp;
    engine.cache = args.cache.cache_type();
    args.memory.place(&mut engine, console);
    repack(&mut engine, console);
    let open_secs = started.elapsed().as_secs_f64();
    let timings = timings(&mut engine, combination, args.reps, console)?;
    let peak_bytes = memory::read().peak_bytes;
    limits.extend(limit(LIMITS));

    let tokens = combination.timed_tokens() as f64;
    let speeds = Spread::of(timings[1..].iter().map(|timing| tokens / timing.secs));
    let mut result = json!({
        "batch": combination.batch,
        "seq": combination.seq,
        "parameters": parameters(&subject.config).total,
        "tokens_per_second": speeds.to_json(),
        "peak_bytes": peak_bytes,
        "open_seconds": open_secs,
        "first_token_seconds": timings[0].first_token_secs,
        "guessed_right_share": right_share(&timings[1..]),
        "expert_cache": traffic(&timings).map(cache_object),
    });
    let cost = cost(
        &engine,
        combination,
        speeds.median,
        Spread::of(limits).median,
    );
    for (key, value) in cost {
        result[key] = value.into();
    }
    Ok(json!({
        "model": subject.name,
        "family": subject.config.model_type.name(),
        "compute": args.compute.name(),
        "cache": args.cache.cache_type().name(),
        "weights": if subject.is_random() { "random" } else { "checkpoint" },
        "seed": SEED,
        "threads": rayon::current_num_threads(),
        "reps": args.reps,
        "results": [result],
    }))
}

/// How often experts were in memory in the runs that count, where they have a cache.
fn traffic(timings: &[Timing]) -> Option<ExpertTraffic> {
    let [warm_up, .., last] = timings else {
        return None;
    };
    Some(last.experts?.since(warm_up.experts?))
}

/// Of what was guessed, the share that was right; none where nothing was.
fn right_share(timings: &[Timing]) -> Option<f64> {
    let [guessed, right]: [usize; 2] =
        std::array::from_fn(|i| timings.iter().map(|timing| timing.guessed[i]).sum());
    (guessed > 0).then(|| right as f64 / guessed as f64)
}

/// All runs, the one that does not count first.
fn timings(
    engine: &mut Engine,
    combination: Combination,
    reps: u64,
    console: &Console,
) -> anyhow::Result<Vec<Timing>> {
    let Combination { batch, seq, .. } = combination;
    let mut progress = console.progress((1 + reps) * combination.timed_tokens(), "tokens");
    let mut timings: Vec<Timing> = Vec::new();
    for run in 0..=reps {
        let status = timings.last().map_or_else(String::new, |timing| {
            let speed = combination.timed_tokens() as f64 / timing.secs;
            format!("{batch} × {seq} {speed:.0} tokens/s")
        });
        let done = run * combination.timed_tokens();
        timings.push(time(engine, combination, &mut |tokens| {
            progress.update(done + tokens, &status);
        })?);
    }
    progress.finish();
    Ok(timings)
}

/// One run; `on_step` is told how many of the timed tokens are done. Always the likeliest token is taken, and none ends the
/// text.
fn time(
    engine: &mut Engine,
    combination: Combination,
    on_step: &mut dyn FnMut(u64),
) -> anyhow::Result<Timing> {
    let Combination { phase, batch, seq } = combination;
    let vocab_size = engine.model.config.vocab_size as u64;
    let prompt = |row| ids(row * seq..(row + 1) * seq, vocab_size).map(|id| id as u32);
    let prompts: Vec<Vec<u32>> = (0..batch).map(|row| prompt(row).collect()).collect();
    let config = GenerateConfig {
        max_tokens: combination.new_tokens() as usize,
        sample: SampleConfig::greedy(),
        stop_ids: vec![],
        logprobs: None,
    };
    let mut done = vec![0; batch as usize];
    let tell = &mut |number: usize, sequence: &mut Sequence| {
        done[number] = match phase {
            Phase::Prefill => seq - sequence.unread_tokens() as u64,
            Phase::Decode(..) => (sequence.token_ids().len() as u64).saturating_sub(1),
        };
        on_step(done.iter().sum());
    };
    let generations = engine.generate_all(&prompts, &config, batch as usize, tell)?;
    let [read, written] = [
        generations.iter().map(|found| found.prefill_secs).sum(),
        // All take part in every step, and each counts the whole of it.
        generations[0].decode_secs,
    ];
    Ok(Timing {
        secs: if phase == Phase::Prefill {
            read
        } else {
            written
        },
        first_token_secs: generations[0].prefill_secs,
        guessed: [
            generations.iter().map(|found| found.guessed).sum(),
            generations.iter().map(|found| found.guessed_right).sum(),
        ],
        experts: engine.model.expert_traffic(),
    })
}

/// What the tokens cost, how fast that was, and what the machine does at most.
fn cost(
    engine: &Engine,
    combination: Combination,
    tokens_per_second: f64,
    limit: f64,
) -> Vec<(&'static str, f64)> {
    let (seq, batch) = (combination.seq as usize, combination.batch as usize);
    match combination.phase {
        Phase::Prefill => {
            let flops = engine.model.prompt_operations(seq) / seq as f64;
            vec![
                ("flops_per_token", flops),
                ("flops_per_second", flops * tokens_per_second),
                ("limit_flops_per_second", limit),
                ("fraction_of_limit", flops * tokens_per_second / limit),
            ]
        }
        Phase::Decode(tokens, _) => {
            // The first step sees the prompt and its own token, and each one more.
            let seen = seq as f64 + (tokens + 1) as f64 / 2.0;
            let traffic = engine.model.decode_traffic(batch, seen, engine.cache);
            let bytes = traffic.total() / batch as f64;
            vec![
                ("bytes_per_token", bytes),
                ("bytes_per_second", bytes * tokens_per_second),
                ("limit_bytes_per_second", limit),
                ("fraction_of_limit", bytes * tokens_per_second / limit),
            ]
        }
    }
}

fn title(measured: &Value) -> String {
    let text = |key: &str| measured[key].as_str().unwrap_or("").to_owned();
    let parameters = &measured["results"][0]["parameters"];
    let weights = match measured["weights"].as_str() {
        Some("random") => format!("random f32 weights (seed {})", measured["seed"]),
        _ => "its own weights".to_owned(),
    };
    format!(
        "{} ({}), {:.1} M parameters, {weights}, computed in {}, cache in {}; {} threads, {} runs each",
        text("model"),
        text("family"),
        giga(parameters) * 1e3,
        text("compute"),
        text("cache"),
        measured["threads"],
        measured["reps"],
    )
}
