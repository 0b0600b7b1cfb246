//! `eval`: scores of a model, and the difference to its baseline.

mod answer_log;
pub(crate) mod compare;
mod contestants;
pub(crate) mod conversation_args;
mod evidence;
pub(crate) mod experts;
mod harness_files;
mod hashed_files;
mod keeper;
pub(crate) mod logits;
mod score_page;
pub(crate) mod survival;
pub(crate) mod tasks;

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::process::ExitCode;

use ::eval::{
    AnswerStore, EvalConfig, EvalReport, ExpertChoices, Gate, GateOutcome, GateVerdict,
    GroupResult, ModelScores, TextScore,
};
use anyhow::Context;
use data::{SplitName, TaskItem};

use self::contestants::{Contestant, NamedAdapter, contestants};
use self::conversation_args::ConversationArgs;
pub(crate) use self::evidence::read_report;
use self::evidence::{EVIDENCE_NAME, REPORT_NAME};
use self::keeper::Keeper;
use self::score_page::html_page;
use self::tasks::{AskedModel, LoadedTasks, ROUTED_SAMPLES, ROUTED_TOKENS, TaskOptions, scored};
use crate::console::{Console, NOT_KEPT, misuse};
use crate::device::DeviceArgs;
use crate::open::{Opened, expect_computed, open_model};
use crate::plan::budget::BudgetArgs;
use crate::plan::conversion::expect_room_for_losses;
use crate::rows::{ColumnArgs, SplitRows};
use crate::values::{COMPUTE_HELP, ComputeValue};

/// Options that say how to evaluate, of which a check does nothing.
const NOT_CHECKED: [&str; 20] = [
    "models",
    "adapter",
    "device",
    "data",
    "tasks",
    "include_path",
    "num_fewshot",
    "chat_template",
    "system",
    "columns",
    "baseline",
    "gate",
    "allow_inconclusive",
    "batch",
    "max_length",
    "max_samples",
    "compute",
    "out",
    "answers",
    "memory_budget",
];

/// The file of the report as it is printed.
const TEXT_NAME: &str = "report.txt";
/// The same as a page for a browser.
const HTML_NAME: &str = "report.html";

/// Evaluate a model: loss, perplexity, bits per byte, multiple choice.
///
/// Several models are scored on the same items and compared: differences with their 95 % intervals, judged together. To measure how
/// much the predictions of two models differ, use `compare`.
#[derive(Debug, clap::Args)]
pub(crate) struct Args {
    /// Models: Hugging Face folders, GGUF files, or `org/name` in the local Hugging Face cache.
    #[arg(required_unless_present = "check", value_name = "MODEL")]
    pub(crate) models: Vec<String>,
    /// LoRA adapter of the first model: PEFT folder, maybe with a name for the two. May be repeated; each is evaluated by itself.
    #[arg(long, value_name = "[NAME=]DIR", value_parser = |text: &str| Ok::<_, String>(NamedAdapter::from(text)))]
    pub(crate) adapter: Vec<NamedAdapter>,
    #[command(flatten)]
    pub(crate) device: DeviceArgs,
    /// Folder with a test split (`test.jsonl`, `.csv`, `.parquet`, …), or a file of rows, for loss, perplexity and bits
    /// per byte.
    #[arg(long, value_name = "DIR", required_unless_present_any = ["tasks", "check"])]
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
    pub(crate) chat: ConversationArgs,
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
    /// Output folder for `report.json`, `report.txt` and `report.html`, for the results and samples of tasks in lm-evaluation-harness's
    /// layout, in a folder for each model, and for `evidence.json`: the hashes of all files that went in and came out. Default: no
    /// files are written.
    #[arg(long, value_name = "DIR")]
    pub(crate) out: Option<PathBuf>,
    /// Folder where answers are kept as they come: what an evaluation, maybe one that was killed, has asked the same model is not
    /// asked again. Default: `answers` in --out.
    #[arg(long, value_name = "DIR")]
    pub(crate) answers: Option<PathBuf>,
    /// Check an `evidence.json`, and evaluate nothing: that all files have the hashes that it states, and that its numbers are those
    /// of the single items in the report. If not, the exit code is 4.
    #[arg(long, value_name = "EVIDENCE", conflicts_with_all = NOT_CHECKED)]
    pub(crate) check: Option<PathBuf>,
    /// Print JSON instead of a table.
    #[arg(long)]
    pub(crate) json: bool,
    #[command(flatten)]
    pub(crate) budget: BudgetArgs,
}

