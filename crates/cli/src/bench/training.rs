//! `moeforge bench train`: training steps of `moeforge train`, timed.
//!
//! The rows are synthetic, and weights are random if the model has none; session, step and optimizer are those of a
//! run. Rows and weights are the same in every process.

use std::ffi::OsString;
use std::fmt::Write;
use std::path::PathBuf;
use std::process::ExitCode;

use ::train::{Event, HeapUse, Loss, Recipe, Session, SessionOptions, StepReport};
use anyhow::Context;
use kernels::device::{CPU, describe, is_gpu, reserved_bytes};
use model::{Compute, OperandRounding};
use parallel::{MessageReader, MessageWriter, World};
use serde_json::{Value, json};

use super::peak::peak_flops;
use super::spread::Spread;
use super::subject::{Subject, SubjectWeights, ids};
use super::sweep::{StepSizes, Sweep, options};
use super::table::{Column, DEVICE, JOULES, PEAK, count, fraction_of, giga, median, place, spread};
use crate::console::{Console, misuse};
use crate::device::{DeviceArgs, expect_right};
use crate::host;
use crate::host::energy::EnergyMeter;
use crate::host::launch::{self, RankArgs};
use crate::host::machine::Machine;
use crate::host::resident::{Resident, ResidentPeak};
use crate::host::scratch::Scratch;
use crate::plan::budget::BudgetArgs;
use crate::plan::lines::parameters;
use crate::plan::run_memory::approve;
use crate::train::{share_out, usage, with_code};

/// Time training steps on synthetic tokens, for all combinations of batch size, length and number of experts.
///
/// Measures tokens per second, memory, and the share of the machine's peak FLOP/s. The default method is LoRA of rank 8
/// on all linear layers and experts, in f32. Started by `mpirun`, it measures ranks that train together, and the memory of the
/// one that needs most.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Model: Hugging Face folder, or `org/name` in the local Hugging Face cache. A folder with a `config.json` and no
    /// weights, or the `config.json` itself, gets random weights.
    model: String,
    /// LoRA adapter to continue from: PEFT folder.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    #[command(flatten)]
    sizes: StepSizes,
    /// Routed experts per layer, for random weights only; several comma-separated values are measured in turn. Default:
    /// the config's number.
    #[arg(long, value_name = "N", value_delimiter = ',', value_parser = clap::value_parser!(u64).range(1..))]
    experts: Vec<u64>,
    /// Timed steps, after a warm-up step.
    #[arg(long, value_name = "R", default_value_t = 5, value_parser = clap::value_parser!(u64).range(1..=10_000))]
    reps: u64,
    /// Recipe setting to override, such as lora.rank=16 or train.method=full. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    device: DeviceArgs,
    #[command(flatten)]
    ranks: RankArgs,
}

/// Settings that have options of their own, or that would change the rows.
const OWN: [(&str, &str); 4] = [
    ("model.adapter", "--adapter"),
    ("model.", "MODEL"),
    ("data.", "--seq, the length of the synthetic rows"),
    ("train.batch_size", "--batch"),
];

/// Measurements of the machine's peak before the steps, and again after them.
const PEAK_RUNS: usize = 3;

/// The columns of the table.
const COLUMNS: [Column; 12] = [
    Column("batch", 5, |result| count(&result["batch"])),
    Column("seq", 5, |result| count(&result["seq"])),
    Column("experts", 7, |result| count(&result["experts"])),
    Column("tokens/s", 8, |result| {
        format!("{:.0}", median(&result["tokens_per_second"]))
    }),
    Column("(min to max)", 15, |result| {
        spread(&result["tokens_per_second"])
    }),
    Column("s/step", 7, |result| {
        format!("{:.3}", median(&result["step_seconds"]))
    }),
    PEAK,
    DEVICE,
    JOULES,
    Column("GFLOP/token", 11, |result| {
        format!("{:.3}", giga(&result["flops_per_token"]))
    }),
    Column("GFLOP/s", 7, |result| {
        format!("{:.0}", giga(&result["flops_per_second"]))
    }),
    Column("of peak", 13, |result| {
        fraction_of(result, "peak_flops_per_second")
    }),
];

