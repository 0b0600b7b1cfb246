//! `moeforge experts`: which experts a task uses, and a recipe that trains those.

use std::path::PathBuf;
use std::process::ExitCode;

use ::eval::{ChosenExperts, EvalConfig, ExpertLoad, choose, expert_loads};
use anyhow::bail;
use clap::ValueEnum;
use data::Split;
use model::Compute;
use serde_json::json;

use crate::console::{Console, finite};
use crate::open::{ModelArgs, Opened};

/// Measures which experts a task uses, and writes the part of a recipe that trains them (ESFT).
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    model: ModelArgs,
    /// Folder with `train.jsonl`: the task.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// What the loads of a layer's chosen experts add up to at least.
    #[arg(long, value_name = "P", default_value_t = 0.2)]
    share: f64,
    /// What an expert's load is a share of.
    #[arg(long, value_enum, default_value_t = By::Tokens)]
    by: By,
    /// Look at the first so many samples only; a few dozen of the longest length do.
    #[arg(long, value_name = "N", default_value_t = 128)]
    max_samples: usize,
    /// Sequences side by side.
    #[arg(long, value_name = "N", default_value_t = 8)]
    batch_size: usize,
    /// Longest sequence, in tokens; never beyond what the model was made for.
    #[arg(long, value_name = "N", default_value_t = 1024)]
    max_length: usize,
    /// Print JSON instead of a table: every expert's load, and the chosen ones.
    #[arg(long)]
    json: bool,
}

/// What an expert's load is a share of.
#[derive(Clone, Copy, Debug, PartialEq, Eq, ValueEnum)]
enum By {
    /// The tokens' choices.
    Tokens,
    /// The weights of those choices.
    Gates,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    if !(args.share > 0.0 && args.share <= 1.0) {
        bail!(
            "--share: expected a number above 0 and at most 1, found {}",
            args.share
        );
    }
    let opened = args.model.open(console)?;
    let loads = loads(&opened, args, console)?;
    let chosen: Vec<ChosenExperts> = loads
        .iter()
        .map(|load| choose(shares(load, args.by), args.share))
        .collect();
    if args.json {
        let layers = loads.iter().zip(&chosen).map(|(load, chosen)| {
            json!({"layer": load.layer, "tokens": load.tokens, "gates": load.gates,
                   "chosen": chosen.experts, "share": chosen.share})
        });
        let layers: Vec<_> = layers.collect();
        let recipe = patterns(&loads, &chosen);
        console.result(json!({"share": args.share, "layers": layers, "target": recipe}));
    } else {
        console.result(format!(
            "{}\n\n{}",
            table(&loads, &chosen, args.by),
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
    let (file, vocab_size) = (args.data.join("train.jsonl"), config.vocab_size);
    let max_length = args.max_length.min(config.max_position_embeddings);
    let mut split = Split::open(&file, opened.tokenizer.as_ref(), max_length, vocab_size)?;
    split.samples.truncate(args.max_samples.max(1));
    let mut progress = console.progress(split.samples.len() as u64, "samples");
    let config = EvalConfig {
        batch_size: args.batch_size,
        compute: Compute::F32,
    };
    let tell = &mut |done, _| progress.update(done as u64, &opened.name);
    let found = expert_loads(&opened.model, &split.samples, &config, tell);
    progress.finish();
    finite(found, &format_args!("{}: {}", opened.name, file.display()))
}

fn shares(load: &ExpertLoad, by: By) -> &[f64] {
    match by {
        By::Tokens => &load.tokens,
        By::Gates => &load.gates,
    }
}

/// One line per layer.
fn table(loads: &[ExpertLoad], chosen: &[ChosenExperts], by: By) -> String {
    let mut table = "layer  chosen      share  largest  even   experts by load".to_owned();
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
        "# In a recipe, low-rank updates of these experts alone:\n[lora]\ntarget = [\n{list}]\n\n\
         # or, instead, all of their weights:\n# [train]\n# method = \"full\"\n\
         # unfrozen_parameters = [the same list]"
    )
}
