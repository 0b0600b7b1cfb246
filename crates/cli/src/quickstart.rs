//! `moeforge quickstart`: the whole road on what the repository contains, as the verbs a user would type.

use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Instant;

use anyhow::{Context, bail};

use crate::console::Console;

/// Runs eval, train, eval, merge and generate on the repository's own base and data, printing each command.
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
    let root = Path::new("recipes/quickstart");
    if !root.join("base/config.json").exists() {
        bail!("recipes/quickstart/base: not found; run this in the root of the repository");
    }
    if args.out.exists() {
        bail!(
            "{}: exists; remove it, or choose another place with --out",
            args.out.display()
        );
    }
    let out = args.out.to_string_lossy();
    let (base, recipe, data) = (
        "recipes/quickstart/base",
        "recipes/quickstart/lora.toml",
        "datasets/factbook",
    );
    let (run, merged) = (format!("{out}/run"), format!("{out}/merged"));
    let (adapter, choices) = (format!("{run}/adapter"), format!("{data}/choices.jsonl"));
    let steps: [(&str, Vec<&str>); 5] = [
        (
            "What does the base know of our questions?",
            vec!["eval", base, "--data", data, "--tasks", &choices],
        ),
        (
            "Train a LoRA adapter on the questions, in other words.",
            vec!["train", recipe, "--out", &run],
        ),
        (
            "Base and adapter side by side.",
            vec![
                "eval",
                base,
                "--adapter",
                &adapter,
                "--data",
                data,
                "--tasks",
                &choices,
            ],
        ),
        (
            "Fold the adapter into the model.",
            vec!["merge", base, "--adapter", &adapter, "--out", &merged],
        ),
        (
            "Ask it something.",
            vec![
                "generate",
                &merged,
                "--chat",
                "--prompt",
                QUESTION,
                "--max-tokens",
                "40",
            ],
        ),
    ];
    for (number, (what, words)) in (1..).zip(&steps) {
        console.note(format_args!(
            "\n[{number}/{}] {what}\n$ moeforge {}",
            steps.len(),
            shown(words)
        ));
        verb(words)?;
    }
    console.note(format_args!(
        "\nDone in {:.0} s. The merged model is {merged}.",
        started.elapsed().as_secs_f64()
    ));
    Ok(ExitCode::SUCCESS)
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
