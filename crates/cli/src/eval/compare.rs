//! `compare`: how far what one model predicts is from what another does.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ::eval::{Divergence, divergence};
use data::{Sample, Split, Tokenizer};
use model::{Compute, ModelConfig};
use serde_json::json;

use crate::console::{Console, finite};
use crate::open::{ComputeName, Opened, open_model};

/// Compares what two models predict on the same rows, and in mixtures which experts they choose.
///
/// KL is the mean Kullback-Leibler divergence from the reference's predictions to the model's, in nats per target. A pick is
/// a token's choice of one expert; it is moved if the reference does not make it for the same token.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The reference: Hugging Face folder, GGUF file, or `org/name` in the local Hugging Face cache.
    reference: String,
    /// The model that is compared with it; may be the same one, with an adapter.
    model: String,
    /// Folder of a LoRA adapter (PEFT) to attach to the model.
    #[arg(long, value_name = "DIR")]
    adapter: Option<PathBuf>,
    /// Folder with `test.jsonl`: the rows to compare on.
    #[arg(long, value_name = "DIR")]
    data: PathBuf,
    /// Compare on the first so many samples.
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_samples: usize,
    /// Longest sequence, in tokens; never beyond what the models were made for.
    #[arg(long, value_name = "N", default_value_t = LONGEST)]
    max_length: usize,
    /// What the model's products with weights in ggml's blocks round activations to; the reference's are in f32.
    #[arg(long, value_enum, default_value_t = ComputeName::F32)]
    compute: ComputeName,
    /// Print JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// Longest sequence that is compared, in tokens: a row of logits per token is held.
pub(crate) const LONGEST: usize = 256;

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let reference = open_model(&args.reference, None, console)?;
    let model = open_model(&args.model, args.adapter.as_deref(), console)?;
    let limit = model.model.config.max_position_embeddings;
    let samples = samples(
        &args.data,
        (reference.tokenizer.as_ref(), &reference.model.config),
        [args.max_samples, args.max_length.min(limit)],
    )?;
    let models = (&reference, &model, args.compute.compute());
    let found = compare(models, &samples, (&args.data, console))?;
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

/// The first samples of `test.jsonl`, so many and so long at most.
pub(crate) fn samples(
    data: &Path,
    (tokenizer, config): (Option<&Tokenizer>, &ModelConfig),
    [max_samples, max_length]: [usize; 2],
) -> anyhow::Result<Vec<Sample>> {
    let length = max_length.min(config.max_position_embeddings);
    let file = data.join("test.jsonl");
    let mut split = Split::open(&file, tokenizer, length, config.vocab_size)?;
    split.samples.truncate(max_samples);
    Ok(split.samples)
}

/// What a model predicts, against a reference.
pub(crate) fn compare(
    (reference, model, compute): (&Opened, &Opened, Compute),
    samples: &[Sample],
    (data, console): (&Path, &Console),
) -> anyhow::Result<Divergence> {
    let mut progress = console.progress(samples.len() as u64, "samples");
    let models = [&reference.model, &model.model];
    let compared = divergence(models, compute, samples, &mut |done, _| {
        progress.update(done as u64, "");
    });
    progress.finish();
    finite(compared, &data.display())
}

fn text(found: &Divergence) -> String {
    let mut text = found.to_text();
    if !found.routing.is_empty() {
        text += "\n\nlayer  picks moved";
    }
    for layer in &found.routing {
        text += &format!("\n{:5}  {:9.2} %", layer.layer, 100.0 * layer.moved);
    }
    text
}
