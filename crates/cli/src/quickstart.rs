//! `moeforge quickstart`: the full pipeline on the bundled model and data, as the verbs a user would type.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, bail};

use crate::console::Console;
use crate::device::{DeviceArgs, VARIABLE};

/// Runs eval, train, eval, merge, quantize and generate on the bundled model and data, and prints each command.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Output folder, which must not exist. Default: runs/quickstart, or the first of runs/quickstart-2, -3, … that
    /// does not exist.
    #[arg(long, value_name = "DIR")]
    out: Option<PathBuf>,
    #[command(flatten)]
    device: DeviceArgs,
}

/// The question for the merged model.
const QUESTION: &str = "What is the capital of France?";

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    args.device.open()?;
    if !Path::new(BASE).join("config.json").exists() {
        bail!("{BASE}: not found; run this in the root of the repository");
    }
    let out = match &args.out {
        Some(out) if out.exists() => bail!(
            "{}: exists; remove it, or choose another folder with --out",
            out.display()
        ),
        Some(out) => out.clone(),
        None => fresh(Path::new(OUT)),
    };
    console.note(format_args!("Writing to {}.", out.display()));
    let place = Workplace::new(&out);
    let steps = place.steps();
    for (number, (what, words)) in (1..).zip(&steps) {
        console.note(format_args!(
            "\n[{number}/{}] {what}\n$ moeforge {}",
            steps.len(),
            shown(words)
        ));
        verb(words, args.device.name())?;
    }
    console.note(format_args!(
        "\nDone in {:.0} s. The merged model is {}, and for llama.cpp {}.",
        started.elapsed().as_secs_f64(),
        place.merged,
        place.gguf
    ));
    Ok(ExitCode::SUCCESS)
}

const OUT: &str = "runs/quickstart";
const BASE: &str = "recipes/quickstart/base";
const RECIPE: &str = "recipes/quickstart/lora.toml";
const DATA: &str = "datasets/factbook";
const CHOICES: &str = "datasets/factbook/choices.jsonl";

/// The path itself, or the first of `path-2`, `path-3`, … that does not exist.
fn fresh(path: &Path) -> PathBuf {
    let numbered = (2..).map(|number| format!("{}-{number}", path.display()).into());
    std::iter::once(path.to_owned())
        .chain(numbered)
        .find(|path| !path.exists())
        .expect("numbers do not run out")
}

/// Where the verbs write.
struct Workplace {
    run: String,
    adapter: String,
    merged: String,
    gguf: String,
}

impl Workplace {
    fn new(out: &Path) -> Self {
        let at = |name: &str| out.join(name).to_string_lossy().into_owned();
        Self {
            run: at("run"),
            adapter: at("run/adapter"),
            merged: at("merged"),
            gguf: at("merged-q8_0.gguf"),
        }
    }

    /// The purpose of each verb, and its arguments.
    fn steps(&self) -> [(&'static str, Vec<&str>); 6] {
        let score = ["--data", DATA, "--tasks", CHOICES];
        let ask = ["--chat", "--max-tokens", "40", "--prompt", QUESTION];
        let fold = ["--adapter", &self.adapter, "--out", &self.merged];
        let pack = ["--to", "gguf:q8_0", "--out", &self.gguf, "--data", DATA];
        [
            (
                "Evaluate the base model.",
                [&["eval", BASE][..], &score].concat(),
            ),
            (
                "Train a LoRA adapter on the same facts, in different words.",
                vec!["train", RECIPE, "--out", &self.run],
            ),
            (
                "Evaluate the base model with and without the adapter.",
                [&["eval", BASE, "--adapter", &self.adapter][..], &score].concat(),
            ),
            (
                "Merge the adapter into the base model.",
                [&["merge", BASE][..], &fold].concat(),
            ),
            (
                "Quantize the merged model to an 8-bit GGUF file, and compare the predictions of both.",
                [&["quantize", self.merged.as_str()][..], &pack].concat(),
            ),
            (
                "Ask the quantized model a question.",
                [&["generate", self.gguf.as_str()][..], &ask].concat(),
            ),
        ]
    }
}

/// A command line as one would type it.
fn shown(words: &[&str]) -> String {
    words
        .iter()
        .map(|word| {
            if word.contains(' ') {
                format!("{word:?}")
            } else {
                (*word).to_owned()
            }
        })
        .collect::<Vec<_>>()
        .join(" ")
}

/// Runs one verb of this program, as a program of its own.
fn verb(words: &[&str], device: Option<String>) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("finding this program")?;
    let status = Command::new(program)
        .args(words)
        .envs(device.map(|name| (VARIABLE, name)))
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("running `moeforge {}`", shown(words)))?;
    if !status.success() {
        bail!("`moeforge {}` ended with {status}", shown(words));
    }
    Ok(())
}
