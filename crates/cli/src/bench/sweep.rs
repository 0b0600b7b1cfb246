//! A sweep over combinations of settings, measured in turn and shown as they come. Several combinations run in a
//! process each, so that the peak memory of one does not include another's.

use std::ffi::OsString;
use std::process::{Command, ExitCode, Stdio};

use anyhow::{Context, bail};
use serde_json::Value;

use super::table::{self, Column};
use crate::console::Console;

// Sizes of training steps, in all combinations. Not a doc comment: clap would show that as the help of the verb.
#[derive(Debug, Clone, clap::Args)]
pub(super) struct StepSizes {
    /// Sequences per step; several comma-separated values are measured in turn.
    #[arg(long, value_name = "B", value_delimiter = ',', default_value = "4",
          value_parser = clap::value_parser!(u64).range(1..=1 << 16))]
    batch: Vec<u64>,
    /// Tokens per sequence; several comma-separated values are measured in turn.
    #[arg(long, value_name = "S", value_delimiter = ',', default_value = "256",
          value_parser = clap::value_parser!(u64).range(2..=1 << 20))]
    seq: Vec<u64>,
}

impl StepSizes {
    /// Numbers of sequences, and of tokens of each.
    pub(super) fn all(&self) -> impl Iterator<Item = (u64, u64)> {
        self.batch
            .iter()
            .flat_map(|&batch| self.seq.iter().map(move |&seq| (batch, seq)))
    }
}

/// How the combinations are measured and shown.
pub(super) struct Sweep<'a, C> {
    /// Measures one in this process. The result has a list `results` with one entry, and keys that all results share.
    pub(super) measure: &'a dyn Fn(&C) -> anyhow::Result<Value>,
    /// The arguments of `moeforge bench` that measure this one alone.
    pub(super) words: &'a dyn Fn(&C) -> Vec<OsString>,
    /// The line above the table.
    pub(super) title: fn(&Value) -> String,
    pub(super) columns: &'static [Column],
}

impl<C> Sweep<'_, C> {
    /// Measures all, and prints a table line by line or one JSON object.
    pub(super) fn run(
        &self,
        combinations: &[C],
        json: bool,
        console: &Console,
    ) -> anyhow::Result<ExitCode> {
        let mut whole = Value::Null;
        for combination in combinations {
            let measured = if combinations.len() == 1 {
                (self.measure)(combination)?
            } else {
                match measure_apart(&(self.words)(combination), console)? {
                    Ok(measured) => measured,
                    // The child has printed the error.
                    Err(code) => return Ok(code),
                }
            };
            if !json {
                if whole.is_null() {
                    let (title, header) = ((self.title)(&measured), table::header(self.columns));
                    console.result(format_args!("{title}\n\n{header}"));
                }
                console.result(table::row(self.columns, &measured["results"][0]));
            }
            whole = joined(whole, measured);
        }
        if json {
            console.result(format_args!("{whole:#}"));
        } else if let Some(knee) = table::knee(&whole["results"]) {
            console.result(format_args!("\n{knee}"));
        }
        Ok(ExitCode::SUCCESS)
    }
}

/// The options whose numbers are given.
pub(super) fn options<const N: usize>(
    numbers: [(&str, Option<u64>); N],
) -> impl Iterator<Item = OsString> {
    let given = numbers
        .into_iter()
        .filter_map(|(option, number)| Some([option.into(), number?.to_string().into()]));
    given.flatten()
}

/// One combination, in a process of its own; if that fails, its exit code.
pub(super) fn measure_apart(
    words: &[OsString],
    console: &Console,
) -> anyhow::Result<Result<Value, ExitCode>> {
    let program = std::env::current_exe().context("cannot find this program")?;
    let threads = rayon::current_num_threads().to_string();
    let child = Command::new(program)
        .arg("bench")
        .args(words)
        .args(["--json", "--threads", &threads])
        .args(console.flag())
        .stdin(Stdio::null())
        .stderr(Stdio::inherit())
        .output()
        .context("cannot start `moeforge bench`")?;
    match child.status.code() {
        Some(0) => Ok(Ok(serde_json::from_slice(&child.stdout)?)),
        Some(code) => Ok(Err(ExitCode::from(code as u8))),
        None => bail!("{words:?}: ended by the system, {}", child.status),
    }
}

/// Joins the results of both, with the shared keys of the first.
fn joined(mut whole: Value, mut more: Value) -> Value {
    match whole["results"].as_array_mut() {
        None => more,
        Some(results) => {
            results.extend(
                more["results"]
                    .as_array_mut()
                    .into_iter()
                    .flat_map(std::mem::take),
            );
            whole
        }
    }
}
