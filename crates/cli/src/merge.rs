//! `moeforge merge`: folds an adapter into its model.

use std::path::PathBuf;
use std::process::ExitCode;

use checkpoint::{Adapter, Folder};
use clap::ValueEnum;
use model::AdapterWeights;
use model::merge::{MergedDType, merge};
use model::weights::read_config;

use crate::console::{Console, MISMATCH, WithCode};
use crate::open::find;

/// Folds an adapter into its model, shard by shard, and checks the result.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The base: a Hugging Face folder, or org/name in the local cache.
    model: String,
    /// The adapter: a PEFT folder.
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// Where the merged model goes; must not exist or be empty.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Number format of the merged weights.
    #[arg(long, value_enum, default_value_t = DType::Bf16)]
    dtype: DType,
    /// Print the report as JSON.
    #[arg(long)]
    json: bool,
}

#[derive(Clone, Copy, Debug, ValueEnum)]
enum DType {
    Bf16,
    F32,
    /// Block FP8 for attention and experts, as DeepSeek publishes it; bf16 for the rest.
    Fp8,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let base = Folder::open(&find(&args.model)?)?;
    let adapter = AdapterWeights::read(&Adapter::open(&args.adapter)?, &read_config(&base)?)?;
    let dtype = match args.dtype {
        DType::Bf16 => MergedDType::Bf16,
        DType::F32 => MergedDType::F32,
        DType::Fp8 => MergedDType::Fp8,
    };
    let mut progress = console.progress(0, "merging");
    let merged = merge(&base, &adapter, dtype, &args.out, &mut |done, total| {
        progress.update_of(done as u64, total as u64)
    });
    progress.finish();
    let report = merged.map_err(|error| match error {
        model::Error::Unfaithful { .. } => anyhow::Error::new(WithCode {
            code: MISMATCH,
            message: error.to_string(),
        }),
        other => other.into(),
    })?;
    if args.json {
        console.result(serde_json::json!({
            "out": args.out,
            "tensors": report.tensors,
            "adapted": report.adapted,
            "bytes": report.bytes,
            "largest_error": report.largest_error,
        }));
    } else {
        let mib = report.bytes as f64 / f64::from(1 << 20);
        console.result(format_args!(
            "{}: {} tensors, {mib:.1} MiB, {} of them with the adapter folded in",
            args.out.display(),
            report.tensors,
            report.adapted
        ));
        console.result(format_args!(
            "checked against base plus adapter: largest error {:.1e} of a row's magnitude",
            report.largest_error
        ));
    }
    Ok(ExitCode::SUCCESS)
}
