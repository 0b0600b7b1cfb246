//! `moeforge quantize`: a model in another weight format.

mod importance;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ::eval::Divergence;
use anyhow::{Context, anyhow, bail};
use checkpoint::{Folder, GgufValue};
use data::{GgufEnds, Sample, SplitName, Tokenizer, TokenizerFiles};
use model::Compute;
use model::export::gguf::write_gguf;
use model::export::mix::Mix;
use model::export::{MergeReport, convert};
use model::load::{Audit, audit, read_config};
use serde_json::Value;

use self::importance::ImportanceArgs;
use crate::console::{Console, printable};
use crate::device::cpu;
use crate::eval::compare::{self, MAX_COMPARED_LENGTH, ModelPair, RowLimits};
use crate::merge::ConversionReport;
use crate::open::{listed, note_differences, note_keys, open_folder, open_model, open_tokenizer};
use crate::plan::budget::BudgetArgs;
use crate::plan::conversion::expect_room_for_tensors;
use crate::rows::{ColumnArgs, SplitRows};
use crate::values::OutputFormat;

/// Write a model in another weight format.
///
/// The model is converted tensor by tensor, and the result is checked against the source. If the check fails,
/// nothing is written and the exit code is 4.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Model: Hugging Face folder, GGUF file, or `org/name` in the local Hugging Face cache.
    model: String,
    /// Weight format. Hugging Face folders: hf:fp8, hf:bf16, hf:f32. GGUF files: gguf:f32, gguf:bf16, gguf:f16,
    /// gguf:q8_0, gguf:q6_k, gguf:q5_k_m, gguf:q4_k_m, gguf:q4_0, … An unknown name prints the full list.
    #[arg(long, value_name = "FORMAT", value_parser = OutputFormat::parse)]
    to: OutputFormat,
    /// Output: a folder, new or empty, or a GGUF file, which must not exist.
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    /// Folder with a test split (`test.jsonl`, `.csv`, `.parquet`, …), or a file of rows, for comparing the predictions
    /// of the source and the result.
    #[arg(long, value_name = "DIR")]
    data: Option<PathBuf>,
    #[command(flatten)]
    columns: ColumnArgs,
    /// Maximum number of samples of --data.
    #[arg(long, value_name = "N", default_value_t = 64)]
    max_samples: usize,
    /// Print JSON with the error of every matrix, instead of a summary.
    #[arg(long)]
    json: bool,
    #[command(flatten)]
    budget: BudgetArgs,
    #[command(flatten)]
    gguf: GgufArgs,
}

// Options of GGUF files.
#[derive(Debug, clap::Args)]
#[command(next_help_heading = "GGUF files only")]
struct GgufArgs {
    /// Weight types by part, such as `experts=q4_k,attn=q8_0`. Parts: experts, shared, attn, ffn, embed, head, mtp.
    #[arg(
        long,
        value_name = "PART=TYPE,…",
        default_value = "",
        hide_default_value = true
    )]
    mix: String,
    /// Pre-tokenizer name for llama.cpp, if the model's pre-tokenizer is not recognized.
    #[arg(long, value_name = "NAME")]
    pre: Option<String>,
    /// Keep the MTP layer, for speculative decoding. Older versions of llama.cpp reject such files.
    #[arg(long)]
    mtp: bool,
    #[command(flatten)]
    importance: ImportanceArgs,
}

