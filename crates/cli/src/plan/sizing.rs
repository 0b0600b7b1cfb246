//! The sizing table: which published models fit which machines, and how fast they can be at most.

use std::path::Path;
use std::process::ExitCode;

use ::train::{Forecast, Method, PROGRAM, Recipe};
use model::ModelConfig;
use model::export::mix::Mix;
use model::footprint::{StoredAs, WeightBytes, stored_bytes};
use serde_json::{Value, json};

use super::generation_need::GenerationNeed;
use super::lines::{GIB, published_format, size, speed};
use crate::console::Console;
use crate::values::{CacheValue, OutputFormat};

/// Machines as data: a name, what a program may hold, the bandwidth, and who says so.
const MACHINES: &str = include_str!("machines.json");

/// The models as their config.json says.
const MODELS: [(&str, &str); 9] = [
    ("DeepSeek-R1", include_str!("published/DeepSeek-R1.json")),
    ("DeepSeek-V2", include_str!("published/DeepSeek-V2.json")),
    (
        "DeepSeek-V2-Lite",
        include_str!("published/DeepSeek-V2-Lite.json"),
    ),
    (
        "R1-Distill-Qwen-1.5B",
        include_str!("published/DeepSeek-R1-Distill-Qwen-1.5B.json"),
    ),
    (
        "R1-Distill-Qwen-7B",
        include_str!("published/DeepSeek-R1-Distill-Qwen-7B.json"),
    ),
    (
        "R1-Distill-Llama-8B",
        include_str!("published/DeepSeek-R1-Distill-Llama-8B.json"),
    ),
    (
        "R1-Distill-Qwen-14B",
        include_str!("published/DeepSeek-R1-Distill-Qwen-14B.json"),
    ),
    (
        "R1-Distill-Qwen-32B",
        include_str!("published/DeepSeek-R1-Distill-Qwen-32B.json"),
    ),
    (
        "R1-Distill-Llama-70B",
        include_str!("published/DeepSeek-R1-Distill-Llama-70B.json"),
    ),
];

/// Formats of weights: a name for people, a format of `quantize --to`, and parts with another type.
const FORMATS: [(&str, &str, &str); 6] = [
    ("bf16", "hf:bf16", ""),
    ("block FP8", "hf:fp8", ""),
    ("q8_0", "gguf:q8_0", ""),
    ("q4_k_m", "gguf:q4_k_m", ""),
    ("q4_k, experts q3_k", "gguf:q4_k_m", "experts=q3_k"),
    ("q4_k, experts q2_k", "gguf:q4_k_m", "experts=q2_k"),
];

/// Contexts that are tried.
const CONTEXTS: [u64; 6] = [4, 8, 16, 32, 64, 128];

/// Numbers that are often given, and what is off.
const NOTES: [&str; 4] = [
    "DeepSeek-R1 in block FP8 is 627 GiB without the layer that drafts: not 224 GB, and 1,342 GB is its size in bf16.",
    "A GPU limit of 448 GB on a Mac of 512 GB is a setting of the system, not a measured peak of a model; without it, newer systems allow 464 GiB.",
    "Speeds are bandwidth over the bytes that one token reads, the most there can be; two machines work in turns, so they are no faster than one.",
    "A prompt's attention makes keys and values of its whole context, layer by layer: that is the most of `a pass` at long contexts.",
];

/// A machine, or several.
#[derive(Debug)]
struct KnownMachine {
    name: String,
    /// GiB that a program may hold.
    gib: f64,
    /// GB/s.
    bandwidth: f64,
    /// Models of the table, by the beginning of their names.
    models: Vec<String>,
    /// Where the numbers come from.
    source: String,
}

/// What is told of a model on a machine.
struct Sizing {
    machine: String,
    model: &'static str,
    format: &'static str,
    weights: f64,
    /// The longest context that fits, for one sequence and for eight, in thousands; none if not even the shortest does.
    longest: [Option<u64>; 2],
    /// What one sequence of the shortest context leaves; less than nothing if it does not fit.
    left: f64,
    tokens_per_second: f64,
}

/// Training on a machine.
struct TrainingSizing {
    gib: f64,
    what: String,
    own: f64,
    mapped: f64,
}