pub(crate) fn run(args: &Args, console: &Console) -> anyhow::Result<ExitCode> {
    if let Some(path) = &args.check {
        return evidence::check(path, args.json, console);
    }
    for name in [REPORT_NAME, TEXT_NAME, HTML_NAME, EVIDENCE_NAME] {
        args.out
            .iter()
            .try_for_each(|out| checkpoint::expect_absent(&out.join(name)))?;
    }
    let contestants = contestants(args);
    let tasks = tasks::load(&args.tasks, &args.task_options(), console)?;
    if !tasks.has_harness_tasks() {
        let chat = &args.chat;
        let unused = [
            ("--num-fewshot", args.num_fewshot.is_some()),
            ("--chat-template", chat.chat_template),
            ("--system", chat.system.is_some()),
        ];
        if let Some((option, _)) = unused.iter().find(|(_, is_given)| *is_given) {
            return Err(misuse(format!(
                "{option}: expected a task of lm-evaluation-harness among --tasks, found none"
            )));
        }
    }
    let mut measures = tasks.measures();
    if args.data.is_some() {
        measures.push(["data", "loss", "none"].map(str::to_owned));
    }
    expect_gates(&args.gate, &measures, contestants.len() > 1)
        .map_err(|problem| misuse(format!("--gate {problem}")))?;
    let device = args.device.open()?;
    expect_computed(args.compute, &device)?;
    let mut keeper = Keeper::new(args, &tasks, console)?;
    let is_compared = contestants.len() > 1;
    let mut scores = Vec::new();
    for contestant in contestants {
        let Contestant { model, adapter, .. } = contestant;
        let mut opened = open_model(model, adapter, &device, console)?;
        opened.name = contestant.name.map_or(opened.name, str::to_owned);
        opened.name = harness_files::name_of_its_own(&opened.name, &scores);
        let mut store = keeper.store(&opened, adapter)?;
        let mut scored = score(&opened, &tasks, args, &mut *store, console)?;
        if is_compared {
            scored.scores.experts = experts(&opened, scored.first_tokens, args);
        }
        if let Some(out) = &args.out {
            let folder = out.join(harness_files::plain(&opened.name));
            let asked = tasks.asked(&scored.conversations, &scored.scores.tasks);
            let groups = &scored.scores.groups;
            keeper.written(harness_files::write(&folder, &asked, groups)?);
        }
        scores.push(scored.scores);
        console.memory();
    }
    let report = EvalReport::new(scores, &args.gate)?;
    if let Some(out) = &args.out {
        keeper.written(write_report(out, &report, args)?);
        keeper.finish(out, &report.to_json())?;
    }
    print(&report, args, console);
    Ok(exit_code(&report, args))
}

fn print(report: &EvalReport, args: &Args, console: &Console) {
    match args.json {
        true => console.result(format_args!("{:#}", report.to_json())),
        false => console.result(report.to_text().trim_end()),
    }
}

fn exit_code(report: &EvalReport, args: &Args) -> ExitCode {
    let is_kept = |outcome: &GateOutcome| match outcome.verdict {
        GateVerdict::Passed => true,
        GateVerdict::Failed => false,
        GateVerdict::Inconclusive => args.allow_inconclusive,
    };
    match report.gates.iter().all(is_kept) {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(NOT_KEPT),
    }
}

/// Writes the report. Returns the paths of its files.
fn write_report(out: &Path, report: &EvalReport, args: &Args) -> anyhow::Result<Vec<PathBuf>> {
    std::fs::create_dir_all(out).with_context(|| format!("cannot make `{}`", out.display()))?;
    let settings = keeper::settings(args).into_iter();
    let shown: Vec<(String, String)> = settings
        .filter(|(_, value)| !value.is_null())
        .map(|(name, value)| (name, value.to_string().trim_matches('"').to_owned()))
        .collect();
    let texts = [
        (REPORT_NAME, format!("{:#}\n", report.to_json())),
        (TEXT_NAME, report.to_text()),
        (HTML_NAME, html_page(report, &shown)),
    ];
    for (name, text) in &texts {
        checkpoint::write_file(&out.join(name), text.as_bytes())?;
    }
    Ok(texts.map(|(name, _)| out.join(name)).to_vec())
}

