//! `moeforge merge`: folds an adapter into its model.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use checkpoint::{Adapter, Folder};
use clap::ValueEnum;
use model::AdapterWeights;
use model::export::WeightFormat;
use model::merge::{MergeReport, merge};
use model::weights::read_config;
use serde_json::json;

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
        DType::Bf16 => WeightFormat::Bf16,
        DType::F32 => WeightFormat::F32,
        DType::Fp8 => WeightFormat::Fp8,
    };
    let mut progress = console.progress(0, "merging");
    let merged = merge(&base, &adapter, dtype, &args.out, &mut |done, total| {
        progress.update_of(done as u64, total as u64)
    });
    progress.finish();
    report(merged, &args.out, args.json, console)
}

/// Prints what was written, by a merge or a conversion.
pub(crate) fn report(
    written: Result<MergeReport, model::Error>,
    out: &Path,
    json: bool,
    console: &Console,
) -> anyhow::Result<ExitCode> {
    let report = written.map_err(|error| match error {
        model::Error::Unfaithful { .. } => anyhow::Error::new(WithCode {
            code: MISMATCH,
            message: error.to_string(),
        }),
        other => other.into(),
    })?;
    let mut errors: Vec<_> = report.errors.iter().collect();
    errors.sort_by(|a, b| b.1.total_cmp(&a.1));
    if json {
        let errors = errors.iter().map(|(name, error)| json!([name, error]));
        console.result(json!({
            "out": out,
            "tensors": report.tensors,
            "adapted": report.adapted,
            "bytes": report.bytes,
            "largest_error": report.largest_error,
            "relative_errors": errors.collect::<Vec<_>>(),
        }));
        return Ok(ExitCode::SUCCESS);
    }
    let adapted = match report.adapted {
        0 => String::new(),
        n => format!(", {n} of them with the adapter folded in"),
    };
    console.result(format_args!(
        "{}: {} tensors, {:.1} MiB{adapted}",
        out.display(),
        report.tensors,
        report.bytes as f64 / f64::from(1 << 20),
    ));
    let against = match report.adapted {
        0 => "the source",
        _ => "base plus adapter",
    };
    console.result(format_args!(
        "checked against {against}: largest error {:.1e} of a row's magnitude",
        report.largest_error
    ));
    if let (Some(worst), Some(median)) = (errors.first(), errors.get(errors.len() / 2)) {
        console.result(format_args!(
            "relative error of {} matrices: median {:.1e}, worst {:.1e} ({})",
            errors.len(),
            median.1,
            worst.1,
            worst.0
        ));
    }
    Ok(ExitCode::SUCCESS)
}
