//! `compare`: the divergence of one model's predictions from another's.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ::eval::{Divergence, divergence};
use data::{Sample, SplitName, Tokenizer};
use model::{Compute, ModelConfig};
use serde_json::json;

use crate::console::{Console, finite};
use crate::device::DeviceArgs;
use crate::open::{Opened, expect_computed, open_model};
use crate::rows::{ColumnArgs, SplitRows};
use crate::values::{COMPUTE_HELP, ComputeValue};

/// Compare the predictions and the expert routing of two models.
///
/// KL is the mean Kullback-Leibler divergence KL(reference ‖ model) of the predictions, in nats per target.
/// "Routing changed" is, of the experts that the model chooses in a layer, the share that the reference does not choose
/// for the same token. The reference computes in f32; --compute applies to the model only. To compare two models by their scores, use `eval
/// --baseline`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Reference model: Hugging Face folder, GGUF file, or `org/name` in the local Hugging Face cache.
    reference: String,
    /// Model to compare with the reference. May be the reference itself, with an adapter.
    model: String,
    /// LoRA adapter to apply to the model: PEFT folder.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
    /// Folder with a test split (`test.jsonl`, `.csv`, `.parquet`, …), or a file of rows.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    #[command(flatten)]
    columns: ColumnArgs,
    /// Maximum number of samples.
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_samples: usize,
    /// Maximum sequence length, in tokens; at most the models' context length.
    #[arg(long, value_name = "N", default_value_t = MAX_COMPARED_LENGTH)]
    max_length: usize,
    // The reference is computed in f32.
    #[arg(long, value_enum, default_value_t = ComputeValue::F32, help = COMPUTE_HELP)]
    compute: ComputeValue,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// Default maximum of a sequence's tokens. A row of logits per token is held.
pub(crate) const MAX_COMPARED_LENGTH: usize = 256;

/// The rows that models are compared on.
pub(crate) struct RowLimits {
    pub(crate) max_samples: usize,
    pub(crate) max_length: usize,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let device = args.device.open()?;
    expect_computed(args.compute, &device)?;
    let reference = open_model(&args.reference, None, &device, console)?;
    let model = open_model(&args.model, args.adapter.as_deref(), &device, console)?;
    let limits = RowLimits {
        max_samples: args.max_samples,
        max_length: args
            .max_length
            .min(model.model.config.max_position_embeddings),
    };
    let rows = SplitRows {
        path: &args.data,
        split: SplitName::Test,
        columns: &args.columns.columns,
        console,
    };
    let samples = samples(
        rows,
        reference.tokenizer.as_deref(),
        &reference.model.config,
        limits,
    )?;
    let comparison = ModelPair {
        reference: &reference,
        model: &model,
        compute: args.compute.quant().into(),
    };
    let found = comparison.compare(&samples, &args.data, console)?;
    if args.json {
        let mut json = json!({"reference": reference.name, "model": model.name});
        json["divergence"] = serde_json::to_value(&found)?;
        console.result(format_args!("{json:#}"));
    } else {
        console.result(format_args!(
            "{} against {}\n{}",
            model.name,
            reference.name,
            text(&found)
        ));
    }
    console.memory();
    Ok(ExitCode::SUCCESS)
}

/// The first samples of a split.
pub(crate) fn samples(
    rows: SplitRows<'_>,
    tokenizer: Option<&Tokenizer>,
    config: &ModelConfig,
    limits: RowLimits,
) -> anyhow::Result<Vec<Sample>> {
    let length = limits.max_length.min(config.max_position_embeddings);
    let mut split = rows.read(tokenizer, length, config.vocab_size)?;
    split.samples.truncate(limits.max_samples);
    Ok(split.samples)
}

/// Two models to compare.
pub(crate) struct ModelPair<'a> {
    /// Computed in f32.
    pub(crate) reference: &'a Opened,
    pub(crate) model: &'a Opened,
    /// What the model's products round activations to.
    pub(crate) compute: Compute,
}

impl ModelPair<'_> {
    /// The divergence of the model's predictions from the reference's, on samples of a data folder.
    pub(crate) fn compare(
        &self,
        samples: &[Sample],
        data: &Path,
        console: &Console,
    ) -> anyhow::Result<Divergence> {
        let mut progress = console.progress(samples.len() as u64, "samples");
        let models = [&self.reference.model, &self.model.model];
        let compared = divergence(models, self.compute, samples, &mut |done, _| {
            progress.update(done as u64, "");
        });
        progress.finish();
        finite(compared, &data.display())
    }
}

fn text(found: &Divergence) -> String {
    let mut text = found.to_text();
    if !found.routing.is_empty() {
        text += "\n\nlayer  routing changed";
    }
    for layer in &found.routing {
        text += &format!("\n{:5}  {:13.2} %", layer.layer, 100.0 * layer.changed);
    }
    text
}
