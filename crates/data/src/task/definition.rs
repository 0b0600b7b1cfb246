//! A task as its file defines it.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::included::read_merged;
use super::keys::{Setting, Settings};
use super::metric::{FilterPipeline, MetricUse, OutputType, filter_list, metric_list};
use super::twin::{ResultsTwin, RowTwin, RowsTwin};
use super::yaml::{Yaml, YamlValue};
use crate::Result;
use crate::jinja::{Syntax, Template, Value};

/// A task: rows, what is asked about each, and how answers are judged.
#[derive(Clone, Debug)]
pub struct TaskDefinition {
    /// Its name.
    pub name: String,
    /// The name in tables.
    pub alias: Option<String>,
    /// The file.
    pub file: Arc<Path>,
    /// The files that its keys are from, those that it includes among them.
    pub files: Vec<PathBuf>,
    /// Where its rows are.
    pub dataset: DatasetSource,
    /// Which of its rows are for what.
    pub splits: TaskSplits,
    /// The prompt of a row.
    pub(super) text: DocValue,
    /// The expected answer.
    pub(super) target: DocValue,
    /// The choices.
    pub(super) choice: Option<DocValue>,
    /// What comes before all examples.
    pub(super) description: Option<DocValue>,
    /// What the answer begins with.
    pub(super) gen_prefix: Option<DocValue>,
    /// Between a prompt and an answer.
    pub target_delimiter: String,
    /// Between examples.
    pub fewshot_delimiter: String,
    /// Examples before the question.
    pub fewshot: FewshotSetup,
    /// What the model does.
    pub output: OutputType,
    /// How it writes.
    pub generation: GenerationSettings,
    /// Answers to each row.
    pub repeats: usize,
    /// What is made of answers.
    pub filters: Vec<FilterPipeline>,
    /// What is measured.
    pub metrics: Vec<MetricUse>,
    /// The version that its `metadata` names.
    pub version: String,
    /// What is made of its rows.
    pub(super) process_docs: Option<RowsTwin>,
    /// How its metrics are computed, if not as those of its output type.
    pub process_results: Option<ResultsTwin>,
}

/// Where rows are.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DatasetSource {
    /// A repository, a folder, or the format of the files.
    pub path: String,
    /// A part of the repository.
    pub name: Option<String>,
    /// Files by split.
    pub files: Vec<(String, Vec<String>)>,
}

/// Which rows are for what.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct TaskSplits {
    /// Rows to learn from.
    pub training: Option<String>,
    /// Rows that are evaluated if there are no others.
    pub validation: Option<String>,
    /// Rows that are evaluated.
    pub test: Option<String>,
}

/// What gives a text, a number or a list for a row.
#[derive(Clone, Debug)]
pub(super) enum DocValue {
    /// The name of a column, or else a template.
    Text(String, Template),
    /// The same for all rows.
    Fixed(Value),
    /// What a known function of Python gives.
    Twin(RowTwin),
}

/// Examples before the question.
#[derive(Clone, Debug, Default)]
pub struct FewshotSetup {
    /// How many, unless a user says otherwise.
    pub count: Option<usize>,
    /// How they are chosen.
    pub sampler: FewshotSampler,
    /// The split that they are from.
    pub split: Option<String>,
    /// Rows of the file itself.
    pub samples: Option<Vec<serde_json::Value>>,
    pub(super) text: Option<DocValue>,
    pub(super) target: Option<DocValue>,
    pub(super) choice: Option<DocValue>,
    pub(super) gen_prefix: Option<DocValue>,
    pub(super) target_delimiter: Option<String>,
    pub(super) fewshot_delimiter: Option<String>,
    /// What is made of the rows that they are chosen from; none is what is made of the task's.
    pub(super) process_docs: Option<RowsTwin>,
}

/// How examples are chosen.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum FewshotSampler {
    /// At random, others for each row.
    #[default]
    Random,
    /// The first ones.
    FirstN,
}

