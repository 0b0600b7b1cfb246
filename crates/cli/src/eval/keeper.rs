//! What is kept of an evaluation: answers as they come, and at the end the evidence.

use std::fs::File;
use std::path::{Path, PathBuf};

use ::eval::AnswerStore;
use anyhow::Context;
use checkpoint::Adapter;
use data::SplitName;
use serde_json::{Map, Value, json};

use super::Args;
use super::answer_log::{AnswerLog, lock_file};
use super::conversation_args::ConversationArgs;
use super::evidence::{Evidence, ModelEvidence, TaskEvidence};
use super::hashed_files::{FileHasher, model_files};
use super::tasks::{LoadedTask, LoadedTasks};
use crate::console::Console;
use crate::device::record;
use crate::open::Opened;
use crate::report::machine;
use crate::rows::SplitRows;

/// The folder of answers in `--out`.
const ANSWERS_FOLDER: &str = "answers";

/// Keeps what an evaluation finds, if it has a folder for it.
pub(super) struct Keeper<'a> {
    console: &'a Console,
    kept: Option<Kept<'a>>,
}

struct Kept<'a> {
    hasher: FileHasher<'a>,
    evidence: Evidence,
    /// The folder of answers.
    answers: PathBuf,
    /// Requests in a pass.
    batch: u64,
    /// Files of results.
    written: Vec<PathBuf>,
    /// Held as long as the evaluation writes to its folder.
    _lock: Option<File>,
}

impl<'a> Keeper<'a> {
    /// Hashes tasks and rows, if anything is kept.
    pub(super) fn new(
        args: &Args,
        tasks: &LoadedTasks,
        console: &'a Console,
    ) -> anyhow::Result<Self> {
        let in_out = args.out.as_ref().map(|out| out.join(ANSWERS_FOLDER));
        let Some(answers) = args.answers.clone().or(in_out) else {
            let kept = None;
            return Ok(Self { console, kept });
        };
        let mut hasher = FileHasher::new(console);
        let mut evidence = Evidence::new(settings(args))?;
        for task in &tasks.tasks {
            let (name, files, data) = task.files()?;
            evidence.tasks.push(TaskEvidence {
                task: name,
                files: hasher.hash(&files)?,
                data: hasher.hash(&data)?,
            });
        }
        if let Some(path) = &args.data {
            let rows = SplitRows {
                path,
                split: SplitName::Test,
                columns: &args.columns.columns,
                console,
            };
            evidence.data = hasher.hash(&rows.files()?)?;
        }
        let kept = Some(Kept {
            hasher,
            evidence,
            answers,
            batch: args.batch,
            written: Vec::new(),
            _lock: args.out.as_deref().map(lock).transpose()?,
        });
        Ok(Self { console, kept })
    }

    /// Where a model's answers are kept.
    pub(super) fn store(
        &mut self,
        opened: &Opened,
        adapter: Option<&Path>,
    ) -> anyhow::Result<Box<dyn AnswerStore>> {
        let Some(kept) = &mut self.kept else {
            return Ok(Box::new(()));
        };
        let result = adapter.unwrap_or(opened.folder.path());
        let recipe = result.parent().map(|run| run.join("recipe.toml"));
        let recipe: Vec<PathBuf> = recipe.into_iter().filter(|path| path.is_file()).collect();
        let adapter = adapter.map(Adapter::files).unwrap_or_default();
        let model = ModelEvidence {
            name: opened.name.clone(),
            files: kept.hasher.hash(&model_files(&opened.folder)?)?,
            adapter_files: kept.hasher.hash(&adapter)?,
            recipe: kept.hasher.hash(&recipe)?,
        };
        // Kernels round as their processor's instructions do; on a GPU, written texts depend on how many are written together.
        let device = record(&opened.device, None);
        let batch = kernels::device::is_gpu(&opened.device).then_some(kept.batch);
        let computer = json!([machine(), device, batch]);
        let identity = kept.evidence.identity(&model, &computer);
        let log = AnswerLog::open(&kept.answers, &identity)?;
        kept.evidence.models.push(model);
        if log.n_known() > 0 {
            let (name, n) = (&opened.name, log.n_known());
            self.console.detail(format_args!(
                "{name}: {n} pieces of work are done and kept in `{}`",
                kept.answers.display()
            ));
        }
        Ok(Box::new(log))
    }

    /// Notes files of results.
    pub(super) fn written(&mut self, paths: Vec<PathBuf>) {
        if let Some(kept) = &mut self.kept {
            kept.written.extend(paths);
        }
    }

    /// Writes the evidence of a report, after all files of results.
    pub(super) fn finish(self, out: &Path, report: &Value) -> anyhow::Result<()> {
        match self.kept {
            None => Ok(()),
            Some(mut kept) => {
                let (hasher, written) = (&mut kept.hasher, &kept.written);
                kept.evidence.write(out, report, written, hasher)
            }
        }
    }
}

/// Takes a folder for one evaluation alone.
fn lock(out: &Path) -> anyhow::Result<File> {
    std::fs::create_dir_all(out).with_context(|| format!("cannot make `{}`", out.display()))?;
    lock_file(&out.join(".lock"), "give another folder as --out")
}

/// The settings that numbers depend on, with their defaults.
pub(super) fn settings(args: &Args) -> Map<String, Value> {
    let ConversationArgs {
        chat_template,
        fewshot_as_multiturn,
        system,
        think,
        no_think,
    } = &args.chat;
    let settings = json!({
        "compute": args.compute.name(),
        "device": args.device.name().unwrap_or_else(|| "cpu".into()),
        "batch": args.batch,
        "num_fewshot": args.num_fewshot,
        "max_length": args.max_length,
        "max_samples": args.max_samples,
        "columns": args.columns.columns.to_string(),
        "chat_template": chat_template,
        "fewshot_as_multiturn": fewshot_as_multiturn,
        "system": system,
        "think": think,
        "no_think": no_think,
    });
    match settings {
        Value::Object(settings) => settings,
        _ => Map::new(),
    }
}

impl LoadedTask {
    /// The name of a task, its files and those of its rows.
    fn files(&self) -> anyhow::Result<(String, Vec<PathBuf>, Vec<PathBuf>)> {
        Ok(match self {
            Self::Rows(file) => (
                super::tasks::rows_name(file),
                Vec::new(),
                vec![file.clone()],
            ),
            Self::Harness(task) => {
                let definition = &task.definition;
                let data = definition.data_files(&task.dataset, task.fewshot)?;
                (definition.name.clone(), definition.files.clone(), data)
            }
        })
    }
}
