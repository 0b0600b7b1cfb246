//! `moeforge merge`: merges an adapter into its base model.

pub(crate) mod adapter;
mod card;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ::eval::Divergence;
use checkpoint::Folder;
use clap::ValueEnum;
use clap::builder::PossibleValue;
use model::PrecisionClass;
use model::export::{MergeReport, merge};
use model::load::{audit, read_config};
use serde_json::json;

use self::card::Merged;
use crate::console::{Console, MISMATCH, WithCode};
use crate::open::{listed, note_keys, open_folder, read_adapter};
use crate::plan::budget::BudgetArgs;
use crate::plan::conversion::expect_room_for_tensors;
use crate::values::FolderFormat;

/// Merge an adapter into its base model.
///
/// The model is merged shard by shard, and the result is checked against base plus adapter. If the check
/// fails, nothing is written and the exit code is 4.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Base model: Hugging Face folder, or `org/name` in the local Hugging Face cache.
    model: String,
    /// LoRA adapter: PEFT folder.
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// Output folder for the merged model, new or empty.
    #[arg(long, value_name = "DIR")]
    out: PathBuf,
    /// Weight format of the merged model. Default: every tensor keeps its own, and those without an update keep their
    /// bytes; FP8 and GGUF's quantized types become bf16.
    #[arg(long, value_enum, value_name = "FORMAT")]
    dtype: Option<FolderFormat>,
    /// Print JSON instead of a summary.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    budget: BudgetArgs,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let (base, _) = open_folder(&args.model)?;
    expect_room_for_tensors(&base, None, args.budget)?;
    note_keys(&base, console)?;
    let weights = read_adapter(&args.adapter, &read_config(&base)?, console)?;
    note_tensors(&base, console)?;
    let dtype = args.dtype.map(FolderFormat::weight_format);
    let mut progress = console.progress(0, "merging");
    let merged = merge(&base, &weights, dtype, &args.out, &mut |done, total| {
        progress.update_of(done as u64, total as u64)
    });
    progress.finish();
    let report = ConversionReport::new(merged, &args.out)?;
    let format = args.dtype.as_ref().and_then(ValueEnum::to_possible_value);
    let merged = Merged {
        base: &base,
        adapter: &args.adapter,
        format: format.as_ref().map(PossibleValue::get_name),
        report: &report.written,
    };
    merged.write_card(&args.out)?;
    report.print(args.json, console);
    Ok(ExitCode::SUCCESS)
}

/// Notes the tensors of the base that are left out, and those that are no part of the model.
fn note_tensors(base: &Folder, console: &Console) -> anyhow::Result<()> {
    let unindexed = base.unindexed().iter();
    let unindexed: Vec<String> = unindexed.map(|tensor| tensor.name.to_string()).collect();
    if !unindexed.is_empty() {
        console.note(format_args!(
            "not in the index and left out: {}",
            listed(&unindexed)
        ));
    }
    let unknown = audit(base)?.unknown;
    if !unknown.is_empty() {
        console.note(format_args!(
            "no part of the model, and carried along: {}",
            listed(&unknown)
        ));
    }
    Ok(())
}

/// The result of a merge or a conversion.
pub(crate) struct ConversionReport<'a> {
    written: MergeReport,
    out: &'a Path,
    /// Divergence of the written model's predictions from the source's, if it was measured.
    pub(crate) divergence: Option<Divergence>,
}

impl<'a> ConversionReport<'a> {
    /// A failed check has an exit code of its own.
    pub(crate) fn new(
        written: Result<MergeReport, model::Error>,
        out: &'a Path,
    ) -> anyhow::Result<Self> {
        let written = written.map_err(|error| match error {
            model::Error::Unfaithful { .. } => anyhow::Error::new(WithCode {
                code: MISMATCH,
                message: error.to_string(),
            }),
            other => other.into(),
        })?;
        Ok(Self {
            written,
            out,
            divergence: None,
        })
    }