const SAMPLERS: [(&str, FewshotSampler); 2] = [
    ("default", FewshotSampler::Random),
    ("first_n", FewshotSampler::FirstN),
];

/// How a model writes.
#[derive(Clone, Debug, PartialEq)]
pub struct GenerationSettings {
    /// Texts that end an answer, and are not part of it.
    pub until: Vec<String>,
    /// The most tokens of an answer; none is the program's usual number.
    pub max_tokens: Option<usize>,
    /// 0 takes the most likely token.
    pub temperature: f64,
    /// The least share of probability that tokens are drawn from.
    pub top_p: Option<f64>,
    /// The number of tokens that are drawn from.
    pub top_k: Option<usize>,
}

impl DocValue {
    fn read(of: &Setting) -> Result<Self> {
        match &of.yaml.value {
            YamlValue::Text(text) => Self::template(text, of),
            YamlValue::Int(number) => Ok(Self::Fixed(Value::Int((*number).into()))),
            YamlValue::List(items) => {
                let items = items.iter().map(json_of).collect();
                Ok(Self::Fixed(Value::of_json(&serde_json::Value::Array(
                    items,
                ))))
            }
            YamlValue::Map(entries) => {
                let items = entries.iter().map(|(_, value)| json_of(value)).collect();
                Ok(Self::Fixed(Value::of_json(&serde_json::Value::Array(
                    items,
                ))))
            }
            YamlValue::Tagged(..) => RowTwin::read(of).map(Self::Twin),
            _ => Err(of.wrong("a template, the name of a column, a number or a list")),
        }
    }

    fn template(text: &str, of: &Setting) -> Result<Self> {
        let template = Template::parse_as(text, Syntax::Harness);
        let template = template.map_err(|problem| of.error("a template", problem))?;
        Ok(Self::Text(text.into(), template))
    }

    fn read_text(of: &Setting) -> Result<Self> {
        Self::template(&of.text()?, of)
    }
}

/// A value as rows have them.
pub(super) fn json_of(yaml: &Yaml) -> serde_json::Value {
    use serde_json::Value as Json;
    match &yaml.value {
        YamlValue::Null => Json::Null,
        YamlValue::Bool(is_true) => Json::Bool(*is_true),
        YamlValue::Int(number) => (*number).into(),
        YamlValue::Float(number) => (*number).into(),
        YamlValue::Text(text) | YamlValue::Tagged(_, text) => Json::String(text.clone()),
        YamlValue::List(items) => Json::Array(items.iter().map(json_of).collect()),
        YamlValue::Map(entries) => {
            let entries = entries
                .iter()
                .map(|(key, value)| (key.clone(), json_of(value)));
            Json::Object(entries.collect())
        }
    }
}

impl TaskDefinition {
    /// Reads a task file, and those that it includes.
    ///
    /// # Errors
    /// If there is something in it that is not known here, or that Python would have to do: with file, line and key.
    pub fn open(path: &Path) -> Result<Self> {
        let file: Arc<Path> = path.into();
        let mut settings = read_merged(path)?;
        let name = required(&mut settings, "task", &file, Setting::text)?;
        Self::read(settings, &file, name)
    }

