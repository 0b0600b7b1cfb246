//! `moeforge bench prefill` and `moeforge bench decode`: prefill and decoding as `moeforge generate` does them, timed.
//!
//! Prefill is bound by arithmetic, so its speed is compared with the machine's peak FLOP/s. Decoding reads every active
//! weight for each token, so its speed is compared with the machine's peak memory bandwidth.

use std::ffi::OsString;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Instant;

use anyhow::bail;
use burn::tensor::Device;
use checkpoint::Folder;
use infer::{Engine, GenerateConfig, REPACKED_AT_ONCE, SampleConfig, Sequence};
use kernels::device::{CPU, describe, is_gpu, reserved_bytes};
use model::footprint::{FrozenBytes, WeightBytes};
use model::{Compute, ExpertTraffic};
use serde_json::{Value, json};

use super::peak::{peak_bandwidth, peak_flops};
use super::spread::Spread;
use super::subject::{Subject, SubjectWeights, ids};
use super::sweep::{Sweep, options};
use super::table::{
    Column, DEVICE, JOULES, PEAK, count, fraction_of, giga, median, place, seconds, spread,
};
use crate::console::Console;
use crate::device::DeviceArgs;
use crate::host;
use crate::host::energy::EnergyMeter;
use crate::host::machine::Machine;
use crate::host::resident::ResidentPeak;
use crate::open::{EngineArgs, GenerationExtent, SpeculationArgs, cache_object, repack};
use crate::plan::generation_need::GenerationNeed;
use crate::plan::lines::parameters;
use crate::values::{CacheValue, ComputeValue};

// What to measure, and how.
#[derive(Debug, clap::Args)]
struct Args {
    /// Model: Hugging Face folder, GGUF file, or `org/name` in the local Hugging Face cache. A folder with a
    /// `config.json` and no weights, or the `config.json` itself, gets random f32 weights.
    model: String,
    /// LoRA adapter to apply: PEFT folder.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Sequences per batch; several comma-separated values are measured in turn.
    #[arg(long, value_name = "B", value_delimiter = ',', default_value = "1",
          value_parser = clap::value_parser!(u64).range(1..=1 << 10))]
    batch: Vec<u64>,
    /// Timed runs, after a warm-up run.
    #[arg(long, value_name = "R", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    reps: u64,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    engine: EngineArgs,
    #[command(flatten)]
    device: DeviceArgs,
}

/// Time prefill of synthetic prompts, for all combinations of batch size and length.
///
/// Measures tokens per second, memory, the time to open the model, the time to the first token, and the share of the
/// machine's peak FLOP/s. With --memory-budget, also measures expert cache hits.
#[derive(Debug, clap::Args)]
pub(crate) struct PrefillArgs {
    /// Tokens per prompt; several comma-separated values are measured in turn.
    #[arg(long, value_name = "S", value_delimiter = ',', default_value = "512",
          value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    seq: Vec<u64>,
    #[command(flatten)]
    args: Args,
}

/// Time token-by-token decoding, for all combinations of batch size and prompt length.
///
/// Measures tokens per second, memory, the time to open the model, the time to the first token, and the share of the
/// machine's peak memory bandwidth. With --memory-budget, also measures expert cache hits; with --speculative, the
/// acceptance rate.
#[derive(Debug, clap::Args)]
pub(crate) struct DecodeArgs {
    /// Tokens per prompt; several comma-separated values are measured in turn.
    #[arg(long, value_name = "S", value_delimiter = ',', default_value = "1",
          value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    seq: Vec<u64>,
    /// Tokens to decode per sequence.
    #[arg(long, value_name = "N", default_value_t = 64, value_parser = clap::value_parser!(u64).range(1..=1 << 20))]
    tokens: u64,
    #[command(flatten)]
    args: Args,
    #[command(flatten)]
    speculation: SpeculationArgs,
}

/// Measurements of the machine's peak before the runs, and again after them.
const PEAK_RUNS: usize = 3;

/// Seed of random weights.
const SEED: u64 = 0;