/// One line of the table.
#[derive(Clone, Copy, Debug)]
struct TrainingCase {
    batch: u64,
    seq: u64,
    /// None for the config's number.
    experts: Option<u64>,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    check_settings(args)?;
    let cases = cases(args);
    let world = launch::join(&args.ranks, console)?;
    if !world.is_alone() && cases.len() > 1 {
        return Err(misuse(
            "ranks under `mpirun` measure one combination; give one value each of --batch, --seq and --experts"
                .into(),
        ));
    }
    // Errors in any of them are reported before the first one runs.
    for case in &cases {
        Subject::open(&args.model, case.experts)?;
    }
    let sweep = Sweep {
        measure: &|case| measure(args, *case, &world, console),
        words: &|case| words(args, *case),
        title,
        columns: &COLUMNS,
    };
    let done = match cases[..] {
        // The first rank prints.
        [case] if !world.is_first() => {
            measure(args, case, &world, console).map(|_| ExitCode::SUCCESS)?
        }
        _ => sweep.run(&cases, args.json, console)?,
    };
    launch::leave();
    Ok(done)
}

fn check_settings(args: &Args) -> anyhow::Result<()> {
    for setting in &args.set {
        if let Some((key, option)) = OWN.iter().find(|(key, _)| setting.starts_with(key)) {
            return Err(misuse(format!(
                "--set {setting}: expected no `{key}` here; use {option}"
            )));
        }
    }
    Ok(())
}

fn cases(args: &Args) -> Vec<TrainingCase> {
    let experts: Vec<Option<u64>> = match args.experts.as_slice() {
        [] => vec![None],
        experts => experts.iter().copied().map(Some).collect(),
    };
    let mut all = Vec::new();
    for &experts in &experts {
        all.extend(args.sizes.all().map(|(batch, seq)| TrainingCase {
            batch,
            seq,
            experts,
        }));
    }
    all
}

/// One case, in this process.
fn measure(
    args: &Args,
    case: TrainingCase,
    world: &World,
    console: &Console,
) -> anyhow::Result<Value> {
    let subject = &Subject::open(&args.model, case.experts)?;
    if subject.is_random() {
        console.note(format_args!(
            "{} × {}: random weights",
            case.batch, case.seq
        ));
    }
    let scratch = Scratch::new("bench")?;
    let mut recipe = recipe(args, case, subject, &scratch)?;
    share_out(&mut recipe, world.ranks(), console);
    if !recipe.train.accumulate.is_multiple_of(world.ranks()) {
        return Err(misuse(format!(
            "--batch: expected a multiple of the number of ranks, {}, found {}",
            world.ranks(),
            case.batch
        )));
    }
    // Products in other formats are computed in f32.
    let compute = match recipe.precision.compute {
        OperandRounding::Bf16 => Compute::Bf16,
        _ => Compute::F32,
    };
    let device = args.device.open()?;
    let mut peaks = peak_flops(compute, &device, PEAK_RUNS);
    host::reset_peak();
    let resident = ResidentPeak::watch();
    let options = SessionOptions {
        ranks: Some((world, args.ranks.layout())),
        approve: &|forecast| match is_gpu(&device) {
            true => Ok(HeapUse::Fast),
            false => approve(forecast, BudgetArgs::default(), console),
        },
        ..SessionOptions::new(&device, &|folder| Ok(folder.into()))
    };
    let mut session = Session::open_with(recipe, options).map_err(with_code)?;
    expect_right(&device, session.config(), console)?;
    let (reports, joules) = time_steps(&mut session, args, case, console)?;
    let (peak_bytes, timed) = (host::read().peak_bytes, &reports[1..]);
    let resident = resident.so_far();
    let device_bytes = reserved_bytes(&device);
    peaks.extend(peak_flops(compute, &device, PEAK_RUNS));

    let own = RankFigures {
        peak_bytes,
        resident,
        device_bytes,
        peak_flops: Spread::of(peaks).median,
    };
    let measured = MeasuredRun {
        joules,
        subject,
        session: &session,
        timed,
        ranks: own.of_all(world)?,
    };
    Ok(measured.to_json(args, case))
}

/// All steps, the warm-up first, and the joules of the others, or why they are not known.
fn time_steps(
    session: &mut Session,
    args: &Args,
    TrainingCase { batch, seq, .. }: TrainingCase,
    console: &Console,
) -> anyhow::Result<(Vec<StepReport>, Result<f64, &'static str>)> {
    let mut energy = EnergyMeter::start(&Machine::here());
    let mut joules = [0.0; 2];
    let mut progress = console.progress(1 + args.reps, "steps");
    let reports = session.timed_steps(1 + args.reps, &mut |event: &Event| {
        if let Event::Step(report) = event {
            joules[1] = energy.as_mut().map_or(0.0, EnergyMeter::joules);
            if report.step == 1 {
                joules[0] = joules[1];
            }
            let speed = speed(report);
            progress.update(report.step, &format!("{batch} × {seq} {speed:.0} tokens/s"));
        }
    });
    progress.finish();
    let used = energy.map(|_| joules[1] - joules[0]);
    Ok((reports.map_err(with_code)?, used))
}

