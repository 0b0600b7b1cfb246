//! `moeforge export-adapter`: an adapter as the file that llama.cpp loads with a base.

use std::path::PathBuf;
use std::process::ExitCode;

use model::export::lora_gguf::write_lora_gguf;
use model::load::read_config;
use serde_json::json;

use crate::console::Console;
use crate::open::{listed, note_keys, open_folder, read_adapter};

/// Write an adapter as a GGUF file for llama.cpp's `--lora`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Base model: Hugging Face folder, GGUF file, or `org/name` in the local Hugging Face cache.
    model: String,
    /// LoRA adapter: PEFT folder.
    #[arg(long, value_name = "DIR")]
    adapter: PathBuf,
    /// GGUF file to write, which must not exist.
    #[arg(long, value_name = "FILE.gguf")]
    out: PathBuf,
    /// Keep the updates that llama.cpp ignores at run time, for tools that merge the file: in DeepSeek models, those of
    /// the output head and of all attention projections except `o_proj`.
    #[arg(long)]
    keep_ignored: bool,
    /// Print JSON instead of a summary.
    #[arg(long)]
    json: bool,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let (base, _) = open_folder(&args.model)?;
    note_keys(&base, console)?;
    let adapter = read_adapter(&args.adapter, &read_config(&base)?, console)?;
    let written = write_lora_gguf(&base, &adapter, args.keep_ignored, &args.out)?;
    if !written.ignored.is_empty() {
        console.note(format_args!(
            "llama.cpp ignores the updates of {} at run time",
            listed(&written.ignored)
        ));
    }
    if args.json {
        console.result(json!({
            "out": args.out,
            "tensors": written.tensors,
            "adapter_tensors": adapter.n_tensors(),
            "bytes": written.bytes,
            "ignored": written.ignored,
        }));
    } else {
        console.result(format_args!(
            "{}: updates of {} tensors, of the adapter's {} tensors, {:.1} MiB",
            args.out.display(),
            written.tensors,
            adapter.n_tensors(),
            written.bytes as f64 / f64::from(1 << 20)
        ));
    }
    Ok(ExitCode::SUCCESS)
}