/// The timed part of generation.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Phase {
    Prefill,
    /// Decodes this many tokens of each sequence.
    Decode(u64, SpeculationArgs),
}

/// One line of the table.
#[derive(Clone, Copy, Debug)]
struct GenerationCase {
    phase: Phase,
    batch: u64,
    seq: u64,
}

/// The seconds of one run, and what was counted in it.
#[derive(Clone, Copy, Debug)]
struct Timing {
    /// Seconds of all timed tokens.
    secs: f64,
    first_token_secs: f64,
    /// Tokens drafted by speculative decoding.
    drafted: usize,
    /// Drafted tokens that were accepted.
    accepted: usize,
    /// Hits and misses of the expert cache in this run and those before it.
    experts: Option<ExpertTraffic>,
}

const PREFILL_COLUMNS: [Column; 11] = [
    Column("batch", 5, |result| count(&result["batch"])),
    Column("seq", 6, |result| count(&result["seq"])),
    TOKENS_PER_SECOND,
    SPREAD,
    PEAK,
    DEVICE,
    JOULES,
    OPEN,
    FIRST_TOKEN,
    Column("of peak GFLOP/s", 15, |result| {
        fraction_of(result, "peak_flops_per_second")
    }),
    EXPERT_HITS,
];

const DECODE_COLUMNS: [Column; 13] = [
    Column("batch", 5, |result| count(&result["batch"])),
    Column("prompt", 6, |result| count(&result["seq"])),
    TOKENS_PER_SECOND,
    SPREAD,
    PEAK,
    DEVICE,
    JOULES,
    OPEN,
    FIRST_TOKEN,
    Column("MB/token", 8, |result| {
        format!("{:.1}", giga(&result["bytes_per_token"]) * 1e3)
    }),
    Column("of peak GB/s", 13, |result| {
        fraction_of(result, "peak_bytes_per_second")
    }),
    Column("accepted", 8, |result| {
        let rate = result["acceptance_rate"].as_f64();
        rate.map_or_else(|| "-".into(), |share| format!("{:.1} %", 100.0 * share))
    }),
    EXPERT_HITS,
];

const TOKENS_PER_SECOND: Column = Column("tokens/s", 8, |result| {
    format!("{:.1}", median(&result["tokens_per_second"]))
});
const SPREAD: Column = Column("(min to max)", 16, |result| {
    spread(&result["tokens_per_second"])
});
const OPEN: Column = Column("open s", 6, |result| seconds(&result["open_seconds"]));
const FIRST_TOKEN: Column = Column("first token s", 13, |result| {
    seconds(&result["first_token_seconds"])
});

