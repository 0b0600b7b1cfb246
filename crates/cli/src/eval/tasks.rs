//! Tasks that models are asked: those of the evaluation harness, and rows of questions.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};
use std::sync::Arc;

use ::eval::{AnswerConfig, AnswerStore, EvalConfig, TaskRequests, TaskResult};
use anyhow::{Context, bail};
use burn::tensor::Device;
use data::{
    Aggregation, Bos, Columns, ItemLimits, OutputType, Sample, TaskChat, TaskDataset,
    TaskDefinition, TaskGroup, TaskIndex, TaskItem, TaskItems, TaskRequest, TaskSet, Tokenizer,
};
use infer::Engine;
use model::{Compute, Model};

use super::conversation_args::ConversationArgs;
use crate::console::{Console, finite};
use crate::open::{Opened, hub_cache};
use crate::plan::budget::BudgetArgs;
use crate::plan::conversion::expect_room_for_losses;

/// Tokens of the requests that share a pass, for each sequence of a batch, at least.
const REQUEST_TOKENS: usize = 512;

/// Samples, and tokens of each, for which the experts that models choose are compared.
pub(super) const ROUTED_SAMPLES: usize = 32;
pub(super) const ROUTED_TOKENS: usize = 256;

/// The maximum length of a sample or question in rows.
pub(super) const ROW_LENGTH: usize = 1024;

/// How tasks are read and asked.
#[derive(Debug)]
pub(crate) struct TaskOptions<'a> {
    /// Folders with tasks that may be named.
    pub(crate) include_path: &'a [PathBuf],
    /// What to do if a name is in none of them.
    pub(crate) cure: &'static str,
    pub(crate) num_fewshot: Option<usize>,
    pub(crate) max_samples: Option<usize>,
    pub(crate) max_length: Option<usize>,
    /// Requests in a pass.
    pub(crate) batch: u64,
    pub(crate) compute: Compute,
    /// Columns of rows of questions.
    pub(crate) columns: &'a Columns,
    pub(crate) chat: &'a ConversationArgs,
    pub(crate) budget: BudgetArgs,
}

/// A model that tasks are asked.
#[derive(Debug)]
pub(crate) struct AskedModel {
    pub(crate) name: String,
    pub(crate) model: Model,
    pub(crate) tokenizer: Arc<Tokenizer>,
    /// Tokens that end a text.
    pub(crate) end_ids: Vec<u32>,
    pub(crate) device: Device,
}

impl AskedModel {
    pub(super) fn of(opened: &Opened) -> anyhow::Result<Self> {
        let tokenizer = opened.expect_tokenizer()?;
        Ok(Self {
            name: opened.name.clone(),
            model: opened.model.clone(),
            tokenizer: Arc::clone(tokenizer),
            end_ids: infer::end_of_text(&opened.folder, Some(tokenizer))?.ids,
            device: opened.device.clone(),
        })
    }

    fn limit(&self) -> usize {
        self.model.config.max_position_embeddings
    }
}

/// A task, read before any model is.
#[derive(Debug)]
pub(crate) enum LoadedTask {
    Harness(Box<HarnessTask>),
    /// A file of questions, which needs a tokenizer to be read.
    Rows(PathBuf),
}

/// A task of the harness, and its questions.
#[derive(Debug)]
pub(crate) struct HarnessTask {
    pub(super) definition: TaskDefinition,
    pub(super) dataset: TaskDataset,
    pub(super) items: Vec<TaskItem>,
    /// Examples before each question.
    pub(super) fewshot: usize,
    /// Rows of the split.
    n_rows: usize,
}

/// A model's result of a task.
#[derive(Debug)]
pub(crate) struct Judged {
    pub(crate) result: TaskResult,
    /// The questions as this model was asked them, if not as all are.
    pub(super) conversations: Option<Vec<TaskItem>>,
}

/// A task, the questions that a model was asked, and its result.
#[derive(Clone, Copy, Debug)]
pub(super) struct AskedTask<'a> {
    pub(super) task: &'a HarnessTask,
    pub(super) items: &'a [TaskItem],
    pub(super) result: &'a TaskResult,
}

/// Tasks, and the groups that some of them are in.
#[derive(Debug, Default)]
pub(crate) struct LoadedTasks {
    pub(crate) tasks: Vec<LoadedTask>,
    pub(crate) groups: Vec<TaskGroup>,
}

