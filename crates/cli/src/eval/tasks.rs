//! Tasks that models are asked: those of the evaluation harness, and rows of questions.

use std::path::{Path, PathBuf};

use ::eval::{AnswerConfig, TaskRequests, TaskResult};
use anyhow::{Context, bail};
use data::{
    ItemLimits, Sample, TaskDataset, TaskDefinition, TaskGroup, TaskIndex, TaskItem, TaskItems,
    TaskSet,
};
use infer::Engine;

use super::{Args, config, scored};
use crate::console::Console;
use crate::open::{Opened, hub_cache};
use crate::plan::conversion::expect_room_for_losses;

/// Tokens of the requests that share a pass, for each sequence of a batch, at least.
const REQUEST_TOKENS: usize = 512;

/// The maximum length of a sample or question in rows.
pub(super) const ROW_LENGTH: usize = 1024;

/// A task, read before any model is.
#[derive(Debug)]
pub(super) enum LoadedTask {
    Harness(Box<HarnessTask>),
    /// A file of questions, which needs a tokenizer to be read.
    Rows(PathBuf),
}

/// A task of the harness, and its questions.
#[derive(Debug)]
pub(super) struct HarnessTask {
    pub(super) definition: TaskDefinition,
    pub(super) items: Vec<TaskItem>,
    fewshot: usize,
    /// Rows of the split.
    n_rows: usize,
}

/// Tasks, and the groups that some of them are in.
#[derive(Debug, Default)]
pub(super) struct LoadedTasks {
    pub(super) tasks: Vec<LoadedTask>,
    pub(super) groups: Vec<TaskGroup>,
}

impl LoadedTasks {
    /// The names of tasks, and of their metrics.
    pub(super) fn metrics(&self) -> Vec<(String, Vec<&'static str>)> {
        let of_task = |task: &LoadedTask| match task {
            LoadedTask::Harness(task) => {
                let metrics = task.definition.metrics.iter().map(|of| of.metric.name());
                (task.definition.name.clone(), metrics.collect())
            }
            LoadedTask::Rows(file) => (rows_name(file), ::eval::row_metrics().collect()),
        };
        self.tasks.iter().map(of_task).collect()
    }
}

/// The name of the task of a file of rows.
fn rows_name(file: &Path) -> String {
    let name = file.file_stem().unwrap_or(file.as_os_str());
    name.to_string_lossy().into_owned()
}

/// Reads all tasks, in their order: files of rows before others.
pub(super) fn load(args: &Args, console: &Console) -> anyhow::Result<LoadedTasks> {
    let index = args.include_path.iter();
    let index = index
        .map(|folder| TaskIndex::open(folder))
        .collect::<data::Result<Vec<_>>>()?;
    let (mut rows, mut set) = (Vec::new(), TaskSet::default());
    for name in &args.tasks {
        let path = Path::new(name);
        if path.is_file() && !is_yaml(path) {
            rows.push(LoadedTask::Rows(path.to_owned()));
        } else {
            set.extend(tasks_of(name, &index)?)?;
        }
    }
    let harness = set.tasks.into_iter().map(|definition| {
        let task = HarnessTask::load(definition, args, console)?;
        Ok(LoadedTask::Harness(Box::new(task)))
    });
    let harness = harness.collect::<anyhow::Result<Vec<_>>>()?;
    Ok(LoadedTasks {
        tasks: rows.into_iter().chain(harness).collect(),
        groups: set.groups,
    })
}

fn is_yaml(path: &Path) -> bool {
    let extension = path.extension();
    extension.is_some_and(|extension| extension == "yaml" || extension == "yml")
}

/// The tasks of a file, of a folder, or of a name in other folders.
fn tasks_of(name: &str, index: &[TaskIndex]) -> anyhow::Result<TaskSet> {
    let path = Path::new(name);
    if path.is_file() {
        // A group's tasks are in the folder of its file.
        if let Some(group) = TaskIndex::group_name(path)? {
            let folder = path
                .parent()
                .filter(|folder| !folder.as_os_str().is_empty());
            let folder = TaskIndex::open(folder.unwrap_or(Path::new(".")))?;
            let set = folder.set(&group)?;
            return set.with_context(|| {
                format!("`{name}`: expected a group with tasks, found none in it")
            });
        }
        let mut set = TaskSet::default();
        set.add(TaskDefinition::open(path)?, false)?;
        return Ok(set);
    }
    if path.is_dir() {
        let set = TaskIndex::open(path)?.set("*")?;
        return set
            .with_context(|| format!("`{name}`: expected a folder with tasks, found none in it"));
    }
    for index in index {
        if let Some(set) = index.set(name)? {
            return Ok(set);
        }
    }
    let cure = match index.is_empty() {
        true => "give the folder that has it with --include-path",
        false => "it is none of those in the folders of --include-path",
    };
    bail!(
        "`{name}`: expected a task's file, a folder of tasks, a file of rows or the name of a task, found none; {cure}"
    )
}