/// A session whose steps were timed.
struct MeasuredRun<'a> {
    subject: &'a Subject,
    session: &'a Session,
    timed: &'a [StepReport],
    /// Of the timed steps, or why they are not known.
    joules: Result<f64, &'static str>,
    ranks: Vec<RankFigures>,
}

impl MeasuredRun<'_> {
    fn to_json(&self, args: &Args, case: TrainingCase) -> Value {
        let (subject, session, timed) = (self.subject, self.session, self.timed);
        let speeds = Spread::of(timed.iter().map(speed));
        let peak: f64 = self.ranks.iter().map(|rank| rank.peak_flops).sum();
        let rank_bytes =
            |of: fn(&RankFigures) -> Option<u64>| self.ranks.iter().map(of).collect::<Vec<_>>();
        let rank_peak_bytes = rank_bytes(|rank| rank.peak_bytes);
        let cost = session.cost(case.seq as usize).total();
        let recipe = &session.recipe;
        let tokens: usize = timed.iter().map(|report| report.tokens).sum();
        json!({
            "model": subject.name,
            "family": subject.config.model_type.name(),
            "weights": if subject.is_random() { "random" } else { "checkpoint" },
            "seed": recipe.train.seed,
            "method": recipe.train.method,
            "compute": recipe.precision.compute_word(),
            "set": args.set,
            "threads": rayon::current_num_threads(),
            "ranks": self.ranks.len(),
            "layout": session.layout().to_string(),
            "device": args.device.name().unwrap_or_else(|| CPU.into()),
            "adapter": describe(&session.device()).map(|of| of.adapter),
            "reps": args.reps,
            "results": [{
                "batch": case.batch,
                "seq": case.seq,
                "experts": subject.config.moe.as_ref().map(|moe| moe.n_routed_experts),
                "parameters": parameters(&subject.config).total,
                "trained_parameters": session.trained_parameters(),
                "tokens_per_second": speeds.to_json(),
                "step_seconds": Spread::of(timed.iter().map(|report| report.seconds)).to_json(),
                "peak_bytes": rank_peak_bytes.iter().max(),
                "rank_peak_bytes": rank_peak_bytes,
                "rank_mapped_bytes": rank_bytes(|rank| rank.resident.map(|held| held.mapped)),
                "rank_own_bytes": rank_bytes(|rank| rank.resident.map(|held| held.own)),
                "step_memory": timed.iter().map(|report| report.memory).max_by_key(|memory| memory.step),
                "plan": session.plan,
                "device_bytes": rank_bytes(|rank| rank.device_bytes).iter().max(),
                "joules_per_token": self.joules.ok().map(|joules| joules / tokens as f64),
                "energy": self.joules.err(),
                "flops_per_token": cost,
                "flops_per_second": cost * speeds.median,
                "peak_flops_per_second": peak,
                "fraction_of_peak": cost * speeds.median / peak,
            }],
        })
    }
}

/// What a rank measures by itself.
struct RankFigures {
    /// The most memory in use.
    peak_bytes: Option<u64>,
    /// The most of mapped files and of its own.
    resident: Option<Resident>,
    /// Reserved on a GPU.
    device_bytes: Option<u64>,
    /// The most floating-point operations a second.
    peak_flops: f64,
}

impl RankFigures {
    /// Those of all ranks.
    fn of_all(&self, world: &World) -> anyhow::Result<Vec<Self>> {
        let mut message = MessageWriter::default();
        let [mapped, own] = self.resident.map_or([0; 2], |held| [held.mapped, held.own]);
        let (peak, device) = (self.peak_bytes, self.device_bytes);
        for bytes in [peak.unwrap_or(0), mapped, own, device.unwrap_or(0)] {
            message.count(bytes);
        }
        message.number(self.peak_flops);
        let all = world.all("memory and speed", message.finish())?;
        let of_rank = |message: &Vec<u8>| {
            let mut reader = MessageReader::new(message);
            let mut bytes = || Ok::<_, anyhow::Error>(Some(reader.count()?).filter(|n| *n > 0));
            let peak_bytes = bytes()?;
            let [mapped, own] = [bytes()?, bytes()?];
            let resident = mapped.zip(own);
            Ok(Self {
                peak_bytes,
                resident: resident.map(|(mapped, own)| Resident { mapped, own }),
                device_bytes: bytes()?,
                peak_flops: reader.number()?,
            })
        };
        all.iter().map(of_rank).collect()
    }
}