impl LoadedTasks {
    /// The tasks of the harness, with the questions that a model was asked and its results.
    pub(super) fn asked<'a>(
        &'a self,
        conversations: &'a [Option<Vec<TaskItem>>],
        results: &'a [TaskResult],
    ) -> Vec<AskedTask<'a>> {
        let all = self.tasks.iter().zip(conversations).zip(results);
        let asked = all.filter_map(|((task, conversations), result)| match task {
            LoadedTask::Harness(task) => {
                let items = conversations.as_deref().unwrap_or(&task.items);
                Some(AskedTask {
                    task,
                    items,
                    result,
                })
            }
            LoadedTask::Rows(_) => None,
        });
        asked.collect()
    }

    pub(super) fn has_harness_tasks(&self) -> bool {
        let mut tasks = self.tasks.iter();
        tasks.any(|task| matches!(task, LoadedTask::Harness(_)))
    }

    /// The names of everything that is measured: task or group, metric, and filter. Means of groups that have no interval, since
    /// they are no means of items, are not among them.
    pub(crate) fn measures(&self) -> Vec<[String; 3]> {
        let mut measures = Vec::new();
        for task in &self.tasks {
            let (task, metrics) = task.metrics();
            measures.extend(
                metrics
                    .into_iter()
                    .map(|(metric, filter, _)| [task.clone(), metric.to_owned(), filter]),
            );
        }
        for group in &self.groups {
            let is_member = |task: &&LoadedTask| group.tasks.contains(&task.name());
            let members = self
                .tasks
                .iter()
                .filter(is_member)
                .flat_map(|task| task.metrics().1);
            let members: Vec<(&str, String, bool)> = members.collect();
            for of in &group.metrics {
                let wanted = |filter: &String| {
                    let filters = of.filters.as_ref();
                    filters.is_none_or(|filters| filters.contains(filter))
                };
                let same = members.iter().filter(|(metric, ..)| *metric == of.metric);
                let same: Vec<_> = same.filter(|(_, filter, _)| wanted(filter)).collect();
                let filters: BTreeSet<&String> = same.iter().map(|(_, filter, _)| filter).collect();
                for filter in filters {
                    let mut of_filter = same.iter().filter(|(_, other, _)| other == filter);
                    if of_filter.all(|(_, _, is_mean)| *is_mean) {
                        measures.push([group.name.clone(), of.metric.clone(), filter.clone()]);
                    }
                }
            }
        }
        measures
    }

    /// What says whether two models were asked the same: a hash of all questions of each task, by its name.
    pub(crate) fn questions(&self) -> anyhow::Result<BTreeMap<String, String>> {
        let hash = |task: &LoadedTask| Ok((task.name(), task.questions_hash()?));
        self.tasks.iter().map(hash).collect()
    }

    /// Refuses two tasks or groups of one name: their numbers could not be told apart.
    fn expect_names(&self) -> anyhow::Result<()> {
        let tasks = self.tasks.iter().map(LoadedTask::name);
        let groups = self.groups.iter().map(|group| group.name.clone());
        let mut known = BTreeSet::new();
        for name in tasks.chain(groups) {
            if known.contains(&name) {
                bail!(
                    "expected tasks and groups with names of their own, found two called `{name}`; rename a file"
                );
            }
            known.insert(name);
        }
        Ok(())
    }
}

impl LoadedTask {
    fn name(&self) -> String {
        match self {
            Self::Harness(task) => task.definition.name.clone(),
            Self::Rows(file) => rows_name(file),
        }
    }