const EXPERT_HITS: Column = Column("expert cache hits", 17, |result| {
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
    let phase = Phase::Decode(args.tokens, args.speculation);
    run(&args.args, &args.seq, phase, console)
}

fn run(args: &Args, seqs: &[u64], phase: Phase, console: &Console) -> anyhow::Result<ExitCode> {
    let subject = Subject::open(&args.model, None)?;
    if args.engine.memory.budget.memory_budget.is_some() && subject.is_random() {
        bail!(
            "--memory-budget: expected a model whose weights are in a file, found none in `{}`",
            args.model
        );
    }
    let mut cases = Vec::new();
    for &batch in &args.batch {
        let of = |&seq| GenerationCase { phase, batch, seq };
        cases.extend(seqs.iter().map(of));
    }
    // Errors in any of them are reported before the first one runs.
    for case in &cases {
        check(*case, &subject)?;
    }
    let sweep = Sweep {
        measure: &|case| measure(args, *case, &subject, console),
        words: &|case| words(args, *case),
        title,
        columns: match phase {
            Phase::Prefill => &PREFILL_COLUMNS,
            Phase::Decode(..) => &DECODE_COLUMNS,
        },
    };
    sweep.run(&cases, args.json, console)
}

impl GenerationCase {
    /// New tokens per sequence, including the one that prefill ends with.
    fn new_tokens(&self) -> u64 {
        match self.phase {
            Phase::Prefill => 1,
            Phase::Decode(tokens, _) => 1 + tokens,
        }
    }

    fn speculation(&self) -> SpeculationArgs {
        match self.phase {
            Phase::Prefill => SpeculationArgs::default(),
            Phase::Decode(_, speculation) => speculation,
        }
    }

    /// Timed tokens of a run, over all sequences.
    fn timed_tokens(&self) -> u64 {
        match self.phase {
            Phase::Prefill => self.batch * self.seq,
            Phase::Decode(tokens, _) => self.batch * tokens,
        }
    }
}

fn check(case: GenerationCase, subject: &Subject) -> anyhow::Result<()> {
    let limit = subject.config.max_position_embeddings as u64;
    let found = case.seq + case.new_tokens();
    if found > limit {
        bail!(
            "--seq {}: expected prompt and new tokens to fit the {limit} positions of {}, found {found} tokens",
            case.seq,
            subject.name
        );
    }
    Ok(())
}

/// The command line that measures one case.
fn words(args: &Args, case: GenerationCase) -> Vec<OsString> {
    let (verb, tokens) = match case.phase {
        Phase::Prefill => ("prefill", None),
        Phase::Decode(tokens, _) => ("decode", Some(tokens)),
    };
    let mut words = vec![verb.into(), args.model.clone().into()];
    let numbers = [
        ("--batch", Some(case.batch)),
        ("--seq", Some(case.seq)),
        ("--tokens", tokens),
        ("--reps", Some(args.reps)),
    ];
    words.extend(options(numbers));
    words.extend(args.engine.words().into_iter().map(OsString::from));
    words.extend(args.device.words());
    if let Some(adapter) = &args.adapter {
        words.extend(["--adapter".into(), adapter.into()]);
    }
    if case.speculation().speculative {
        words.push("--speculative".into());
    }
    words
}

/// One case, in this process.
fn measure(
    args: &Args,
    case: GenerationCase,
    subject: &Subject,
    console: &Console,
) -> anyhow::Result<Value> {
    let device = args.device.open()?;
    let (compute, cache) = args.engine.precision(&device, console)?;
    let of_weights = subject.compute(compute.quant())?;
    let peak = || match case.phase {
        Phase::Prefill => peak_flops(of_weights, &device, PEAK_RUNS),
        Phase::Decode(..) => peak_bandwidth(&device, PEAK_RUNS),
    };
    let mut peaks = peak();
    host::reset_peak();
    let resident = ResidentPeak::watch();
    let started = Instant::now();
    let mut engine = open_engine(args, case, subject, (compute, cache), &device, console)?;
    let open_secs = started.elapsed().as_secs_f64();
    let mut energy = EnergyMeter::start(&Machine::here());
    let timings = timings(&mut engine, case, args.reps, console)?;
    // The warm-up counts too: it makes the same tokens.
    let joules = energy.as_mut().map(EnergyMeter::joules);
    let (peak_bytes, resident) = (host::read().peak_bytes, resident.so_far());
    let device_bytes = reserved_bytes(&device);
    peaks.extend(peak());

    let tokens = case.timed_tokens() as f64;
    let speeds = Spread::of(timings[1..].iter().map(|timing| tokens / timing.secs));
    let mut result = json!({
        "batch": case.batch,
        "seq": case.seq,
        "parameters": parameters(&subject.config).total,
        "tokens_per_second": speeds.to_json(),
        "peak_bytes": peak_bytes,
        "own_bytes": resident.map(|held| held.own),
        "mapped_bytes": resident.map(|held| held.mapped),
        "plan": plan(&engine, case, subject)?,
        "device_bytes": device_bytes,
        "joules_per_token": joules.as_ref().ok().map(|joules| joules / tokens / timings.len() as f64),
        "energy": joules.as_ref().err(),
        "open_seconds": open_secs,
        "first_token_seconds": timings[0].first_token_secs,
        "acceptance_rate": acceptance_rate(&timings[1..]),
        "expert_cache": traffic(&timings).map(cache_object),
    });
    let cost = cost(&engine, case, speeds.median, Spread::of(peaks).median);
    for (key, value) in cost {
        result[key] = value.into();
    }
    Ok(json!({
        "model": subject.name,
        "family": subject.config.model_type.name(),
        "compute": compute.name(),
        "cache": cache.cache_type().name(),
        "weights": if subject.is_random() { "random" } else { "checkpoint" },
        "seed": SEED,
        "threads": rayon::current_num_threads(),
        "device": args.device.name().unwrap_or_else(|| CPU.into()),
        "adapter": describe(&device).map(|of| of.adapter),
        "reps": args.reps,
        "results": [result],
    }))
}

/// The engine, its weights where they are to be.
fn open_engine(
    args: &Args,
    case: GenerationCase,
    subject: &Subject,
    (compute, cache): (ComputeValue, CacheValue),
    device: &Device,
    console: &Console,
) -> anyhow::Result<Engine> {
    let model = subject.load(args.adapter.as_deref(), SEED, device, console)?;
    let mtp = subject.module(case.speculation(), SEED, device)?;
    let mut engine = Engine::new(model, compute.quant(), device.clone());
    engine.mtp = mtp;
    engine.cache = cache.cache_type();
    if !is_gpu(device) {
        let extent = GenerationExtent {
            sequences: case.batch as usize,
            context: (case.seq + case.new_tokens()) as usize,
        };
        args.engine.memory.place(&mut engine, extent, console)?;
        repack(&mut engine, console);
    }
    Ok(engine)
}

/// What was predicted of the program's memory.
fn plan(engine: &Engine, case: GenerationCase, subject: &Subject) -> anyhow::Result<Value> {
    let need = GenerationNeed {
        config: &engine.model.config,
        weights: &WeightBytes::default(),
        sequences: case.batch,
        context: case.seq + case.new_tokens(),
        cache: CacheValue::of(engine.cache),
    };
    let (others, weights) = (need.now(), engine.size_bytes() as f64);
    // Products in f32 read weights as they are stored; random ones are the program's own anyway. Others are mapped while they are
    // repacked.
    let are_mapped = engine.compute == Compute::F32 && !subject.is_random();
    let [mapped, held] = match (&subject.weights, are_mapped) {
        (_, true) => [weights, 0.0],
        (SubjectWeights::Checkpoint(path), false) => {
            let folder = Folder::open(path)?;
            let frozen = FrozenBytes::of(&folder, &subject.config, &|_| true)?;
            [frozen.mapped.largest.max(REPACKED_AT_ONCE as f64), weights]
        }
        (SubjectWeights::Random(_), false) => [0.0, weights],
    };
    Ok(json!({
        "mapped": mapped,
        "weights": held,
        "cache": others.cache,
        "pass": others.pass,
        "scratch": others.scratch,
    }))
}

/// Hits and misses of the expert cache in the timed runs; none without a cache.
fn traffic(timings: &[Timing]) -> Option<ExpertTraffic> {
    let [warm_up, .., last] = timings else {
        return None;
    };
    Some(last.experts?.since(warm_up.experts?))
}

/// The share of drafted tokens that were accepted; none without drafts.
fn acceptance_rate(timings: &[Timing]) -> Option<f64> {
    let drafted: usize = timings.iter().map(|timing| timing.drafted).sum();
    let accepted: usize = timings.iter().map(|timing| timing.accepted).sum();
    (drafted > 0).then(|| accepted as f64 / drafted as f64)
}

/// All runs, the warm-up first.
fn timings(
    engine: &mut Engine,
    case: GenerationCase,
    reps: u64,
    console: &Console,
) -> anyhow::Result<Vec<Timing>> {
    let GenerationCase { batch, seq, .. } = case;
    let mut progress = console.progress((1 + reps) * case.timed_tokens(), "tokens");
    let mut timings: Vec<Timing> = Vec::new();
    for run in 0..=reps {
        let status = timings.last().map_or_else(String::new, |timing| {
            let speed = case.timed_tokens() as f64 / timing.secs;
            format!("{batch} × {seq} {speed:.0} tokens/s")
        });
        let done = run * case.timed_tokens();
        timings.push(time(engine, case, &mut |tokens| {
            progress.update(done + tokens, &status);
        })?);
    }
    progress.finish();
    Ok(timings)
}

/// One run; `on_step` gets the number of timed tokens done. Decoding is greedy, and no token ends the text.
fn time(
    engine: &mut Engine,
    case: GenerationCase,
    on_step: &mut dyn FnMut(u64),
) -> anyhow::Result<Timing> {
    let GenerationCase { phase, batch, seq } = case;
    let vocab_size = engine.model.config.vocab_size as u64;
    let prompt = |row| ids(row * seq..(row + 1) * seq, vocab_size).map(|id| id as u32);
    let prompts: Vec<Vec<u32>> = (0..batch).map(|row| prompt(row).collect()).collect();
    let config = GenerateConfig {
        max_tokens: case.new_tokens() as usize,
        sample: SampleConfig::greedy(),
        stop_ids: vec![],
        logprobs: None,
    };
    let mut done = vec![0; batch as usize];
    let tell = &mut |number: usize, sequence: &Sequence| {
        done[number] = match phase {
            Phase::Prefill => seq - sequence.unread_tokens() as u64,
            Phase::Decode(..) => (sequence.token_ids().len() as u64).saturating_sub(1),
        };
        on_step(done.iter().sum());
    };
    let generations = engine.generate_all(&prompts, &config, batch as usize, tell)?;
    let [read, written] = [
        generations.iter().map(|found| found.prefill_secs).sum(),
        // All sequences take part in every step, and each counts all of its seconds.
        generations[0].decode_secs,
    ];
    Ok(Timing {
        secs: if phase == Phase::Prefill {
            read
        } else {
            written
        },
        first_token_secs: generations[0].prefill_secs,
        drafted: generations.iter().map(|found| found.drafted).sum(),
        accepted: generations.iter().map(|found| found.accepted).sum(),
        experts: engine.model.expert_traffic(),
    })
}

/// Cost per token, its rate, and the machine's peak rate.
fn cost(
    engine: &Engine,
    case: GenerationCase,
    tokens_per_second: f64,
    peak: f64,
) -> Vec<(&'static str, f64)> {
    let (seq, batch) = (case.seq as usize, case.batch as usize);
    match case.phase {
        Phase::Prefill => {
            let flops = engine.model.prompt_operations(seq) / seq as f64;
            vec![
                ("flops_per_token", flops),
                ("flops_per_second", flops * tokens_per_second),
                ("peak_flops_per_second", peak),
                ("fraction_of_peak", flops * tokens_per_second / peak),
            ]
        }
        Phase::Decode(tokens, _) => {
            // The first step attends to the prompt and its own token, and each later step to one more.
            let seen = seq as f64 + (tokens + 1) as f64 / 2.0;
            let traffic = engine.model.decode_traffic(batch, seen, engine.cache);
            let bytes = traffic.total() / batch as f64;
            vec![
                ("bytes_per_token", bytes),
                ("bytes_per_second", bytes * tokens_per_second),
                ("peak_bytes_per_second", peak),
                ("fraction_of_peak", bytes * tokens_per_second / peak),
            ]
        }
    }
}

fn title(measured: &Value) -> String {
    let text = |key: &str| measured[key].as_str().unwrap_or("").to_owned();
    let parameters = &measured["results"][0]["parameters"];
    let weights = match measured["weights"].as_str() {
        Some("random") => format!("random f32 weights (seed {})", measured["seed"]),
        _ => "weights of the checkpoint".to_owned(),
    };
    format!(
        "{} ({}), {:.1} M parameters, {weights}, compute {}, KV cache {}; {}, {} runs each",
        text("model"),
        text("family"),
        giga(parameters) * 1e3,
        text("compute"),
        text("cache"),
        place(measured),
        measured["reps"],
    )
}
