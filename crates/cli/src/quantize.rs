//! `moeforge quantize`: a model in another number format.

mod importance;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ::eval::Divergence;
use anyhow::{Context, anyhow, bail};
use checkpoint::{Folder, GgufValue};
use data::{Sample, TokenizerFiles};
use model::Compute;
use model::export::WeightFormat;
use model::export::gguf::write_gguf;
use model::export::mix::{Mix, Scheme};
use model::merge::{MergeReport, convert};
use model::weights::{Audit, audit, read_config};
use serde_json::Value;

use self::importance::ImportanceArgs;
use crate::console::Console;
use crate::eval::compare::{self, LONGEST};
use crate::merge::Report;
use crate::open::{listed, open_folder, open_model, open_tokenizer};

/// Writes a model in another number format, tensor by tensor, and checks the result.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// The model: a Hugging Face folder, a GGUF file, or org/name in the local cache.
    model: String,
    /// The format: hf:fp8, hf:bf16 or hf:f32 for a folder, gguf: and f32, bf16, f16, q8_0, q6_k, q5_k_m, q4_k_m, q4_0 and
    /// others for a GGUF file.
    #[arg(long, value_name = "FORMAT", value_parser = Target::parse)]
    to: Target,
    /// Where the new model goes: a folder that does not exist or is empty, or a GGUF file that does not exist.
    #[arg(long, value_name = "PATH")]
    out: PathBuf,
    /// Of a GGUF: types of parts, as `experts=q4_k,attn=q8_0`; parts are experts, shared, attn, ffn, embed, head, mtp.
    #[arg(
        long,
        value_name = "PART=TYPE,…",
        default_value = "",
        hide_default_value = true
    )]
    mix: String,
    /// Of a GGUF: llama.cpp's name for the pre-tokenizer, where it is not recognized.
    #[arg(long, value_name = "NAME")]
    pre: Option<String>,
    /// Of a GGUF: keep the layer for multi-token prediction, for `--speculative`. A llama.cpp that does not know such layers of
    /// DeepSeek refuses the file.
    #[arg(long)]
    mtp: bool,
    #[command(flatten)]
    importance: ImportanceArgs,
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

/// A number format, and the kind of file it is written in.
#[derive(Clone, Copy, Debug)]
enum Target {
    Folder(WeightFormat),
    Gguf(Scheme),
}

impl Target {
    const FOLDERS: [(&'static str, WeightFormat); 3] = [
        ("hf:fp8", WeightFormat::Fp8),
        ("hf:bf16", WeightFormat::Bf16),
        ("hf:f32", WeightFormat::F32),
    ];

    fn parse(text: &str) -> Result<Self, String> {
        if let Some((_, format)) = Self::FOLDERS.iter().find(|known| known.0 == text) {
            return Ok(Self::Folder(*format));
        }
        let schemes = Scheme::all().into_iter();
        let mut named = schemes.map(|scheme| (format!("gguf:{scheme}"), scheme));
        match named.find(|named| named.0 == text) {
            Some((_, scheme)) => Ok(Self::Gguf(scheme)),
            None => {
                let schemes = Scheme::all()
                    .into_iter()
                    .map(|scheme| format!("gguf:{scheme}"));
                let folders = Self::FOLDERS.iter().map(|known| known.0.to_owned());
                let known: Vec<String> = folders.chain(schemes).collect();
                Err(format!("expected one of {}", known.join(", ")))
            }
        }
    }
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let (model, _) = open_folder(&args.model)?;
    // What there is to compare on is opened first: a conversion may take long.
    let samples = match &args.data {
        Some(data) => samples(args, data, &model)?,
        None => vec![],
    };
    let mut report = Report::new(write(args, &model, console)?, &args.out)?;
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

/// Writes the model; what went wrong in that is the inner error.
fn write(
    args: &Args,
    model: &Folder,
    console: &Console,
) -> anyhow::Result<Result<MergeReport, model::Error>> {
    let scheme = match args.to {
        Target::Gguf(scheme) => scheme,
        Target::Folder(_)
            if !args.mix.is_empty()
                || args.pre.is_some()
                || args.mtp
                || args.importance.is_given() =>
        {
            bail!(
                "`--mix`, `--pre`, `--mtp` and `--imatrix…` are for GGUF files; expected `--to gguf:…`"
            )
        }
        Target::Folder(format) => {
            let mut progress = console.progress(0, "converting");
            let written = convert(model, format, &args.out, &mut |done, total| {
                progress.update_of(done as u64, total as u64)
            });
            progress.finish();
            return Ok(written);
        }
    };
    let mut mix = Mix::new(scheme, &args.mix).map_err(|problem| anyhow!("`--mix`: {problem}"))?;
    let tokenizer = tokenizer_keys(model, args.pre.as_deref(), console)?;
    mix.mtp = args.mtp;
    let Audit { mtp, unknown, .. } = audit(model)?;
    if !unknown.is_empty() {
        console.note(format_args!("left out: {}", listed(&unknown)));
    }
    if !mtp.is_empty() && !args.mtp {
        console.note(format_args!(
            "left out, for --mtp would keep them: {}",
            listed(&mtp)
        ));
    }
    let importance = &args.importance;
    mix.importance = importance.importance((&args.model, model), console)?;
    let mut progress = console.progress(0, "converting");
    let written = write_gguf(model, &mix, tokenizer, &args.out, &mut |done, total| {
        progress.update_of(done as u64, total as u64)
    });
    progress.finish();
    Ok(written)
}

/// What a GGUF says of its tokens: as the source says it, if that is one.
fn tokenizer_keys(
    model: &Folder,
    pre: Option<&str>,
    console: &Console,
) -> anyhow::Result<Vec<(String, GgufValue)>> {
    let keys: Vec<(String, Value)> = match (
        model.metadata(),
        TokenizerFiles::of_model(model.path(), model.metadata())?,
    ) {
        (Some(metadata), _) if pre.is_none() => {
            let keys = metadata
                .iter()
                .map(|(key, value)| (key.clone(), value.clone()));
            keys.filter(|(key, _)| key.starts_with("tokenizer."))
                .collect()
        }
        (_, Some(files)) => files.to_metadata(read_config(model)?.vocab_size, pre)?,
        (_, None) => {
            console.note(format_args!(
                "no tokenizer: llama.cpp will not load the file"
            ));
            vec![]
        }
    };
    let value = |(key, value): (String, Value)| {
        let value = GgufValue::of(&value);
        let value = value.with_context(|| format!("key `{key}`: no value of a GGUF's"))?;
        Ok((key, value))
    };
    keys.into_iter().map(value).collect()
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
    compare::compare((&source, &found, Compute::F32), samples, (data, console))
}
