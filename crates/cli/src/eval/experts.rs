//! `moeforge experts`: the experts that a task uses, and a recipe that trains them.

use std::path::PathBuf;
use std::process::ExitCode;

use ::eval::{ChosenExperts, EvalConfig, ExpertLoad, choose, expert_loads};
use anyhow::bail;
use clap::ValueEnum;
use data::SplitName;
use model::Compute;
use serde_json::json;

use crate::console::{Console, finite};
use crate::open::{ModelArgs, Opened};
use crate::rows::{ColumnArgs, SplitRows};

/// Measure which experts a task uses, and print a recipe section that trains only those (ESFT).
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Task data: folder with a training split (`train.jsonl`, `.csv`, `.parquet`, …), or a file of rows.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    #[command(flatten)]
    columns: ColumnArgs,
    /// Minimum total load of the chosen experts in each layer, above 0 and at most 1. The fewest experts that reach it
    /// are chosen.
    #[arg(long, alias = "share", value_name = "P", default_value_t = 0.2)]
    min_load: f64,
    /// Measure of an expert's load.
    #[arg(long, alias = "by", value_enum, default_value_t = LoadValue::Tokens)]
    load: LoadValue,
    /// Maximum number of samples. A few dozen samples of maximum length are enough.
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_samples: usize,
    /// Sequences per batch.
    #[arg(long, alias = "batch-size", value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=1 << 10))]
    batch: u64,
    /// Maximum sequence length, in tokens; at most the model's context length.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_length: usize,
    /// Print JSON with the load of every expert, instead of a table.
    #[arg(long)]
    json: bool,
}

/// Measures of an expert's load.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum LoadValue {
    /// Share of the layer's token-to-expert assignments.
    Tokens,
    /// Share of the layer's gate weights.
    #[value(name = "gate-weights", alias = "gates")]
    GateWeights,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    if !(args.min_load > 0.0 && args.min_load <= 1.0) {
        bail!(
            "--min-load: expected a number above 0 and at most 1, found {}",
            args.min_load
        );
    }
    let opened = args.model.open(console)?;
    let loads = loads(&opened, args, console)?;
    let chosen: Vec<ChosenExperts> = loads
        .iter()
        .map(|load| choose(shares(load, args.load), args.min_load))
        .collect();
    if args.json {
        let layers = loads.iter().zip(&chosen).map(|(load, chosen)| {
            json!({"layer": load.layer, "tokens": load.tokens, "gates": load.gates,
                   "chosen": chosen.experts, "load": chosen.share})
        });
        let layers: Vec<_> = layers.collect();
        let recipe = patterns(&loads, &chosen);
        console.result(json!({"min_load": args.min_load, "layers": layers, "target": recipe}));
    } else {
        console.result(format!(
            "{}\n\n{}",
            table(&loads, &chosen, args.load),
            fragment(&loads, &chosen)
        ));
    }
    Ok(ExitCode::SUCCESS)
}

fn loads(opened: &Opened, args: &Args, console: &Console) -> anyhow::Result<Vec<ExpertLoad>> {
    let config = &opened.model.config;
    if config.moe.is_none() {
        bail!(
            "{}: expected a model with routed experts, found none",
            opened.name
        );
    }
    let rows = SplitRows {
        path: &args.data,
        split: SplitName::Train,
        columns: &args.columns.columns,
        console,
    };
    let max_length = args.max_length.min(config.max_position_embeddings);
    let mut split = rows.read(opened.tokenizer.as_deref(), max_length, config.vocab_size)?;
    split.samples.truncate(args.max_samples.max(1));
    let mut progress = console.progress(split.samples.len() as u64, "samples");
    let config = EvalConfig {
        batch_size: args.batch as usize,
        compute: Compute::F32,
    };
    let tell = &mut |done, _| progress.update(done as u64, &opened.name);
    let found = expert_loads(&opened.model, &split.samples, &config, tell);
    progress.finish();
    finite(
        found,
        &format_args!("{}: {}", opened.name, args.data.display()),
    )
}

fn shares(load: &ExpertLoad, by: LoadValue) -> &[f64] {
    match by {
        LoadValue::Tokens => &load.tokens,
        LoadValue::GateWeights => &load.gates,
    }
}

/// One line per layer.
fn table(loads: &[ExpertLoad], chosen: &[ChosenExperts], by: LoadValue) -> String {
    let mut table = "layer  chosen       load  largest  even   experts by load".to_owned();
    for (load, chosen) in loads.iter().zip(chosen) {
        let shares = shares(load, by);
        let largest = shares.iter().copied().fold(0.0, f64::max);
        let numbers: Vec<String> = chosen.experts.iter().map(usize::to_string).collect();
        table += &format!(
            "\n{:5}  {:3} of {:3}  {:5.3}  {largest:7.3}  {:5.3}  {}",
            load.layer,
            chosen.experts.len(),
            shares.len(),
            chosen.share,
            1.0 / shares.len() as f64,
            numbers.join(" ")
        );
    }
    table
}

/// The chosen experts as patterns of module paths, layer by layer and by number.
fn patterns(loads: &[ExpertLoad], chosen: &[ChosenExperts]) -> Vec<String> {
    let of_layer = |(load, chosen): (&ExpertLoad, &ChosenExperts)| {
        let mut experts = chosen.experts.clone();
        experts.sort_unstable();
        let layer = load.layer;
        let pattern = move |expert| format!("layers.{layer}.mlp.experts.{expert}");
        experts.into_iter().map(pattern).collect::<Vec<_>>()
    };
    loads.iter().zip(chosen).flat_map(of_layer).collect()
}

fn fragment(loads: &[ExpertLoad], chosen: &[ChosenExperts]) -> String {
    let mut list = String::new();
    for pattern in patterns(loads, chosen) {
        list += &format!("  \"{pattern}\",\n");
    }
    format!(
        "# Recipe for LoRA on these experts alone:\n[lora]\ntarget = [\n{list}]\n\n\
         # or, instead, to train all of their weights:\n# [train]\n# method = \"full\"\n\
         # unfrozen_parameters = [the same list]"
    )
}
