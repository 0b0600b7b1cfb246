//! `moeforge quickstart`: the whole road on what the repository contains, as the verbs a user would type.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, bail};

use crate::console::Console;

/// Runs eval, train, eval, merge, quantize and generate on the repository's own base and data, printing each command.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Where the run goes.
    #[arg(long, value_name = "DIR", default_value = "runs/quickstart")]
    out: PathBuf,
}

/// The question that is asked at the end.
const QUESTION: &str = "What is the capital of France?";

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    let started = Instant::now();
    if !Path::new(BASE).join("config.json").exists() {
        bail!("{BASE}: not found; run this in the root of the repository");
    }
    if args.out.exists() {
        bail!(
            "{}: exists; remove it, or choose another place with --out",
            args.out.display()
        );
    }
    let place = Place::new(&args.out);
    let steps = place.steps();
    for (number, (what, words)) in (1..).zip(&steps) {
        console.note(format_args!(
            "\n[{number}/{}] {what}\n$ moeforge {}",
            steps.len(),
            shown(words)
        ));
        verb(words)?;
    }
    console.note(format_args!(
        "\nDone in {:.0} s. The merged model is {}, and for llama.cpp {}.",
        started.elapsed().as_secs_f64(),
        place.merged,
        place.gguf
    ));
    Ok(ExitCode::SUCCESS)
}

const BASE: &str = "recipes/quickstart/base";
const RECIPE: &str = "recipes/quickstart/lora.toml";
const DATA: &str = "datasets/factbook";
const CHOICES: &str = "datasets/factbook/choices.jsonl";

/// Where the verbs write.
struct Place {
    run: String,
    adapter: String,
    merged: String,
    gguf: String,
}

impl Place {
    fn new(out: &Path) -> Self {
        let at = |name: &str| out.join(name).to_string_lossy().into_owned();
        Self {
            run: at("run"),
            adapter: at("run/adapter"),
            merged: at("merged"),
            gguf: at("merged-q8_0.gguf"),
        }
    }

    /// What each verb is for, and its words.
    fn steps(&self) -> [(&'static str, Vec<&str>); 6] {
        let score = ["--data", DATA, "--tasks", CHOICES];
        let ask = ["--chat", "--max-tokens", "40", "--prompt", QUESTION];
        let fold = ["--adapter", &self.adapter, "--out", &self.merged];
        let pack = ["--to", "gguf:q8_0", "--out", &self.gguf, "--data", DATA];
        [
            (
                "What does the base know?",
                [&["eval", BASE][..], &score].concat(),
            ),
            (
                "Train a LoRA adapter on the questions, in other words.",
                vec!["train", RECIPE, "--out", &self.run],
            ),
            (
                "Base and adapter side by side.",
                [&["eval", BASE, "--adapter", &self.adapter][..], &score].concat(),
            ),
            (
                "Fold the adapter into the model.",
                [&["merge", BASE][..], &fold].concat(),
            ),
            (
                "Write it as a GGUF file, in eight bits, and compare what the two predict.",
                [&["quantize", self.merged.as_str()][..], &pack].concat(),
            ),
            (
                "Ask it something.",
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
fn verb(words: &[&str]) -> anyhow::Result<()> {
    let program = std::env::current_exe().context("finding this program")?;
    let status = Command::new(program)
        .args(words)
        .stdin(Stdio::null())
        .status()
        .with_context(|| format!("running `moeforge {}`", shown(words)))?;
    if !status.success() {
        bail!("`moeforge {}` ended with {status}", shown(words));
    }
    Ok(())
}