/// Refuses gates about what is not evaluated, before any model is opened. `measures` are names of tasks, metrics and filters.
pub(crate) fn expect_gates(
    gates: &[Gate],
    measures: &[[String; 3]],
    has_baseline: bool,
) -> anyhow::Result<()> {
    for gate in gates {
        let of_task = measures.iter().filter(|[task, ..]| *task == gate.task);
        let of_task: Vec<&[String; 3]> = of_task.collect();
        let is_meant = |[_, metric, filter]: &&&[String; 3]| {
            let wanted = gate.filter.as_ref();
            *metric == gate.metric && wanted.is_none_or(|wanted| wanted == filter)
        };
        let meant = of_task.iter().filter(is_meant).count();
        let names = |all: &[&[String; 3]], name: fn(&[String; 3]) -> String| {
            let names: BTreeSet<String> = all.iter().map(|of| name(of)).collect();
            names.into_iter().collect::<Vec<_>>().join(", ")
        };
        let known = |all| names(all, |[_, metric, filter]| format!("{metric},{filter}"));
        let found = match meant {
            _ if of_task.is_empty() => {
                let all: Vec<&[String; 3]> = measures.iter().collect();
                let tasks = names(&all, |[task, ..]| task.clone());
                format!("the task `{}`; there are {tasks}", gate.task)
            }
            0 => format!(
                "the metric `{}`; there are {}",
                gate.metric,
                known(&of_task)
            ),
            1 if gate.needs_baseline() && !has_baseline => {
                "no baseline; give one with --baseline".into()
            }
            1 => continue,
            _ => format!("several; give one of {}", known(&of_task)),
        };
        let expected = "expected a gate about what is evaluated";
        anyhow::bail!("`{}`: {expected}, found {found}", gate.text);
    }
    Ok(())
}

/// What is found of a model.
struct ScoredModel {
    scores: ModelScores,
    /// For each task the questions as it was asked them, if not as all are.
    conversations: Vec<Option<Vec<TaskItem>>>,
    /// Of the first samples, or the first questions of a task.
    first_tokens: Vec<Vec<u32>>,
}

fn score(
    opened: &Opened,
    tasks: &LoadedTasks,
    args: &Args,
    store: &mut dyn AnswerStore,
    console: &Console,
) -> anyhow::Result<ScoredModel> {
    let (text, mut first_tokens) = match &args.data {
        Some(data) => {
            let (text, first) = text_score(opened, data, args, store, console)?;
            (Some(text), first)
        }
        None => (None, Vec::new()),
    };
    let (mut results, mut conversations) = (Vec::new(), Vec::new());
    if !tasks.tasks.is_empty() {
        let asked = AskedModel::of(opened)?;
        for task in &tasks.tasks {
            let judged = task.result(&asked, &args.task_options(), store, console)?;
            results.push(judged.result);
            conversations.push(judged.conversations);
            if first_tokens.is_empty() {
                first_tokens = task.first_tokens(&asked, &args.task_options())?;
            }
        }
    }
    let groups = tasks.groups.iter();
    let scores = ModelScores {
        name: opened.name.clone(),
        text,
        groups: groups
            .map(|group| GroupResult::new(group, &results))
            .collect(),
        tasks: results,
        experts: ExpertChoices::default(),
    };
    Ok(ScoredModel {
        scores,
        conversations,
        first_tokens,
    })
}

/// The experts that a model chooses for the beginnings of some sequences.
fn experts(opened: &Opened, mut sequences: Vec<Vec<u32>>, args: &Args) -> ExpertChoices {
    let model = &opened.model;
    let most = model.config.max_position_embeddings.min(ROUTED_TOKENS);
    sequences.iter_mut().for_each(|ids| ids.truncate(most));
    sequences.retain(|ids| !ids.is_empty());
    match model.config.moe {
        Some(_) => ExpertChoices::new(model, args.compute.quant().into(), sequences),
        None => ExpertChoices::default(),
    }
}

/// The score on text, and the tokens of its first samples.
fn text_score(
    opened: &Opened,
    file: &Path,
    args: &Args,
    store: &mut dyn AnswerStore,
    console: &Console,
) -> anyhow::Result<(TextScore, Vec<Vec<u32>>)> {
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
    let batch = tasks::batch_of(split.samples.iter(), args.batch);
    expect_room_for_losses(&opened.model.config, batch, args.budget)?;
    let mut progress = console.progress(split.samples.len() as u64, "samples");
    let tell = &mut |done, _| progress.update(done as u64, &opened.name);
    let config = EvalConfig {
        batch_size: args.batch as usize,
        compute: args.compute.quant().into(),
    };
    let found = ::eval::perplexity(&opened.model, &split.samples, &config, store, tell);
    progress.finish();
    let first = split.samples.into_iter().take(ROUTED_SAMPLES);
    let first = first.map(|sample| sample.ids).collect();
    Ok((scored(found, file, &opened.name)?, first))
}

impl Args {
    fn task_options(&self) -> TaskOptions<'_> {
        TaskOptions {
            include_path: &self.include_path,
            cure: match self.include_path.is_empty() {
                true => "give the folder that has it with --include-path",
                false => "it is none of those in the folders of --include-path",
            },
            num_fewshot: self.num_fewshot,
            max_samples: self.max_samples,
            max_length: self.max_length,
            batch: self.batch,
            compute: self.compute.quant().into(),
            columns: &self.columns.columns,
            chat: &self.chat,
            budget: self.budget,
        }
    }
}