    /// Reads the settings of a task, those of the files it includes among them.
    pub(super) fn read(mut keys: Settings, file: &Arc<Path>, name: String) -> Result<Self> {
        let files = keys.files();
        let output = keys.read("output_type", |of| of.one_of(&OutputType::ALL))?;
        let output = output.unwrap_or(OutputType::GenerateUntil);
        // Of registers, not of the task.
        for key in ["task", "tag", "group", "task_list"] {
            _ = keys.take(key);
        }
        refuse_python(&mut keys)?;
        let alias = keys.read("task_alias", Setting::text)?;
        let dataset = dataset_source(&mut keys, file)?;
        let splits = TaskSplits {
            training: keys.read("training_split", Setting::text)?,
            validation: keys.read("validation_split", Setting::text)?,
            test: keys.read("test_split", Setting::text)?,
        };
        let [text, target] = [
            required(&mut keys, "doc_to_text", file, DocValue::read)?,
            required(&mut keys, "doc_to_target", file, DocValue::read)?,
        ];
        let choice = keys.read("doc_to_choice", DocValue::read)?;
        if output == OutputType::MultipleChoice && choice.is_none() {
            return Err(missing("doc_to_choice", file));
        }
        let fewshot_delimiter = keys.read("fewshot_delimiter", Setting::text)?;
        let fewshot_delimiter = fewshot_delimiter.unwrap_or_else(|| "\n\n".into());
        // What a check for contamination looks for, which is none here.
        for key in ["should_decontaminate", "doc_to_decontamination_query"] {
            _ = keys.take(key);
        }
        let definition = Self {
            name,
            alias,
            file: Arc::clone(file),
            files,
            dataset,
            splits,
            text,
            target,
            choice,
            description: keys.read("description", DocValue::read_text)?,
            gen_prefix: keys.read("gen_prefix", DocValue::read_text)?,
            target_delimiter: keys
                .read("target_delimiter", Setting::text)?
                .unwrap_or_else(|| " ".into()),
            fewshot: fewshot(&mut keys)?,
            output,
            generation: generation(&mut keys, output, &fewshot_delimiter)?,
            fewshot_delimiter,
            repeats: keys.read("repeats", Setting::count)?.unwrap_or(1).max(1),
            filters: filter_list(keys.take("filter_list").as_ref())?,
            metrics: metric_list(keys.take("metric_list").as_ref(), output)?,
            version: version(&mut keys),
            process_docs: keys.read("process_docs", RowsTwin::read)?,
            process_results: keys.read("process_results", ResultsTwin::read)?,
        };
        keys.finish()?;
        Ok(definition)
    }
}

/// Refuses keys whose values only Python can give.
fn refuse_python(keys: &mut Settings) -> Result<()> {
    for key in [
        "custom_dataset",
        "doc_to_image",
        "doc_to_audio",
        "use_prompt",
    ] {
        if let Some(setting) = keys.take(key) {
            return Err(setting.wrong("nothing"));
        }
    }
    match keys.take("unsafe_code") {
        Some(setting) if setting.boolean()? => {
            Err(setting.error("false", "true: answers are not run"))
        }
        _ => Ok(()),
    }
}

fn missing(key: &str, file: &Arc<Path>) -> crate::Error {
    crate::Error::malformed(file, format!("expected `{key}`, found none"))
}

fn required<T>(
    keys: &mut Settings,
    key: &'static str,
    file: &Arc<Path>,
    read: impl FnOnce(&Setting) -> Result<T>,
) -> Result<T> {
    keys.read(key, read)?.ok_or_else(|| missing(key, file))
}

fn dataset_source(keys: &mut Settings, file: &Arc<Path>) -> Result<DatasetSource> {
    let path = required(keys, "dataset_path", file, Setting::text)?;
    let name = keys.read("dataset_name", Setting::text)?;
    let files = keys.read("dataset_kwargs", |of| {
        let mut keys = of.map()?;
        // Rows are read here, and no code of a repository is run; what is cached is of one revision.
        for key in ["trust_remote_code", "revision"] {
            _ = keys.take(key);
        }
        let files = keys.read("data_files", data_files)?;
        keys.finish()?;
        Ok(files.unwrap_or_default())
    })?;
    Ok(DatasetSource {
        path,
        name,
        files: files.unwrap_or_default(),
    })
}

/// Files by split; without splits, they are the training rows.
fn data_files(of: &Setting) -> Result<Vec<(String, Vec<String>)>> {
    if !matches!(of.yaml.value, YamlValue::Map(_)) {
        return Ok(vec![("train".into(), of.texts()?)]);
    }
    let splits = of.map()?.rest().into_iter();
    splits
        .map(|(split, files)| Ok((split, files.texts()?)))
        .collect()
}

