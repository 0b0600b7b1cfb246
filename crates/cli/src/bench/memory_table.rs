//! `moeforge bench memory`: predicted and measured memory, component by component.

use std::ffi::OsString;
use std::process::ExitCode;

use ::train::{PROGRAM, PROGRAM_MAPPED};
use serde_json::{Value, json};

use super::sweep::{StepSizes, measure_apart};
use crate::console::Console;

/// Compare predicted with measured memory, by component, for training, prefill and decoding.
///
/// Each run is a process of its own. Every component is compared by itself, so that two errors do not hide each other; mapped
/// files are apart from the program's own memory. Measured on Linux.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Models: Hugging Face folders or GGUF files; a `config.json` gets random weights.
    #[arg(required = true)]
    models: Vec<String>,
    #[command(flatten)]
    sizes: StepSizes,
    /// Settings of a training run, as KEY=VALUE,…; may be repeated, one run each. Default: LoRA and full training, in f32, bf16
    /// and FP8, with and without checkpointing.
    #[arg(long = "run", value_name = "KEY=VALUE,…")]
    runs: Vec<String>,
    /// Leave out prefill and decoding.
    #[arg(long)]
    training_only: bool,
    /// Print one JSON object instead of a table.
    #[arg(long)]
    json: bool,
}

/// The runs unless others are given.
const MEMORY_RUNS: [&str; 7] = [
    "",
    "train.checkpointing=block",
    "precision.compute=bf16",
    "precision.compute=bf16,train.checkpointing=block",
    "precision.compute=fp8",
    "train.method=full",
    "train.method=full,train.checkpointing=block,precision.compute=bf16",
];

/// A part of the memory, in bytes.
struct Compared {
    what: &'static str,
    measured: f64,
    predicted: f64,
}

/// What is run.
struct MemoryCase {
    words: Vec<OsString>,
    title: String,
    is_training: bool,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let (mut all, mut worst) = (Vec::new(), [0.0_f64; 2]);
    for case in cases(args) {
        let measured = match measure_apart(&case.words, console)? {
            Ok(measured) => measured,
            Err(code) => return Ok(code),
        };
        let result = &measured["results"][0];
        let parts = if case.is_training {
            training(result)
        } else {
            generation(result)
        };
        if !args.json {
            print(&case.title, &parts, console);
        }
        for (worst, part) in worst.iter_mut().zip(&parts) {
            *worst = worst.max(part.error().abs());
        }
        all.push(object(&case.title, &parts));
    }
    if args.json {
        console.result(format_args!("{:#}", json!({ "runs": all })));
    } else {
        console.result(format_args!(
            "{} runs; largest difference: {:.1} % of mapped files, {:.1} % of the program's own memory",
            all.len(),
            100.0 * worst[0],
            100.0 * worst[1]
        ));
    }
    Ok(ExitCode::SUCCESS)
}

fn cases(args: &Args) -> Vec<MemoryCase> {
    let runs: Vec<&str> = match args.runs.as_slice() {
        [] => MEMORY_RUNS.to_vec(),
        runs => runs.iter().map(String::as_str).collect(),
    };
    let mut cases = Vec::new();
    for model in &args.models {
        for (batch, seq) in args.sizes.all() {
            let shape = |verb: &str| -> Vec<OsString> {
                let numbers = [("--batch", batch), ("--seq", seq), ("--reps", 1)];
                let numbers = numbers.into_iter();
                let numbers = numbers.flat_map(|(name, n)| [name.into(), n.to_string().into()]);
                [OsString::from(verb), model.into()]
                    .into_iter()
                    .chain(numbers)
                    .collect()
            };
            for run in &runs {
                let mut words = shape("train");
                let settings = run.split(',').filter(|setting| !setting.is_empty());
                settings.for_each(|setting| words.extend(["--set".into(), setting.into()]));
                let run = if run.is_empty() { "LoRA, f32" } else { run };
                cases.push(MemoryCase {
                    words,
                    title: format!("{model}, {batch} × {seq}, {run}"),
                    is_training: true,
                });
            }
            if args.training_only {
                continue;
            }
            for verb in ["prefill", "decode"] {
                cases.push(MemoryCase {
                    words: shape(verb),
                    title: format!("{model}, {batch} × {seq}, {verb}"),
                    is_training: false,
                });
            }
        }
    }
    cases
}

impl Compared {
    /// The difference as a share of what was measured.
    fn error(&self) -> f64 {
        if self.measured == self.predicted {
            return 0.0;
        }
        self.predicted / self.measured.max(1.0) - 1.0
    }
}

fn number(value: &Value) -> f64 {
    value.as_f64().unwrap_or(0.0)
}

/// Mapped and own memory, then the parts of the latter.
fn training(result: &Value) -> Vec<Compared> {
    let (plan, step) = (&result["plan"], &result["step_memory"]);
    let of = |name: &str| number(&plan[name]);
    let held = of("weights") + of("updates") + of("moments") + of("scratch");
    let own = PROGRAM + held + of("step") + of("gaps");
    let (resting, saved, whole) = (
        number(&step["resting"]),
        number(&step["saved"]),
        number(&step["step"]),
    );
    let measured_own = number(&result["rank_own_bytes"][0]);
    let part = |what, measured, predicted| Compared {
        what,
        measured,
        predicted,
    };
    vec![
        part(
            "mapped",
            number(&result["rank_mapped_bytes"][0]),
            of("mapped") + PROGRAM_MAPPED,
        ),
        part("own", measured_own, own),
        part("weights, updates, means, scratch", resting, held),
        part("saved activations", saved, of("saved")),
        part("a step", whole, of("step")),
        part(
            "the program and gaps",
            measured_own - resting - whole,
            PROGRAM + of("gaps"),
        ),
    ]
}

fn generation(result: &Value) -> Vec<Compared> {
    let plan = &result["plan"];
    let of = |name: &str| number(&plan[name]);
    let own = PROGRAM + of("weights") + of("cache") + of("pass") + of("scratch");
    vec![
        Compared {
            what: "mapped",
            measured: number(&result["mapped_bytes"]),
            predicted: of("mapped") + PROGRAM_MAPPED,
        },
        Compared {
            what: "own",
            measured: number(&result["own_bytes"]),
            predicted: own,
        },
    ]
}

fn print(title: &str, parts: &[Compared], console: &Console) {
    console.result(title);
    for part in parts {
        let mib = |bytes: f64| bytes / f64::from(1 << 20);
        console.result(format_args!(
            "  {:<34}{:>10.0} MiB measured{:>10.0} predicted{:>8.1} %",
            part.what,
            mib(part.measured),
            mib(part.predicted),
            100.0 * part.error()
        ));
    }
}

fn object(title: &str, parts: &[Compared]) -> Value {
    let parts = parts.iter().map(|part| {
        json!({
            "what": part.what,
            "measured_bytes": part.measured,
            "predicted_bytes": part.predicted.round(),
        })
    });
    json!({ "run": title, "parts": parts.collect::<Vec<_>>() })
}
