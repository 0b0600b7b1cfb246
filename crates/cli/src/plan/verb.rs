//! `moeforge plan`: the memory that a run will take, before anything is loaded.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::bail;
use checkpoint::Folder;
use kernels::device::CPU;
use model::export::mix::Mix;
use model::footprint::{FrozenBytes, StoredAs, WeightBytes, stored_bytes};
use model::{ModelConfig, load};

use super::budget::BudgetArgs;
use super::generation_need::GenerationNeed;
use super::lines::published_format;
use super::memory_plan::PlanTarget;
use super::sizing;
use super::training_need::TrainingNeed;
use crate::console::{Console, misuse};
use crate::device::DeviceArgs;
use crate::host::machine::{Machine, MemoryLimit};
use crate::open::{find, is_gguf, name_of, read_json};
use crate::values::{CACHE_HELP, CacheValue, OutputFormat};

/// Show how much memory a run will take, by component, before anything is loaded.
///
/// A recipe is planned for training, a model or its `config.json` for generating. Weights are mapped: the system can take that
/// memory back and read them again. All other memory is the program's own. If a run does not fit, what would help is listed, the
/// cheapest first.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Recipe (TOML file), model (Hugging Face folder, GGUF file, or `org/name` in the local Hugging Face cache), or the
    /// `config.json` of one.
    #[arg(required_unless_present = "sizing")]
    subject: Option<String>,
    /// Recipe setting to override, as section.key=value. May be repeated.
    #[arg(long = "set", value_name = "KEY=VALUE")]
    set: Vec<String>,
    /// Tokens of a sequence, prompt and text together; of a recipe's rows, at most. Default: 4096; a recipe's maximum length.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1 << 40))]
    context: Option<u64>,
    /// Sequences at a time; rows of a recipe's micro-batches. Default: 1; the recipe's.
    #[arg(long, value_name = "N", value_parser = clap::value_parser!(u64).range(1..=1 << 40))]
    batch: Option<u64>,
    #[arg(long, value_enum, value_name = "TYPE", help = CACHE_HELP)]
    cache: Option<CacheValue>,
    /// Weight format to plan for, as of `quantize --to`. Default: the model's own.
    #[arg(long, value_name = "FORMAT", value_parser = OutputFormat::parse)]
    format: Option<OutputFormat>,
    /// Memory bandwidth in GB/s, for the speed of generating one sequence, which reads the weights of a token.
    #[arg(long, value_name = "GB/S", value_parser = positive)]
    bandwidth: Option<f64>,
    /// What the disk reads in GB/s, for runs whose weights do not all stay in memory. Default: 3.
    #[arg(long, value_name = "GB/S", value_parser = positive)]
    disk_bandwidth: Option<f64>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Print a table of the published models on common machines instead.
    #[arg(long, conflicts_with_all = ["subject", "set", "context", "batch", "cache", "format", "memory_budget", "device", "disk_bandwidth"])]
    sizing: bool,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    budget: BudgetArgs,
}

/// What is planned.
enum PlanSubject {
    Recipe(PathBuf),
    Model(Box<PlannedModel>),
}

/// A model that generates.
struct PlannedModel {
    config: ModelConfig,
    /// Bytes of its weights.
    weights: WeightBytes,
    name: String,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    if args.sizing {
        return sizing::run(args.bandwidth, args.json, console);
    }
    if args.disk_bandwidth.is_some() && on_gpu(args).is_some() {
        bail!("--disk-bandwidth: expected the CPU, found a GPU, which holds all weights");
    }
    let machine = Machine::here();
    let target = PlanTarget {
        limit: limit(args, &machine)?,
        share: match on_gpu(args) {
            Some(_) => 1.0,
            None => args.budget.share(),
        },
        has_disk: on_gpu(args).is_none(),
        bandwidth: args.bandwidth.map(|gb| gb * 1e9),
        disk_bandwidth: args.disk_bandwidth.unwrap_or(DEFAULT_DISK) * 1e9,
    };
    let plan = match subject(args)? {
        PlanSubject::Recipe(path) => {
            let need = TrainingNeed::open(&path, settings(args))?;
            need.plan(&target)?
        }
        PlanSubject::Model(model) => {
            let need = GenerationNeed {
                config: &model.config,
                weights: &model.weights,
                sequences: args.batch.unwrap_or(1),
                context: args.context.unwrap_or(DEFAULT_CONTEXT),
                cache: args.cache.unwrap_or(default_cache(args)),
            };
            need.plan(&model.name, &target)
        }
    };
    let limit = target.limit.as_ref();
    if args.json {
        console.result(format_args!("{:#}", plan.to_json(limit)));
    } else {
        console.result(plan.text(limit, &machine));
    }
    Ok(ExitCode::SUCCESS)
}

/// The KV cache of a device, unless it is said.
fn default_cache(args: &Args) -> CacheValue {
    match on_gpu(args) {
        Some(_) => CacheValue::F32,
        None => CacheValue::F16,
    }
}

/// The name of the device to plan for, unless it is the CPU.
fn on_gpu(args: &Args) -> Option<String> {
    args.device.name().filter(|name| name != CPU)
}

/// The settings of a recipe, with the options that stand for some.
fn settings(args: &Args) -> Vec<String> {
    let context = args.context.map(|n| format!("data.max_length={n}"));
    let batch = args.batch.map(|n| format!("train.batch_size={n}"));
    args.set
        .iter()
        .cloned()
        .chain(context)
        .chain(batch)
        .collect()
}

/// Tokens of a sequence, unless it is said.
const DEFAULT_CONTEXT: u64 = 4096;
/// GB/s of a disk, unless it is said: an NVMe disk of the slower kind.
const DEFAULT_DISK: f64 = 3.0;