    /// Its name, and its metrics with their filters and whether they are means of items.
    fn metrics(&self) -> (String, Vec<(&'static str, String, bool)>) {
        let metrics = match self {
            Self::Rows(_) => ::eval::row_metrics()
                .map(|metric| (metric, "none".to_owned(), true))
                .collect(),
            Self::Harness(task) => {
                let metrics = task.definition.filters.iter().flat_map(|filter| {
                    let metrics = task.definition.metrics.iter();
                    metrics.map(|of| {
                        let is_mean = of.aggregation == Aggregation::Mean;
                        (of.metric.name(), filter.name.clone(), is_mean)
                    })
                });
                metrics.collect()
            }
        };
        (self.name(), metrics)
    }

    fn questions_hash(&self) -> anyhow::Result<String> {
        match self {
            Self::Rows(file) => Ok(checkpoint::sha256(file)?),
            Self::Harness(task) => {
                let output = task.definition.output;
                let hashes = task.items.iter().map(|item| {
                    let texts = item.question.requests.iter();
                    let continuations: Vec<&Option<String>> =
                        texts.map(|request| &request.continuation).collect();
                    let prompt = item.prompt_hash(output);
                    format!("{prompt} {} {continuations:?}\n", item.target_hash())
                });
                Ok(checkpoint::sha256_of(hashes.collect::<String>().as_bytes()))
            }
        }
    }
}

/// The name of the task of a file of rows.
pub(super) fn rows_name(file: &Path) -> String {
    let name = file.file_stem().unwrap_or(file.as_os_str());
    name.to_string_lossy().into_owned()
}

/// Reads all tasks, in their order: files of rows before others.
pub(crate) fn load(
    names: &[String],
    options: &TaskOptions<'_>,
    console: &Console,
) -> anyhow::Result<LoadedTasks> {
    let index = options.include_path.iter();
    let index = index
        .map(|folder| TaskIndex::open(folder))
        .collect::<data::Result<Vec<_>>>()?;
    let (mut rows, mut set) = (Vec::new(), TaskSet::default());
    for name in names {
        let path = Path::new(name);
        if path.is_file() && !is_yaml(path) {
            rows.push(LoadedTask::Rows(path.to_owned()));
        } else {
            set.extend(tasks_of(name, &index, options.cure)?)?;
        }
    }
    let harness = set.tasks.into_iter().map(|definition| {
        let task = HarnessTask::load(definition, options, console)?;
        Ok(LoadedTask::Harness(Box::new(task)))
    });
    let harness = harness.collect::<anyhow::Result<Vec<_>>>()?;
    let loaded = LoadedTasks {
        tasks: rows.into_iter().chain(harness).collect(),
        groups: set.groups,
    };
    loaded.expect_names()?;
    Ok(loaded)
}

fn is_yaml(path: &Path) -> bool {
    let extension = path.extension();
    extension.is_some_and(|extension| extension == "yaml" || extension == "yml")
}

/// The tasks of a file, of a folder, or of a name in other folders.
fn tasks_of(name: &str, index: &[TaskIndex], cure: &str) -> anyhow::Result<TaskSet> {
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
    bail!(
        "`{name}`: expected a task's file, a folder of tasks, a file of rows or the name of a task, found none; {cure}"
    )
}

impl HarnessTask {
    fn load(
        definition: TaskDefinition,
        options: &TaskOptions<'_>,
        console: &Console,
    ) -> anyhow::Result<Self> {
        ::eval::expect_measured(&definition)
            .with_context(|| definition.file.display().to_string())?;
        if options.chat.think && definition.output != OutputType::GenerateUntil {
            let (file, name) = (definition.file.display(), &definition.name);
            bail!(
                "{file}: --think: expected a task with written answers, found `{name}`, which scores given ones"
            );
        }
        let hub = hub_cache();
        let dataset = TaskDataset::find(&definition.dataset, &definition.file, hub.as_deref())?;
        let limits = options.limits();
        let fewshot = definition.fewshot_count(limits.fewshot);
        if options.num_fewshot.is_some_and(|wanted| wanted != fewshot) {
            let name = &definition.name;
            console.note(format_args!(
                "{name}: has no examples, whatever --num-fewshot says"
            ));
        }
        let chat = TaskChat {
            system: options.chat.system.as_deref(),
            ..TaskChat::default()
        };
        let TaskItems { items, n_rows } = definition.items(&dataset, limits, &chat)?;
        Ok(Self {
            definition,
            dataset,
            items,
            fewshot,
            n_rows,
        })
    }

    /// The questions as conversations, if they are to be, and what ends a thought in an answer.
    fn conversations(
        &self,
        asked: &AskedModel,
        options: &TaskOptions<'_>,
        console: &Console,
    ) -> anyhow::Result<Option<(Vec<TaskItem>, Option<String>)>> {
        if !options.chat.chat_template {
            return Ok(None);
        }
        let (model, task) = (&asked.name, &self.definition.name);
        let template = asked.tokenizer.chat_template();
        let template =
            template.with_context(|| format!("{model}: expected a chat template, found none"))?;
        let chat = options.chat.task_chat(Some(template));
        let items = self
            .definition
            .items(&self.dataset, options.limits(), &chat)?;
        if chat.is_without_system.get() {
            console.note(format_args!(
                "{model}: {task}: without its system message, which the chat template refuses"
            ));
        }
        let end = template.thought_end().map(str::to_owned);
        Ok(Some((items.items, end)))
    }