    pub(crate) fn print(&self, json: bool, console: &Console) {
        let mut errors: Vec<_> = self.written.errors.iter().collect();
        errors.sort_by(|a, b| b.1.total_cmp(&a.1));
        if json {
            console.result(self.json(&errors));
        } else {
            console.result(self.text(&errors));
        }
    }

    fn json(&self, errors: &[&(String, f64)]) -> serde_json::Value {
        let MergeReport {
            tensors,
            adapted,
            folded,
            kept,
            untied,
            bytes,
            weighted,
            largest_error,
            types,
            replaced,
            ..
        } = &self.written;
        let errors = errors.iter().map(|(name, error)| json!([name, error]));
        json!({
            "out": self.out,
            "tensors": tensors,
            "adapted": adapted,
            "adapter_tensors": folded,
            "unchanged": kept,
            "untied_head": untied,
            "imatrix_tensors": weighted,
            "types": types.iter().map(|(name, n)| json!([name, n])).collect::<Vec<_>>(),
            "replaced_types": replaced.iter().map(|(of, by, n)| json!([of, by, n])).collect::<Vec<_>>(),
            "bytes": bytes,
            "largest_error": largest_error,
            "relative_errors": errors.collect::<Vec<_>>(),
            "divergence": self.divergence,
        })
    }

    fn text(&self, errors: &[&(String, f64)]) -> String {
        let folded = self.written.folded;
        let (adapted, against) = match self.written.adapted {
            0 => (String::new(), "the source"),
            n => (
                format!(", {n} of them with the adapter's {folded} tensors merged in"),
                "base plus adapter",
            ),
        };
        let mut text = format!(
            "{}: {} tensors, {:.1} MiB{adapted}",
            self.out.display(),
            self.written.tensors,
            self.written.bytes as f64 / f64::from(1 << 20),
        );
        let types = self.written.types.iter();
        let types: Vec<String> = types.map(|(name, n)| format!("{n} {name}")).collect();
        if !types.is_empty() {
            text += &format!("\nmatrices by type: {}", types.join(", "));
        }
        for (wanted, found, n) in &self.written.replaced {
            text += &format!(
                "\n{n} of them in {found} in place of {wanted}: their rows are not whole blocks of it"
            );
        }
        if self.written.weighted > 0 {
            let n = self.written.weighted;
            text += &format!("\nquantized with an importance matrix: {n} tensors");
        }
        if self.written.untied {
            text += "\nthe output head has weights of its own now: the adapter parts it from the embedding \
                     (`tie_word_embeddings` is false)";
        }
        if let Some(largest) = self.written.largest_error {
            if self.written.kept > 0 {
                let n = self.written.kept;
                text += &format!("\nunchanged, byte for byte: {n} tensors");
            }
            let n = errors.len();
            text += &format!(
                "\nchecked against {against}: {n} matrices, largest error {largest:.1e} of a row's magnitude"
            );
        }
        if let (Some(worst), Some(median)) = (errors.first(), errors.get(errors.len() / 2)) {
            text += &format!(
                "\nrelative error of {} matrices: median {:.1e}, worst {:.1e} ({})",
                errors.len(),
                median.1,
                worst.1,
                worst.0
            );
            text += &by_part(errors);
        }
        if let Some(found) = &self.divergence {
            text += &format!("\n{}", found.to_text());
        }
        text
    }
}

/// The median and the worst error of each part of the model that has more than one matrix.
fn by_part(errors: &[&(String, f64)]) -> String {
    let lines = PrecisionClass::ALL.into_iter().filter_map(|class| {
        // From the worst on, as they come.
        let of_class: Vec<f64> = errors
            .iter()
            .filter(|error| PrecisionClass::of(&error.0) == class)
            .map(|error| error.1)
            .collect();
        let (worst, median) = (of_class.first()?, of_class.get(of_class.len() / 2)?);
        Some(format!(
            "\n  {}: {} matrices, median {median:.1e}, worst {worst:.1e}",
            class.name(),
            of_class.len()
        ))
    });
    lines.collect()
}