/// A number above 0.
fn positive(text: &str) -> Result<f64, String> {
    match text.parse::<f64>() {
        Ok(number) if number > 0.0 && number.is_finite() => Ok(number),
        _ => Err(format!("expected a number above 0, found `{text}`")),
    }
}

/// What a plan is compared with: the budget as it is given, for it may be another machine's, or what is free here.
fn limit(args: &Args, machine: &Machine) -> anyhow::Result<Option<MemoryLimit>> {
    if let Some(bytes) = args.budget.memory_budget {
        let source = "--memory-budget".into();
        return Ok(Some(MemoryLimit { bytes, source }));
    }
    let free = machine.free();
    let Some(device) = on_gpu(args) else {
        return Ok(free);
    };
    let of_system = || machine.gpu_share().map(|share| share.bytes);
    let Some(bytes) = reported(&device, machine).or_else(of_system) else {
        return Err(misuse(format!(
            "--device {device}: this machine does not say how much memory its GPU has; give it with --memory-budget"
        )));
    };
    let source = "what the GPU may hold".into();
    let of_gpu = MemoryLimit { bytes, source };
    Ok(Some(match free {
        Some(free) if free.bytes < of_gpu.bytes => free,
        _ => of_gpu,
    }))
}

/// What a device itself says that it may hold, if this build has it: on a Mac, the recommended working set.
fn reported(name: &str, machine: &Machine) -> Option<u64> {
    if !machine.is_here() {
        return None;
    }
    let device = kernels::device::open(name).ok()?;
    kernels::device::describe(&device)?.memory_bytes
}

fn subject(args: &Args) -> anyhow::Result<PlanSubject> {
    let text = args.subject.as_deref().unwrap_or_default();
    let path = Path::new(text);
    let has = |extension: &str| {
        path.extension()
            .is_some_and(|e| e.eq_ignore_ascii_case(extension))
    };
    if has("toml") {
        let of_models = [
            ("--format", args.format.is_some()),
            ("--cache", args.cache.is_some()),
            ("--bandwidth", args.bandwidth.is_some()),
        ];
        if let Some((option, _)) = of_models.iter().find(|(_, is_given)| *is_given) {
            bail!("{option}: expected a model or a config.json, found the recipe `{text}`");
        }
        return Ok(PlanSubject::Recipe(path.into()));
    }
    if !args.set.is_empty() {
        bail!("--set: expected a recipe, a file that ends with `.toml`, found `{text}`");
    }
    if path.is_file() && !is_gguf(path) {
        return config_alone(path, args);
    }
    let found = find(text)?;
    let folder = match Folder::open(&found) {
        Ok(folder) => folder,
        Err(checkpoint::Error::NoWeights { found: none, .. }) if none == "none" => {
            return config_alone(&found.join("config.json"), args);
        }
        Err(error) => return Err(error.into()),
    };
    let config = load::read_config(&folder)?;
    let weights = match args.format {
        Some(format) => stored_bytes(&config, &stored_as(format)?),
        None => FrozenBytes::of(&folder, &config, &|_| true)?.mapped,
    };
    Ok(PlanSubject::Model(Box::new(PlannedModel {
        config,
        weights,
        name: name_of(&found),
    })))
}

/// The config of a model whose weights are not here.
fn config_alone(path: &Path, args: &Args) -> anyhow::Result<PlanSubject> {
    let json = read_json(path)?;
    let config = ModelConfig::from_json(&json, path)?;
    let stored = match args.format {
        Some(format) => stored_as(format)?,
        None => StoredAs::Folder(published_format(&json)),
    };
    let folder = path.parent().filter(|parent| parent.file_name().is_some());
    let is_named = path.file_name().is_some_and(|name| name == "config.json");
    Ok(PlanSubject::Model(Box::new(PlannedModel {
        weights: stored_bytes(&config, &stored),
        name: name_of(folder.filter(|_| is_named).unwrap_or(path)),
        config,
    })))
}

fn stored_as(format: OutputFormat) -> anyhow::Result<StoredAs> {
    Ok(match format {
        OutputFormat::Folder(format) => StoredAs::Folder(format.weight_format()),
        OutputFormat::Gguf(scheme) => {
            StoredAs::Gguf(Mix::new(scheme, "").map_err(anyhow::Error::msg)?)
        }
    })
}

#[cfg(test)]
mod tests {
    use model::export::WeightFormat;

    use serde_json::Value;

    use super::*;
    use crate::plan::lines::{GIB, parameters};

    #[test]
    fn sizes_of_published_models_are_known_from_their_configs() {
        for (json, format, expected) in [
            (
                include_str!("published/DeepSeek-R1.json"),
                WeightFormat::Fp8,
                671e9,
            ),
            (
                include_str!("published/DeepSeek-V2-Lite.json"),
                WeightFormat::Bf16,
                15.7e9,
            ),
        ] {
            let json: Value = serde_json::from_str(json).unwrap();
            assert_eq!(published_format(&json), format);
            let config = ModelConfig::from_json(&json, Path::new("config.json")).unwrap();
            let total = parameters(&config).total as f64;
            assert!((total / expected - 1.0).abs() < 0.005, "{total} {expected}");
            let bytes = stored_bytes(&config, &StoredAs::Folder(format)).all();
            let per_parameter = if format == WeightFormat::Fp8 {
                1.0
            } else {
                2.0
            };
            assert!(
                (bytes / total / per_parameter - 1.0).abs() < 0.01,
                "{bytes} {total}"
            );
            assert!(bytes / GIB > 1.0);
        }
    }
}