    fn result(
        &self,
        asked: &AskedModel,
        options: &TaskOptions<'_>,
        store: &mut dyn AnswerStore,
        console: &Console,
    ) -> anyhow::Result<Judged> {
        let (task, file) = (&self.definition, &*self.definition.file);
        let conversations = self.conversations(asked, options, console)?;
        let (conversations, thought_end) = conversations.unzip();
        let items = conversations.as_deref().unwrap_or(&self.items);
        let config = AnswerConfig {
            max_length: options
                .max_length
                .unwrap_or(asked.limit())
                .min(asked.limit()),
            pass_tokens: 0,
            batch: options.together(&asked.device),
            end_ids: asked.end_ids.clone(),
            seed: 0,
            thought_end: thought_end.flatten(),
        };
        let requests = TaskRequests::new(&asked.tokenizer, task, items, config);
        let mut requests = scored(requests, file, &asked.name)?;
        let longest = requests.longest().max(REQUEST_TOKENS);
        expect_room_for_losses(
            &asked.model.config,
            (options.batch, longest),
            options.budget,
        )?;
        requests.set_pass_tokens(longest * options.batch as usize);
        let mut progress = console.progress(requests.count() as u64, "requests");
        let status = format!("{}: {}", asked.name, task.name);
        let tell = &mut |done, _| progress.update(done as u64, &status);
        let mut engine = Engine::new(asked.model.clone(), options.compute, asked.device.clone());
        let answers = requests.answer(&mut engine, &asked.tokenizer, store, tell);
        progress.finish();
        let answers = scored(answers, file, &asked.name)?;
        if answers.n_cut > 0 {
            let (name, n_cut) = (&task.name, answers.n_cut);
            console.note(format_args!(
                "{name}: {n_cut} requests are cut at their beginning to fit the model"
            ));
        }
        let counts = (self.fewshot, self.n_rows);
        let result = TaskResult::new(task, items, counts, answers);
        Ok(Judged {
            result: scored(result, file, &asked.name)?,
            conversations,
        })
    }
}

impl TaskOptions<'_> {
    /// Answers that are written together. On a CPU, 8 have the texts that each has alone, which an evaluation that goes on relies
    /// on.
    fn together(&self, device: &Device) -> usize {
        match kernels::device::is_gpu(device) {
            true => self.batch as usize,
            false => self.batch.min(8) as usize,
        }
    }

    fn limits(&self) -> ItemLimits {
        ItemLimits {
            fewshot: self.num_fewshot,
            rows: self.max_samples,
        }
    }
}

impl LoadedTask {
    /// The tokens of its first questions.
    pub(super) fn first_tokens(
        &self,
        asked: &AskedModel,
        options: &TaskOptions<'_>,
    ) -> anyhow::Result<Vec<Vec<u32>>> {
        let ids = |text: &str| Ok(asked.tokenizer.encode(text, Bos::Add)?);
        match self {
            Self::Harness(task) => {
                let requests = task.items.iter().take(ROUTED_SAMPLES);
                let requests = requests.filter_map(|item| item.question.requests.first());
                let text = |request: &TaskRequest| {
                    let continuation = request.continuation.as_deref().unwrap_or_default();
                    ids(&format!("{}{continuation}", request.context))
                };
                requests.map(text).collect()
            }
            Self::Rows(file) => {
                let questions = data::choices(file, &asked.tokenizer, options.columns, ROW_LENGTH)?;
                let samples = questions.into_iter().filter_map(|mut of| of.samples.pop());
                Ok(samples
                    .take(ROUTED_SAMPLES)
                    .map(|sample| sample.ids)
                    .collect())
            }
        }
    }

    /// A model's result.
    pub(crate) fn result(
        &self,
        asked: &AskedModel,
        options: &TaskOptions<'_>,
        store: &mut dyn AnswerStore,
        console: &Console,
    ) -> anyhow::Result<Judged> {
        match self {
            Self::Harness(task) => task.result(asked, options, store, console),
            Self::Rows(file) => Ok(Judged {
                result: rows_result(file, asked, options, store, console)?,
                conversations: None,
            }),
        }
    }
}

/// The result of a file of questions.
fn rows_result(
    file: &Path,
    asked: &AskedModel,
    options: &TaskOptions<'_>,
    store: &mut dyn AnswerStore,
    console: &Console,
) -> anyhow::Result<TaskResult> {
    let max_length = options.max_length.unwrap_or(ROW_LENGTH).min(asked.limit());
    let mut questions = data::choices(file, &asked.tokenizer, options.columns, max_length)?;
    questions.truncate(options.max_samples.unwrap_or(usize::MAX));
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
    let batch = batch_of(samples.iter().copied(), options.batch);
    expect_room_for_losses(&asked.model.config, batch, options.budget)?;
    let task = rows_name(file);
    let mut progress = console.progress(samples.len() as u64, "choices");
    let tell = &mut |done, _| progress.update(done as u64, &asked.name);
    let config = EvalConfig {
        batch_size: options.batch as usize,
        compute: options.compute,
    };
    let found = ::eval::multiple_choice(&asked.model, &task, &questions, &config, store, tell);
    progress.finish();
    scored(found, file, &asked.name)
}

/// The number of samples of a batch, and the tokens of the longest one.
pub(super) fn batch_of<'a>(samples: impl Iterator<Item = &'a Sample>, most: u64) -> (u64, usize) {
    let lengths = samples.map(|sample| sample.ids.len());
    let (rows, longest) = lengths.fold((0, 0), |(n, longest), len| (n + 1, len.max(longest)));
    (most.min(rows), longest)
}

/// A score, or an error that names the model and the file.
pub(super) fn scored<T>(found: ::eval::Result<T>, file: &Path, model: &str) -> anyhow::Result<T> {
    finite(found, &format_args!("{model}: {}", file.display()))
}