pub(super) fn run(
    bandwidth: Option<f64>,
    json: bool,
    console: &Console,
) -> anyhow::Result<ExitCode> {
    let machines = KnownMachine::all()?;
    let mut sizings = Vec::new();
    for machine in &machines {
        for (name, text) in MODELS {
            let value: Value = serde_json::from_str(text)?;
            let is_here = machine
                .models
                .iter()
                .any(|of| name.starts_with(of.as_str()));
            if is_here {
                sizings.extend(on_machine(machine, (name, &value), bandwidth)?);
            }
        }
    }
    let training = training()?;
    if json {
        console.result(format_args!(
            "{:#}",
            to_json(&machines, &sizings, &training)
        ));
        return Ok(ExitCode::SUCCESS);
    }
    print(&machines, &sizings, &training, console);
    Ok(ExitCode::SUCCESS)
}

impl KnownMachine {
    /// Those of the file.
    fn all() -> anyhow::Result<Vec<Self>> {
        let found: Vec<Value> = serde_json::from_str(MACHINES)?;
        let text = |of: &Value| of.as_str().unwrap_or_default().to_owned();
        let machines = found.iter().map(|of| Self {
            name: text(&of["name"]),
            gib: of["gib"].as_f64().unwrap_or_default(),
            bandwidth: of["bandwidth"].as_f64().unwrap_or_default(),
            models: of["models"]
                .as_array()
                .into_iter()
                .flatten()
                .map(text)
                .collect(),
            source: text(&of["source"]),
        });
        Ok(machines.collect())
    }
}

fn config_of(value: &Value) -> anyhow::Result<ModelConfig> {
    Ok(ModelConfig::from_json(value, Path::new("config.json"))?)
}

fn stored(format: (&str, &str, &str)) -> anyhow::Result<StoredAs> {
    let (_, name, parts) = format;
    Ok(
        match OutputFormat::parse(name).map_err(anyhow::Error::msg)? {
            OutputFormat::Folder(format) => StoredAs::Folder(format.weight_format()),
            OutputFormat::Gguf(scheme) => {
                StoredAs::Gguf(Mix::new(scheme, parts).map_err(anyhow::Error::msg)?)
            }
        },
    )
}

/// A model in each format on a machine.
fn on_machine(
    machine: &KnownMachine,
    (name, value): (&'static str, &Value),
    bandwidth: Option<f64>,
) -> anyhow::Result<Vec<Sizing>> {
    let config = config_of(value)?;
    let is_fp8 = published_format(value) == model::export::WeightFormat::Fp8;
    let mut found = Vec::new();
    for format in FORMATS {
        // FP8 is one model's own format, and experts have a format of their own where there are some.
        let is_meant =
            (format.0 != "block FP8" || is_fp8) && (format.2.is_empty() || config.moe.is_some());
        if !is_meant {
            continue;
        }
        let weights = stored_bytes(&config, &stored(format)?);
        let bytes = machine.gib * GIB;
        let need = |sequences, context| -> f64 {
            let need = need(&config, &weights, sequences, context);
            weights.all() + need.now().total() + PROGRAM
        };
        let longest = [1, 8].map(|sequences| {
            let fits = |thousands: &u64| need(sequences, thousands << 10) <= bytes;
            CONTEXTS.into_iter().filter(fits).max()
        });
        let per_token = self::need(&config, &weights, 1, CONTEXTS[0] << 10).bytes_per_token();
        found.push(Sizing {
            machine: machine.name.clone(),
            model: name,
            format: format.0,
            weights: weights.all(),
            longest,
            left: bytes - need(1, CONTEXTS[0] << 10),
            tokens_per_second: speed(bandwidth.unwrap_or(machine.bandwidth), per_token),
        });
    }
    Ok(found)
}

fn need<'a>(
    config: &'a ModelConfig,
    weights: &'a WeightBytes,
    sequences: u64,
    context: u64,
) -> GenerationNeed<'a> {
    GenerationNeed {
        config,
        weights,
        sequences,
        context,
        cache: CacheValue::F16,
    }
}

/// V2-Lite's training in some forms: rows of 1024 tokens, four in a micro-batch.
fn training() -> anyhow::Result<Vec<TrainingSizing>> {
    let value: Value = serde_json::from_str(MODELS[2].1)?;
    let config = config_of(&value)?;
    let mut found = Vec::new();
    for (what, method, format, is_block) in [
        ("LoRA on q4_k_m", Method::Lora, Some(FORMATS[3]), false),
        (
            "LoRA on q4_k_m, block checkpointing",
            Method::Lora,
            Some(FORMATS[3]),
            true,
        ),
        (
            "LoRA on bf16, block checkpointing",
            Method::Lora,
            Some(FORMATS[0]),
            true,
        ),
        ("full, block checkpointing", Method::Full, None, true),
    ] {
        let mut recipe = Recipe::default();
        recipe.train.method = method;
        recipe.train.batch_size = 4;
        recipe.data.max_length = 1024;
        if is_block {
            recipe.train.checkpointing = model::Checkpointing::Block;
        }
        let mapped = match format {
            Some(format) => stored_bytes(&config, &stored(format)?),
            None => WeightBytes::default(),
        };
        let bytes = mapped.all();
        let plan = Forecast::of_config(&recipe, &config, mapped).plan();
        for gib in [16.0, 24.0, 32.0, 64.0] {
            found.push(TrainingSizing {
                gib,
                what: what.to_owned(),
                own: plan.own(),
                mapped: bytes,
            });
        }
    }
    Ok(found)
}

