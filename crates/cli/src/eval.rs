//! `eval`: scores of a model, and the difference to its baseline.

pub(crate) mod compare;
mod contestants;
pub(crate) mod experts;
mod harness_files;
pub(crate) mod logits;
pub(crate) mod survival;
mod tasks;

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ::eval::{
    EvalConfig, EvalReport, Gate, GateOutcome, GateVerdict, GroupResult, ModelScores, TextScore,
};
use anyhow::Context;
use data::{Sample, SplitName};

use self::contestants::{Contestant, NamedAdapter, contestants};
use self::tasks::LoadedTasks;
use crate::console::{Console, NOT_KEPT, Progress, finite, misuse};
use crate::device::DeviceArgs;
use crate::open::{Opened, expect_computed, open_model};
use crate::plan::budget::BudgetArgs;
use crate::plan::conversion::expect_room_for_losses;
use crate::rows::{ColumnArgs, SplitRows};
use crate::values::{COMPUTE_HELP, ComputeValue};

/// Evaluate a model: loss, perplexity, bits per byte, multiple choice.
///
/// Several models are scored on the same items and compared: differences with their 95 % intervals, judged together. To measure how
/// much the predictions of two models differ, use `compare`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Models: Hugging Face folders, GGUF files, or `org/name` in the local Hugging Face cache.
    #[arg(required = true, value_name = "MODEL")]
    pub(crate) models: Vec<String>,
    /// LoRA adapter of the first model: PEFT folder, maybe with a name for the two. May be repeated; each is evaluated by itself.
    #[arg(long, value_name = "[NAME=]DIR", value_parser = |text: &str| Ok::<_, String>(NamedAdapter::from(text)))]
    pub(crate) adapter: Vec<NamedAdapter>,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
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
    /// Model that comes first, and that gates are about, or `none`. Default: the first model without its adapters if --adapter is
    /// given, else the first of several.
    #[arg(long, value_name = "MODEL|none")]
    pub(crate) baseline: Option<String>,
    /// Bound that each model but the baseline must keep, such as `my_task acc >= base + 0.10`, `wikitext word_perplexity <= base *
    /// 1.02` or `data loss <= 2.5`. May be repeated. If one is not kept, or if it is not sure, the exit code is 3.
    #[arg(long, value_name = "GATE", value_parser = |text: &str| Gate::parse(text).map_err(|problem| problem.to_string()))]
    pub(crate) gate: Vec<Gate>,
    /// Exit with 0 although it is not sure that a gate is kept.
    #[arg(long)]
    pub(crate) allow_inconclusive: bool,
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
    let contestants = contestants(args);
    let tasks = tasks::load(args, console)?;
    expect_gates(args, &tasks, contestants.len())?;
    let mut scores = Vec::new();
    let device = args.device.open()?;
    expect_computed(args.compute, &device)?;
    for Contestant {
        model,
        adapter,
        name,
    } in contestants
    {
        let mut opened = open_model(model, adapter, &device, console)?;
        opened.name = name.map_or(opened.name, str::to_owned);
        scores.push(score(&opened, &tasks, args, console)?);
        console.memory();
    }
    if let Some(out) = &args.out {
        harness_files::write(out, &tasks.tasks, &scores)?;
    }
    let report = EvalReport::new(scores, &args.gate)?;

    let (text, json) = (report.to_text(), format!("{:#}", report.to_json()));
    if let Some(out) = &args.out {
        std::fs::create_dir_all(out).with_context(|| format!("cannot make `{}`", out.display()))?;
        checkpoint::write_file(&out.join("report.json"), format!("{json}\n").as_bytes())?;
        checkpoint::write_file(&out.join("report.txt"), text.as_bytes())?;
    }
    console.result(if args.json { &json } else { text.trim_end() });
    let is_kept = |outcome: &GateOutcome| match outcome.verdict {
        GateVerdict::Passed => true,
        GateVerdict::Failed => false,
        GateVerdict::Inconclusive => args.allow_inconclusive,
    };
    Ok(match report.gates.iter().all(is_kept) {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(NOT_KEPT),
    })
}

/// Refuses gates about what is not evaluated, before any model is opened.
fn expect_gates(args: &Args, tasks: &LoadedTasks, n_models: usize) -> anyhow::Result<()> {
    let mut known = tasks.metrics();
    if args.data.is_some() {
        known.push(("data".into(), vec!["loss"]));
    }
    for gate in &args.gate {
        let task = known.iter().find(|(task, _)| *task == gate.task);
        let found = match task {
            None => {
                let names: Vec<&str> = known.iter().map(|(task, _)| task.as_str()).collect();
                format!("the task `{}`; there are {}", gate.task, names.join(", "))
            }
            Some((_, metrics)) if !metrics.contains(&gate.metric.as_str()) => {
                format!(
                    "the metric `{}`; there are {}",
                    gate.metric,
                    metrics.join(", ")
                )
            }
            Some(_) if gate.needs_baseline() && n_models < 2 => {
                "no baseline; give one with --baseline".into()
            }
            Some(_) => continue,
        };
        let expected = "expected a gate about what is evaluated";
        return Err(misuse(format!(
            "--gate `{}`: {expected}, found {found}",
            gate.text
        )));
    }
    Ok(())
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
