//! `eval`: scores of a model, and the difference to its baseline.

pub(crate) mod compare;
pub(crate) mod experts;
mod harness_files;
pub(crate) mod logits;
pub(crate) mod survival;
mod tasks;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ::eval::{EvalConfig, EvalReport, GroupResult, ModelScores, TextScore};
use anyhow::Context;
use data::{Sample, SplitName};

use self::tasks::LoadedTasks;
use crate::console::{Console, Progress, finite};
use crate::open::{ModelArgs, Opened, expect_computed, open_model};
use crate::plan::budget::BudgetArgs;
use crate::plan::conversion::expect_room_for_losses;
use crate::rows::{ColumnArgs, SplitRows};
use crate::values::{COMPUTE_HELP, ComputeValue};

/// Evaluate a model: loss, perplexity, bits per byte, multiple choice.
///
/// With a baseline, both models are scored on the same data and their scores are compared. To measure how much the
/// predictions of two models differ, use `compare`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    #[command(flatten)]
    pub(crate) model: ModelArgs,
    /// Folder with a test split (`test.jsonl`, `.csv`, `.parquet`, …), or a file of rows, for loss, perplexity and bits
    /// per byte.
    #[arg(long, value_name = "DIR", required_unless_present = "tasks")]
    pub(crate) data: Option<PathBuf>,
    /// Tasks: files of lm-evaluation-harness (`.yaml`), folders of these, or their names in the folders of --include-path; or
    /// multiple-choice files with rows `{prompt, choices, answer}` or in the form of published tasks.
    #[arg(long, value_name = "FILE|DIR|NAME,…", value_delimiter = ',')]
    pub(crate) tasks: Vec<String>,
    /// Folder whose task files --tasks may name. May be repeated.
    #[arg(long, value_name = "DIR")]
    pub(crate) include_path: Vec<PathBuf>,
    /// Examples before each question of a task. Default: as many as the task says.
    #[arg(long, value_name = "N")]
    pub(crate) num_fewshot: Option<usize>,
    #[command(flatten)]
    pub(crate) columns: ColumnArgs,
    /// Baseline model to compare with, or `none`. Default: the model without its adapter if --adapter is given, else
    /// `none`.
    #[arg(long, value_name = "MODEL|none")]
    pub(crate) baseline: Option<String>,
    /// Sequences per batch.
    #[arg(long, alias = "batch-size", value_name = "N", default_value_t = 8, value_parser = clap::value_parser!(u64).range(1..=1 << 10))]
    pub(crate) batch: u64,
    /// Maximum sequence length, in tokens; at most the model's context length. Default: 1024 for --data and rows of questions, the
    /// model's context length for tasks of lm-evaluation-harness.
    #[arg(long, value_name = "N")]
    pub(crate) max_length: Option<usize>,
    /// Maximum number of samples, and of questions per task. Default: all.
    #[arg(long, value_name = "N")]
    pub(crate) max_samples: Option<usize>,
    #[arg(long, value_enum, default_value_t = ComputeValue::F32, help = COMPUTE_HELP)]
    pub(crate) compute: ComputeValue,
    /// Output folder for `report.json` and `report.txt`, and for the results and samples of tasks in lm-evaluation-harness's
    /// layout, in a folder for each model. Default: no files are written.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) budget: BudgetArgs,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    for name in ["report.json", "report.txt"] {
        args.out
            .iter()
            .try_for_each(|out| checkpoint::expect_absent(&out.join(name)))?;
    }
    let tasks = tasks::load(args, console)?;
    let mut scores = Vec::new();
    let device = args.model.device.open()?;
    expect_computed(args.compute, &device)?;
    for (model, adapter) in models(args) {
        let opened = open_model(model, adapter, &device, console)?;
        scores.push(score(&opened, &tasks, args, console)?);
        console.memory();
    }
    if let Some(out) = &args.out {
        harness_files::write(out, &tasks.tasks, &scores)?;
    }
    let report = EvalReport::new(scores);

    let (text, json) = (report.to_text(), format!("{:#}", report.to_json()));
    if let Some(out) = &args.out {
        std::fs::create_dir_all(out).with_context(|| format!("cannot make `{}`", out.display()))?;
        checkpoint::write_file(&out.join("report.json"), format!("{json}\n").as_bytes())?;
        checkpoint::write_file(&out.join("report.txt"), text.as_bytes())?;
    }
    console.result(if args.json { &json } else { text.trim_end() });
    Ok(ExitCode::SUCCESS)
}

