//! `moeforge quantize`: a model in another number format.

use std::path::PathBuf;
use std::process::ExitCode;

use checkpoint::Folder;
use clap::ValueEnum;
use model::export::WeightFormat;
use model::merge::convert;

use crate::console::Console;
use crate::merge::report;
use crate::open::find;

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
    let model = Folder::open(&find(&args.model)?)?;
    let format = match args.to {
        Format::Fp8 => WeightFormat::Fp8,
        Format::Bf16 => WeightFormat::Bf16,
        Format::F32 => WeightFormat::F32,
    };
    let mut progress = console.progress(0, "converting");
    let written = convert(&model, format, &args.out, &mut |done, total| {
        progress.update_of(done as u64, total as u64)
    });
    progress.finish();
    report(written, &args.out, args.json, console)
}
