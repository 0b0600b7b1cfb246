//! `moeforge survival`: what is left of an adapter's effect once it is merged and the weights are rounded.

use std::path::PathBuf;
use std::process::ExitCode;

use ::eval::{SurvivalConfig, SurvivalModels, survival};
use anyhow::Context;
use data::Split;
use model::AdapterWeights;
use model::Quantizer;

use crate::console::{Console, USAGE, WithCode, finite};
use crate::open::open_model;

/// Measures what survives of an adapter when it is merged into formats of fewer bits, without writing any.
///
/// All weights of attention, feed-forward layers and experts are rounded, adapted or not; embedding, router and head are
/// not. The effect on the logits is the difference that the adapter makes, as it was trained; of it 1 − ‖d‖² / ‖e‖² is
/// kept, with e the effect and d what the rounded merge differs from it. The gain is that in loss.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The base: a Hugging Face folder, or org/name in the local cache.
    model: String,
    /// The adapter: a PEFT folder.
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// Folder with `test.jsonl`: the rows to measure on.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Formats: fp8, gguf:q8_0, gguf:q4_0, gguf:q4_k, …; all by default.
    #[arg(long, value_name = "FORMAT,…", value_delimiter = ',')]
    to: Vec<String>,
    /// Measure on the first so many samples.
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_samples: usize,
    /// Measure each module alone on the first so many of them; 0 leaves this out. Default: 4 with --to, else 0.
    #[arg(long, value_name = "N")]
    module_samples: Option<usize>,
    /// Longest sequence, in tokens.
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_length: usize,
    /// Print JSON, with every module.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let quantizers = quantizers(&args.to)?;
    let base = open_model(&args.model, None, console)?;
    let adapter = checkpoint::Adapter::open(&args.adapter)?;
    let trained_for = adapter.notes.trained_for.as_deref().map(str::parse);
    let trained_for: Option<Quantizer> = trained_for
        .transpose()
        .with_context(|| format!("`{}`", args.adapter.display()))?;
    let mut adapted = base.model.clone();
    AdapterWeights::read(&adapter, &base.model.config)?.attach(&mut adapted, &base.device)?;

    let limit = base.model.config.max_position_embeddings;
    let file = args.data.join("test.jsonl");
    let (length, vocab_size) = (args.max_length.min(limit), base.model.config.vocab_size);
    let mut split = Split::open(&file, base.tokenizer.as_ref(), length, vocab_size)?;
    split.samples.truncate(args.max_samples);
    let config = SurvivalConfig {
        quantizers,
        module_samples: args
            .module_samples
            .unwrap_or(if args.to.is_empty() { 0 } else { 4 }),
    };
    let models = SurvivalModels {
        base: &base.model,
        adapted: &adapted,
        trained_for,
    };
    let mut progress = console.progress(0, "passes");
    let found = survival(&models, &split.samples, &config, &mut |done, total| {
        progress.update_of(done as u64, total as u64)
    });
    progress.finish();
    let report = finite(found, &file.display())?;
    if args.json {
        console.result(format_args!("{:#}", report.to_json()));
    } else {
        console.result(report.to_text());
    }
    Ok(ExitCode::SUCCESS)
}

/// The formats by their names; all where there is none.
fn quantizers(names: &[String]) -> anyhow::Result<Vec<Quantizer>> {
    if names.is_empty() {
        return Ok(Quantizer::all());
    }
    let parsed = names.iter().map(|name| {
        name.parse().map_err(|error| {
            anyhow::Error::new(WithCode {
                code: USAGE,
                message: format!("--to: {error}"),
            })
        })
    });
    parsed.collect()
}