impl TrainingSizing {
    fn verdict(&self) -> String {
        let bytes = self.gib * GIB;
        if self.own + self.mapped <= bytes {
            return format!("fits, {} left", size(bytes - self.own - self.mapped));
        }
        if self.own <= bytes {
            return format!(
                "reads {} from disk in each step",
                size(self.own + self.mapped - bytes)
            );
        }
        format!("lacks {}", size(self.own - bytes))
    }
}

fn context(longest: Option<u64>) -> String {
    longest.map_or_else(|| "–".into(), |thousands| format!("{thousands}k"))
}

fn print(
    machines: &[KnownMachine],
    sizings: &[Sizing],
    training: &[TrainingSizing],
    console: &Console,
) {
    for machine in machines {
        console.result(format_args!(
            "{}: {} for the program, {} GB/s",
            machine.name,
            size(machine.gib * GIB),
            machine.bandwidth
        ));
        console.result(format_args!(
            "  {:<22}{:<20}{:>11}{:>9}{:>9}{:>14}{:>10}",
            "model", "weights", "size", "batch 1", "batch 8", "left at 4k", "tokens/s"
        ));
        for sizing in sizings
            .iter()
            .filter(|sizing| sizing.machine == machine.name)
        {
            let left = if sizing.left >= 0.0 {
                size(sizing.left)
            } else {
                format!("−{}", size(-sizing.left))
            };
            let is_there = sizing.longest[0].is_some();
            let speed = if is_there {
                format!("{:.1}", sizing.tokens_per_second)
            } else {
                "–".into()
            };
            console.result(format_args!(
                "  {:<22}{:<20}{:>11}{:>9}{:>9}{:>14}{:>10}",
                sizing.model,
                sizing.format,
                size(sizing.weights),
                context(sizing.longest[0]),
                context(sizing.longest[1]),
                left,
                speed
            ));
        }
        console.result("");
    }
    console.result("DeepSeek-V2-Lite, training on 4 rows of 1024 tokens, f32");
    for line in training {
        console.result(format_args!(
            "  {:<38}{:>4} GB  own {:>10}  mapped {:>10}  {}",
            line.what,
            line.gib,
            size(line.own),
            size(line.mapped),
            line.verdict()
        ));
    }
    console.result("");
    NOTES.iter().for_each(|note| console.result(note));
    console.result("Machines:");
    for machine in machines {
        console.result(format_args!("  {}: {}", machine.name, machine.source));
    }
}

fn to_json(machines: &[KnownMachine], sizings: &[Sizing], training: &[TrainingSizing]) -> Value {
    let machines = machines.iter().map(|machine| {
        json!({
            "name": machine.name,
            "bytes": machine.gib * GIB,
            "bandwidth": machine.bandwidth * 1e9,
            "source": machine.source,
        })
    });
    let sizings = sizings.iter().map(|sizing| {
        json!({
            "machine": sizing.machine,
            "model": sizing.model,
            "format": sizing.format,
            "weight_bytes": sizing.weights.round(),
            "longest_context": sizing.longest[0].map(|thousands| thousands << 10),
            "longest_context_of_8": sizing.longest[1].map(|thousands| thousands << 10),
            "left_bytes": sizing.left.round(),
            "tokens_per_second": sizing.tokens_per_second,
        })
    });
    let training = training.iter().map(|line| {
        json!({
            "what": line.what,
            "bytes": line.gib * GIB,
            "own_bytes": line.own.round(),
            "mapped_bytes": line.mapped.round(),
            "verdict": line.verdict(),
        })
    });
    json!({
        "machines": machines.collect::<Vec<_>>(),
        "generation": sizings.collect::<Vec<_>>(),
        "training": training.collect::<Vec<_>>(),
        "notes": NOTES,
    })
}
