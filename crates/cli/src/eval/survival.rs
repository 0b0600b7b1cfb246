//! `moeforge survival`: how much of an adapter's effect survives a merge into quantized weights.

use std::path::PathBuf;
use std::process::ExitCode;

use ::eval::{SurvivalConfig, SurvivalModels, survival};
use anyhow::Context;
use data::SplitName;
use model::AdapterWeights;
use model::Quantizer;

use crate::console::{Console, finite, misuse, printable};
use crate::device::{cpu, note_cpu_alone};
use crate::open::open_model;
use crate::rows::{ColumnArgs, SplitRows};

/// Measure how much of an adapter's effect survives a merge into quantized weights.
///
/// No model is written. All attention, feed-forward and expert weights are quantized, including those without an
/// adapter; embedding, router and output head are not. The effect e is the difference between the logits with the
/// adapter, not merged, and those of the base model. The deviation d is the difference between the logits of the
/// quantized merge and those with the adapter, not merged. The share kept is 1 − ‖d‖² / ‖e‖². The gain is how much the
/// adapter lowers the loss.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Base model: Hugging Face folder, or `org/name` in the local Hugging Face cache.
    model: String,
    /// LoRA adapter: PEFT folder.
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// Folder with a test split (`test.jsonl`, `.csv`, `.parquet`, …), or a file of rows.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    #[command(flatten)]
    columns: ColumnArgs,
    /// Weight formats: hf:fp8, gguf:q8_0, gguf:q4_0, gguf:q4_k, … Default: all.
    #[arg(long, value_name = "FORMAT,…", value_delimiter = ',')]
    to: Vec<String>,
    /// Maximum number of samples.
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_samples: usize,
    /// Number of samples on which each module is also measured alone; 0 turns this off. Default: 4 with --to, else 0.
    #[arg(long, value_name = "N")]
    module_samples: Option<usize>,
    /// Maximum sequence length, in tokens; at most the model's context length.
    #[arg(long, value_name = "N", default_value_t = 256)]
    max_length: usize,
    /// Print JSON with every module, instead of a table.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let quantizers = quantizers(&args.to)?;
    note_cpu_alone("survival", console);
    let base = open_model(&args.model, None, &cpu(), console)?;
    let adapter = checkpoint::Adapter::open(&args.adapter)?;
    let trained_for = adapter.notes.trained_for.as_deref().map(str::parse);
    let trained_for: Option<Quantizer> = trained_for
        .transpose()
        .with_context(|| format!("`{}`", args.adapter.display()))?;
    let mut adapted = base.model.clone();
    AdapterWeights::read(&adapter, &base.model.config)?.attach(&mut adapted, &base.device)?;

    let limit = base.model.config.max_position_embeddings;
    let (length, vocab_size) = (args.max_length.min(limit), base.model.config.vocab_size);
    let rows = SplitRows {
        path: &args.data,
        split: SplitName::Test,
        columns: &args.columns.columns,
        console,
    };
    let mut split = rows.read(base.tokenizer.as_deref(), length, vocab_size)?;
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
    let report = finite(found, &args.data.display())?;
    if args.json {
        console.result(format_args!("{:#}", report.to_json()));
    } else {
        console.result(report.to_text());
    }
    Ok(ExitCode::SUCCESS)
}

/// The formats of these names; all formats without names.
fn quantizers(names: &[String]) -> anyhow::Result<Vec<Quantizer>> {
    if names.is_empty() {
        return Ok(Quantizer::all());
    }
    let known: Vec<_> = Quantizer::all()
        .into_iter()
        .map(|quantizer| (option_name(quantizer), quantizer))
        .collect();
    let find = |name: &String| {
        // As it was written before `quantize --to` and this option had one spelling.
        let name = if name == "fp8" { "hf:fp8" } else { name };
        let found = known.iter().find(|known| known.0 == name);
        found.map(|known| known.1).ok_or_else(|| {
            let names: Vec<_> = known.iter().map(|known| known.0.as_str()).collect();
            let names = names.join(", ");
            misuse(format!(
                "--to: expected one of {names}, found `{}`",
                printable(name, &[])
            ))
        })
    };
    names.iter().map(find).collect()
}

/// The name of a format as `quantize --to` spells it.
fn option_name(quantizer: Quantizer) -> String {
    match quantizer {
        Quantizer::Fp8(_) => "hf:fp8".to_owned(),
        Quantizer::Gguf(_) => quantizer.to_string(),
    }
}
