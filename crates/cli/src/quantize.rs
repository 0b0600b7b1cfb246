//! `moeforge quantize`: a model in another number format.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ::eval::Divergence;
use checkpoint::Folder;
use clap::ValueEnum;
use data::Sample;
use model::export::WeightFormat;
use model::merge::convert;
use model::weights::read_config;

use crate::console::Console;
use crate::eval::compare::{self, LONGEST};
use crate::merge::Report;
use crate::open::{open_folder, open_model, open_tokenizer};

/// Writes a model in another number format, shard by shard, and checks the result.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The model: a Hugging Face folder, or org/name in the local cache.
    model: String,
    /// The format.
    #[arg(long, value_enum)]
    to: Format,
    /// Where the new model goes; must not exist or be empty.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Folder with `test.jsonl`: also compare what both models predict.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    /// Compare on the first so many samples.
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_samples: usize,
    /// Print the report as JSON, with the error of every matrix.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum Format {
    /// Block FP8 for attention and experts, as DeepSeek publishes it; bf16 for the rest.
    #[value(name = "hf:fp8")]
    Fp8,
    /// bfloat16.
    #[value(name = "hf:bf16")]
    Bf16,
    /// Single precision.
    #[value(name = "hf:f32")]
    F32,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let (model, _) = open_folder(&args.model)?;
    let format = match args.to {
        Format::Fp8 => WeightFormat::Fp8,
        Format::Bf16 => WeightFormat::Bf16,
        Format::F32 => WeightFormat::F32,
    };
    // What there is to compare on is opened first: a conversion may take long.
    let samples = match &args.data {
        Some(data) => samples(args, data, &model)?,
        None => vec![],
    };
    let mut progress = console.progress(0, "converting");
    let written = convert(&model, format, &args.out, &mut |done, total| {
        progress.update_of(done as u64, total as u64)
    });
    progress.finish();
    let mut report = Report::new(written, &args.out)?;
    let compared = args
        .data
        .as_ref()
        .map(|data| compared(args, data, &samples, console));
    let compared = compared.transpose();
    report.divergence = compared.as_ref().ok().cloned().flatten();
    report.print(args.json, console);
    compared?;
    Ok(ExitCode::SUCCESS)
}

/// What both models are compared on.
fn samples(args: &Args, data: &Path, model: &Folder) -> anyhow::Result<Vec<Sample>> {
    let (config, tokenizer) = (read_config(model)?, open_tokenizer(model)?);
    let most = [args.max_samples, LONGEST];
    compare::samples(data, (tokenizer.as_ref(), &config), most)
}

/// What the new model predicts, against the old.
fn compared(
    args: &Args,
    data: &Path,
    samples: &[Sample],
    console: &Console,
) -> anyhow::Result<Divergence> {
    let source = open_model(&args.model, None, console)?;
    let found = open_model(&args.out.to_string_lossy(), None, console)?;
    compare::compare(&source, &found, samples, (data, console))
}