impl GgufArgs {
    fn is_given(&self) -> bool {
        !self.mix.is_empty() || self.pre.is_some() || self.mtp || self.importance.is_given()
    }
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let (model, _) = open_folder(&args.model)?;
    expect_room_for_tensors(&model, Some(args.to), args.budget)?;
    note_keys(&model, console)?;
    // The rows are opened first: a conversion may take long.
    let samples = match &args.data {
        Some(data) => samples(args, data, &model, console)?,
        None => vec![],
    };
    let mut report = ConversionReport::new(write(args, &model, console)?, &args.out)?;
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

/// Writes the model. The inner error is one of writing.
fn write(
    args: &Args,
    model: &Folder,
    console: &Console,
) -> anyhow::Result<Result<MergeReport, model::Error>> {
    let gguf = &args.gguf;
    let scheme = match args.to {
        OutputFormat::Gguf(scheme) => scheme,
        OutputFormat::Folder(_) if gguf.is_given() => {
            bail!(
                "`--mix`, `--pre`, `--mtp` and `--imatrix…` are for GGUF files; expected `--to gguf:…`"
            )
        }
        OutputFormat::Folder(format) => {
            let format = format.weight_format();
            let mut progress = console.progress(0, "converting");
            let written = convert(model, format, &args.out, &mut |done, total| {
                progress.update_of(done as u64, total as u64)
            });
            progress.finish();
            return Ok(written);
        }
    };
    let mut mix = Mix::new(scheme, &gguf.mix).map_err(|problem| anyhow!("`--mix`: {problem}"))?;
    let tokenizer = tokenizer_keys(model, gguf.pre.as_deref(), console)?;
    mix.mtp = gguf.mtp;
    if model.metadata().is_none() {
        note_differences(model, console)?;
    }
    let Audit { mtp, unknown, .. } = audit(model)?;
    if !unknown.is_empty() {
        console.note(format_args!("left out: {}", listed(&unknown)));
    }
    if !mtp.is_empty() && !gguf.mtp {
        console.note(format_args!(
            "MTP layer left out; --mtp keeps it: {}",
            listed(&mtp)
        ));
    }
    let (importance, columns) = (&gguf.importance, &args.columns.columns);
    mix.importance = importance.importance(&args.model, model, columns, console)?;
    let mut progress = console.progress(0, "converting");
    let written = write_gguf(model, &mix, tokenizer, &args.out, &mut |done, total| {
        progress.update_of(done as u64, total as u64)
    });
    progress.finish();
    Ok(written)
}

/// The key with the name of the pre-tokenizer.
const PRE: &str = "tokenizer.ggml.pre";

/// The tokenizer's keys of a GGUF file: those of the source, if it is one too.
fn tokenizer_keys(
    model: &Folder,
    pre: Option<&str>,
    console: &Console,
) -> anyhow::Result<Vec<(String, GgufValue)>> {
    let keys: Vec<(String, Value)> = match model.metadata() {
        Some(metadata) => {
            let keys = metadata
                .iter()
                .filter(|(key, _)| key.starts_with("tokenizer."));
            let mut keys: Vec<_> = keys.map(|(key, v)| (key.clone(), v.clone())).collect();
            if let (Some(pre), false) = (pre, keys.is_empty()) {
                keys.retain(|(key, _)| key != PRE);
                keys.push((PRE.into(), pre.into()));
            }
            keys
        }
        None => match TokenizerFiles::read(model.path())? {
            Some(files) => {
                let mut keys = files.to_metadata(read_config(model)?.vocab_size, pre)?;
                keys.extend(end_keys(model, &files, console)?);
                keys
            }
            None => vec![],
        },
    };
    if keys.is_empty() {
        console.note(format_args!(
            "no tokenizer found: llama.cpp will not load the file"
        ));
    }
    let value = |(key, value): (String, Value)| {
        let value = GgufValue::of(&value);
        let value =
            value.with_context(|| format!("key `{key}`: a GGUF file cannot hold its value"))?;
        Ok((key, value))
    };
    keys.into_iter().map(value).collect()
}

/// The keys of the ends of a text that have no key yet. Notes those that a GGUF file has no key for.
fn end_keys(
    model: &Folder,
    files: &TokenizerFiles,
    console: &Console,
) -> anyhow::Result<Vec<(String, Value)>> {
    let tokenizer = Tokenizer::new(files)?;
    let ends = infer::end_of_text(model, Some(&tokenizer))?;
    ends.notes.iter().for_each(|note| console.note(note));
    let GgufEnds { keys, lost } = tokenizer.gguf_ends(&ends.ids);
    if !lost.is_empty() {
        let lost = lost
            .iter()
            .map(|(id, text)| format!("{id} ({})", printable(text, &[])));
        console.note(format_args!(
            "tokens that end a text, and for which a GGUF file has no key: {}; texts of the file do not end with them",
            lost.collect::<Vec<_>>().join(", ")
        ));
    }
    Ok(keys)
}

/// The rows that both models are compared on.
fn samples(
    args: &Args,
    data: &Path,
    model: &Folder,
    console: &Console,
) -> anyhow::Result<Vec<Sample>> {
    let (config, tokenizer) = (read_config(model)?, open_tokenizer(model)?);
    let limits = RowLimits {
        max_samples: args.max_samples,
        max_length: MAX_COMPARED_LENGTH,
    };
    let rows = SplitRows {
        path: data,
        split: SplitName::Test,
        columns: &args.columns.columns,
        console,
    };
    compare::samples(rows, tokenizer.as_ref(), &config, limits)
}

/// The divergence of the new model's predictions from the old one's.
fn compared(
    args: &Args,
    data: &Path,
    samples: &[Sample],
    console: &Console,
) -> anyhow::Result<Divergence> {
    let device = cpu();
    let source = open_model(&args.model, None, &device, console)?;
    let written = open_model(&args.out.to_string_lossy(), None, &device, console)?;
    let pair = ModelPair {
        reference: &source,
        model: &written,
        compute: Compute::F32,
    };
    pair.compare(samples, data, console)
}