/// The command line that measures one case.
fn words(args: &Args, case: TrainingCase) -> Vec<OsString> {
    let mut words = vec!["train".into(), args.model.clone().into()];
    let numbers = [
        ("--batch", Some(case.batch)),
        ("--seq", Some(case.seq)),
        ("--experts", case.experts),
        ("--reps", Some(args.reps)),
    ];
    words.extend(options(numbers));
    if let Some(adapter) = &args.adapter {
        words.extend(["--adapter".into(), adapter.into()]);
    }
    words.extend(args.device.words());
    words.extend(args.ranks.words().into_iter().map(OsString::from));
    for setting in &args.set {
        words.extend(["--set".into(), setting.into()]);
    }
    words
}

/// The recipe, over synthetic rows in a folder that is not read after the session has opened.
fn recipe(
    args: &Args,
    case: TrainingCase,
    subject: &Subject,
    scratch: &Scratch,
) -> anyhow::Result<Recipe> {
    let TrainingCase { batch, seq, .. } = case;
    let mut recipe = Recipe::default();
    recipe.train.steps = Some(1 + args.reps);
    recipe.train.batch_size = batch as usize;
    recipe.data.max_length = seq as usize;
    recipe.data.path = vec![scratch.path().to_owned()];
    recipe.model.path = Some(match &subject.weights {
        SubjectWeights::Checkpoint(folder) => text(folder.canonicalize()?)?,
        SubjectWeights::Random(_) => subject.name.clone(),
    });
    if let Some(adapter) = &args.adapter {
        let adapter = adapter.canonicalize();
        let adapter = adapter.with_context(|| "--adapter: cannot open the folder".to_owned())?;
        recipe.model.adapter = Some(text(adapter)?.into());
    }
    let file = scratch.write("bench.toml", &recipe.to_toml())?;
    let mut recipe = Recipe::open(&file, &args.set).map_err(usage)?;
    if recipe.train.loss != Loss::CrossEntropy {
        return Err(misuse(
            "--set train.loss: expected `cross-entropy`, because the synthetic rows are not pairs"
                .into(),
        ));
    }
    if let SubjectWeights::Random(config) = &subject.weights {
        // Set after parsing: a recipe refuses an adapter on fresh weights, which are not saved. Here nothing is saved.
        recipe.model.path = None;
        recipe.model.config = Some(scratch.write("config.json", &config.to_string())?);
    }
    let n_rows = (1 + args.reps) * batch * recipe.train.accumulate as u64;
    let rows = rows(n_rows, seq, subject.config.vocab_size as u64);
    scratch.write("train.jsonl", &rows)?;
    Ok(recipe)
}

/// A path as a recipe can hold it.
fn text(path: PathBuf) -> anyhow::Result<String> {
    let text = path.into_os_string().into_string();
    text.map_err(|path| anyhow::anyhow!("`{}`: expected a path in UTF-8", path.display()))
}

/// Rows of synthetic tokens.
fn rows(n_rows: u64, seq: u64, vocab_size: u64) -> String {
    let mut text = String::new();
    for row in 0..n_rows {
        let ids = ids(row * seq..(row + 1) * seq, vocab_size);
        let ids: Vec<String> = ids.map(|id| id.to_string()).collect();
        // Writing to a string cannot fail.
        let _ = writeln!(text, "{{\"input_ids\":[{}]}}", ids.join(","));
    }
    text
}

fn speed(report: &StepReport) -> f64 {
    report.tokens as f64 / report.seconds
}

/// The line above the table.
fn title(measured: &Value) -> String {
    let text = |key: &str| measured[key].as_str().unwrap_or("").to_owned();
    let first = &measured["results"][0];
    let millions = |key: &str| first[key].as_f64().unwrap_or(0.0) / 1e6;
    let weights = match measured["weights"].as_str() {
        Some("random") => format!("random f32 weights (seed {})", measured["seed"]),
        _ => "weights of the checkpoint".to_owned(),
    };
    let settings: Vec<&str> = measured["set"]
        .as_array()
        .into_iter()
        .flatten()
        .filter_map(Value::as_str)
        .collect();
    let settings = if settings.is_empty() {
        String::new()
    } else {
        format!(" ({})", settings.join(", "))
    };
    let ranks = match measured["ranks"].as_u64() {
        Some(1) | None => String::new(),
        Some(_) => format!("{} ranks, {}; ", measured["ranks"], text("layout")),
    };
    format!(
        "{ranks}{} ({}), {:.1} M parameters, {weights}; method {} with {:.1} M trained, compute {}{settings}; {}, {} steps each",
        text("model"),
        text("family"),
        millions("parameters"),
        text("method"),
        millions("trained_parameters"),
        text("compute"),
        place(measured),
        measured["reps"],
    )
}