impl HarnessTask {
    fn load(definition: TaskDefinition, args: &Args, console: &Console) -> anyhow::Result<Self> {
        ::eval::expect_measured(&definition)
            .with_context(|| definition.file.display().to_string())?;
        let hub = hub_cache();
        let dataset = TaskDataset::find(&definition.dataset, &definition.file, hub.as_deref())?;
        let limits = ItemLimits {
            fewshot: args.num_fewshot,
            rows: args.max_samples,
        };
        let fewshot = definition.fewshot_count(limits.fewshot);
        if args.num_fewshot.is_some_and(|wanted| wanted != fewshot) {
            let name = &definition.name;
            console.note(format_args!(
                "{name}: has no examples, whatever --num-fewshot says"
            ));
        }
        let TaskItems { items, n_rows } = definition.items(&dataset, limits)?;
        Ok(Self {
            definition,
            items,
            fewshot,
            n_rows,
        })
    }

    fn result(
        &self,
        opened: &Opened,
        args: &Args,
        console: &Console,
    ) -> anyhow::Result<TaskResult> {
        let (task, items) = (&self.definition, self.items.as_slice());
        let tokenizer = opened.expect_tokenizer()?;
        let limit = opened.model.config.max_position_embeddings;
        let ends = infer::end_of_text(&opened.folder, Some(tokenizer))?;
        let answer_config = |pass_tokens| AnswerConfig {
            max_length: args.max_length.unwrap_or(limit).min(limit),
            pass_tokens,
            batch: args.batch as usize,
            end_ids: ends.ids.clone(),
            seed: 0,
        };
        let file = &*task.file;
        let mut requests = scored(
            TaskRequests::new(tokenizer, task, items, answer_config(0)),
            file,
            opened,
        )?;
        let longest = requests.longest().max(REQUEST_TOKENS);
        expect_room_for_losses(&opened.model.config, (args.batch, longest), args.budget)?;
        requests.set_pass_tokens(longest * args.batch as usize);
        let mut progress = console.progress(requests.count() as u64, "requests");
        let status = format!("{}: {}", opened.name, task.name);
        let tell = &mut |done, _| progress.update(done as u64, &status);
        let compute = config(args).compute;
        let mut engine = Engine::new(opened.model.clone(), compute, opened.device.clone());
        let answers = requests.answer(&mut engine, tokenizer, tell);
        progress.finish();
        let answers = scored(answers, file, opened)?;
        if answers.n_cut > 0 {
            let (name, n_cut) = (&task.name, answers.n_cut);
            console.note(format_args!(
                "{name}: {n_cut} requests are cut at their beginning to fit the model"
            ));
        }
        scored(
            TaskResult::new(task, items, (self.fewshot, self.n_rows), answers),
            file,
            opened,
        )
    }
}

impl LoadedTask {
    /// The model's result.
    pub(super) fn result(
        &self,
        opened: &Opened,
        args: &Args,
        console: &Console,
    ) -> anyhow::Result<TaskResult> {
        match self {
            Self::Harness(task) => task.result(opened, args, console),
            Self::Rows(file) => rows_result(opened, file, args, console),
        }
    }
}

/// The result of a file of questions.
fn rows_result(
    opened: &Opened,
    file: &Path,
    args: &Args,
    console: &Console,
) -> anyhow::Result<TaskResult> {
    let limit = opened.model.config.max_position_embeddings;
    let max_length = args.max_length.unwrap_or(ROW_LENGTH).min(limit);
    let tokenizer = opened.expect_tokenizer()?;
    let mut questions = data::choices(file, tokenizer, &args.columns.columns, max_length)?;
    questions.truncate(args.max_samples.unwrap_or(usize::MAX));
    let samples: Vec<&Sample> = questions
        .iter()
        .flat_map(|question| &question.samples)
        .collect();
    let truncated = samples.iter().filter(|sample| sample.truncated).count();
    if truncated > 0 {
        console.note(format_args!(
            "{}: {truncated} prompts are truncated at their start to fit {max_length} tokens",
            file.display()
        ));
    }
    super::expect_room(opened, samples.iter().copied(), args)?;
    let task = rows_name(file);
    let mut progress = console.progress(samples.len() as u64, "choices");
    let tell = &mut |done, _| super::tell(&mut progress, done, opened);
    let found = ::eval::multiple_choice(&opened.model, &task, &questions, &config(args), tell);
    progress.finish();
    scored(found, file, opened)
}