fn fewshot(keys: &mut Settings) -> Result<FewshotSetup> {
    let mut setup = FewshotSetup {
        count: keys.read("num_fewshot", Setting::count)?,
        split: keys.read("fewshot_split", Setting::text)?,
        ..FewshotSetup::default()
    };
    let Some(config) = keys.take("fewshot_config") else {
        return Ok(setup);
    };
    let mut keys = config.map()?;
    if let Some(sampler) = keys.read("sampler", |of| of.one_of(&SAMPLERS))? {
        setup.sampler = sampler;
    }
    if let Some(split) = keys.read("split", Setting::text)? {
        setup.split = Some(split);
    }
    setup.process_docs = keys.read("process_docs", RowsTwin::read)?;
    setup.samples = keys.read("samples", |of| {
        let row = |item: &Setting| item.map().map(|_| json_of(&item.yaml));
        of.list()?.iter().map(row).collect()
    })?;
    if let Some(indices) = keys.take("fewshot_indices") {
        let found = "some, which the harness reads and does not obey";
        return Err(indices.error("none", found));
    }
    setup.text = keys.read("doc_to_text", DocValue::read)?;
    setup.target = keys.read("doc_to_target", DocValue::read)?;
    setup.choice = keys.read("doc_to_choice", DocValue::read)?;
    setup.gen_prefix = keys.read("gen_prefix", DocValue::read_text)?;
    setup.target_delimiter = keys.read("target_delimiter", Setting::text)?;
    setup.fewshot_delimiter = keys.read("fewshot_delimiter", Setting::text)?;
    keys.finish()?;
    Ok(setup)
}

/// Names for the most tokens of an answer, the strongest first.
const MAX_TOKENS: [&str; 4] = [
    "max_gen_toks",
    "max_new_tokens",
    "max_tokens",
    "max_completion_tokens",
];

fn generation(
    keys: &mut Settings,
    output: OutputType,
    fewshot_delimiter: &str,
) -> Result<GenerationSettings> {
    let mut settings = GenerationSettings {
        until: vec![fewshot_delimiter.to_owned()],
        max_tokens: None,
        temperature: 0.0,
        top_p: None,
        top_k: None,
    };
    let Some(config) = keys.take("generation_kwargs") else {
        return Ok(settings);
    };
    if output != OutputType::GenerateUntil {
        return Err(config.error("nothing without `output_type: generate_until`", "a mapping"));
    }
    let mut keys = config.map()?;
    if let Some(until) = keys.read("until", Setting::texts)? {
        settings.until = until;
    }
    for key in MAX_TOKENS {
        let tokens = keys.read(key, Setting::count)?;
        settings.max_tokens = settings.max_tokens.or(tokens);
    }
    let temperature = keys.read("temperature", Setting::number)?;
    let draws = keys.read("do_sample", Setting::boolean)?;
    settings.temperature = match (draws, temperature) {
        (Some(false), _) => 0.0,
        (Some(true), None) => 1.0,
        (_, temperature) => temperature.unwrap_or(0.0),
    };
    settings.top_p = keys.read("top_p", Setting::number)?;
    settings.top_k = keys.read("top_k", Setting::count)?;
    if let Some(beams) = keys
        .take("num_beams")
        .filter(|of| of.count().ok() != Some(1))
    {
        return Err(beams.error("1", "a search with beams"));
    }
    keys.finish()?;
    Ok(settings)
}

/// The version in `metadata`, of which nothing else counts.
fn version(keys: &mut Settings) -> String {
    let metadata = keys.take("metadata");
    let version = metadata.and_then(|of| of.map().ok()?.take("version"));
    version.map_or_else(
        || "Yaml".into(),
        |of| match json_of(&of.yaml) {
            serde_json::Value::String(text) => text,
            other => other.to_string(),
        },
    )
}