/// The models and their adapters, the baseline first.
fn models(args: &Args) -> Vec<(&str, Option<&Path>)> {
    let (model, adapter) = (args.model.model.as_str(), args.model.adapter.as_deref());
    let baseline = match args.baseline.as_deref() {
        Some("none") => None,
        Some(baseline) => Some((baseline, None)),
        None => adapter.map(|_| (model, None)),
    };
    baseline.into_iter().chain([(model, adapter)]).collect()
}

fn score(
    opened: &Opened,
    tasks: &LoadedTasks,
    args: &Args,
    console: &Console,
) -> anyhow::Result<ModelScores> {
    let text = args.data.as_ref();
    let text = text.map(|data| text_score(opened, data, args, console));
    let results = tasks.tasks.iter();
    let results = results.map(|task| task.result(opened, args, console));
    let results = results.collect::<anyhow::Result<Vec<_>>>()?;
    let groups = tasks.groups.iter();
    Ok(ModelScores {
        name: opened.name.clone(),
        text: text.transpose()?,
        groups: groups
            .map(|group| GroupResult::new(group, &results))
            .collect(),
        tasks: results,
    })
}

fn text_score(
    opened: &Opened,
    file: &Path,
    args: &Args,
    console: &Console,
) -> anyhow::Result<TextScore> {
    let model = &opened.model.config;
    let (vocab_size, limit) = (model.vocab_size, model.max_position_embeddings);
    let max_length = args.max_length.unwrap_or(tasks::ROW_LENGTH).min(limit);
    let rows = SplitRows {
        path: file,
        split: SplitName::Test,
        columns: &args.columns.columns,
        console,
    };
    let mut split = rows.read(opened.tokenizer.as_deref(), max_length, vocab_size)?;
    if split.counts.truncated_rows > 0 {
        console.note(format_args!(
            "{}: {} of {} rows are truncated to {max_length} tokens",
            file.display(),
            split.counts.truncated_rows,
            split.counts.rows
        ));
    }
    split
        .samples
        .truncate(args.max_samples.unwrap_or(usize::MAX));
    expect_room(opened, &split.samples, args)?;
    let mut progress = console.progress(split.samples.len() as u64, "samples");
    let tell = &mut |done, _| tell(&mut progress, done, opened);
    let found = ::eval::perplexity(&opened.model, &split.samples, &config(args), tell);
    progress.finish();
    scored(found, file, opened)
}

/// Refuses samples whose batches do not fit in memory.
fn expect_room<'a>(
    opened: &Opened,
    samples: impl IntoIterator<Item = &'a Sample>,
    args: &Args,
) -> anyhow::Result<()> {
    let lengths = samples.into_iter().map(|sample| sample.ids.len());
    let (rows, longest) = lengths.fold((0, 0), |(n, most), len| (n + 1, len.max(most)));
    let batch = (args.batch.min(rows), longest);
    expect_room_for_losses(&opened.model.config, batch, args.budget)
}

fn config(args: &Args) -> EvalConfig {
    EvalConfig {
        batch_size: args.batch as usize,
        compute: args.compute.quant().into(),
    }
}

fn tell(progress: &mut Progress, done: usize, opened: &Opened) {
    progress.update(done as u64, &opened.name);
}

/// A score, or an error that names the model and the file.
fn scored<T>(found: ::eval::Result<T>, file: &Path, opened: &Opened) -> anyhow::Result<T> {
    finite(found, &format_args!("{}: {}", opened.name, file.display()))
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::Parser;

    #[derive(Debug, Parser)]
    struct TestCli {
        #[command(flatten)]
        args: Args,
    }

    #[test]
    fn an_adapter_is_compared_with_its_base_unless_told_otherwise() {
        let check = |line: &str, expected: &[(&str, Option<&str>)]| {
            let line = format!("eval m --data d {line}");
            let args = TestCli::parse_from(line.split_whitespace()).args;
            let expected: Vec<_> = expected
                .iter()
                .map(|(model, adapter)| (*model, adapter.map(Path::new)))
                .collect();
            assert_eq!(models(&args), expected, "{line}");
        };
        check("", &[("m", None)]);
        check("--adapter a", &[("m", None), ("m", Some("a"))]);
        check("--adapter a --baseline none", &[("m", Some("a"))]);
        check("--adapter a --baseline b", &[("b", None), ("m", Some("a"))]);
        check("--baseline b", &[("b", None), ("m", None)]);
    }
}
