//! What an evaluation rests on: the hashes of all its files, and what it found. `eval --check` looks whether that still holds.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use anyhow::Context;
use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::hashed_files::{FileHasher, HashedFile, problem, program, settings_files};
use crate::console::{Console, MISMATCH};

/// The version of the form.
const FORMAT: u32 = 1;
/// The largest file. Reports have the value of each item.
const MOST_REPORT_BYTES: u64 = 1 << 30;

/// The file of an evaluation's evidence.
pub(super) const EVIDENCE_NAME: &str = "evidence.json";
/// The file of its numbers, down to single items.
pub(super) const REPORT_NAME: &str = "report.json";

/// All that a verdict rests on.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct Evidence {
    format: u32,
    version: String,
    program: HashedFile,
    /// The command line.
    arguments: Vec<String>,
    pub(super) settings: Map<String, Value>,
    pub(super) models: Vec<ModelEvidence>,
    pub(super) tasks: Vec<TaskEvidence>,
    /// The rows of `--data`.
    pub(super) data: Vec<HashedFile>,
    /// What the evaluation wrote, from the folder of this file.
    results: Vec<HashedFile>,
    /// The numbers, differences and verdicts of the report.
    found: Value,
}

/// The files of a model.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct ModelEvidence {
    pub(super) name: String,
    pub(super) files: Vec<HashedFile>,
    pub(super) adapter_files: Vec<HashedFile>,
    /// The recipe of the run that the model or adapter lies in.
    pub(super) recipe: Vec<HashedFile>,
}

/// The files of a task.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct TaskEvidence {
    pub(super) task: String,
    pub(super) files: Vec<HashedFile>,
    pub(super) data: Vec<HashedFile>,
}

impl Evidence {
    /// The evidence of models, before anything is found.
    pub(super) fn new(settings: Map<String, Value>) -> anyhow::Result<Self> {
        let arguments = std::env::args_os().skip(1);
        Ok(Self {
            format: FORMAT,
            version: env!("CARGO_PKG_VERSION").into(),
            program: program()?,
            arguments: arguments
                .map(|word| word.to_string_lossy().into_owned())
                .collect(),
            settings,
            models: Vec::new(),
            tasks: Vec::new(),
            data: Vec::new(),
            results: Vec::new(),
            found: Value::Null,
        })
    }

    /// What answers of a model depend on, except the questions.
    pub(super) fn identity(&self, model: &ModelEvidence, computer: &Value) -> Value {
        let contents = |files: &[HashedFile]| -> Vec<Value> {
            let content = |file: &HashedFile| {
                let name = file.path.file_name().unwrap_or_default();
                [name.to_string_lossy().as_ref(), &file.sha256].into()
            };
            files.iter().map(content).collect()
        };
        serde_json::json!({
            "program": self.program.sha256,
            "compute": self.settings.get("compute"),
            "computer": computer,
            "model": contents(&model.files),
            "adapter": contents(&model.adapter_files),
        })
    }

    /// Writes the file, after all others of the folder.
    pub(super) fn write(
        mut self,
        folder: &Path,
        report: &Value,
        written: &[PathBuf],
        hasher: &mut FileHasher<'_>,
    ) -> anyhow::Result<()> {
        self.results = hasher.hash(written)?;
        for file in &mut self.results {
            if let Ok(inner) = file.path.strip_prefix(folder) {
                file.path = inner.to_owned();
            }
        }
        self.found = without_items(report.clone());
        let text = format!("{:#}\n", serde_json::to_value(&self)?);
        Ok(checkpoint::write_file(
            &folder.join(EVIDENCE_NAME),
            text.as_bytes(),
        )?)
    }

    /// All files but the results, at the paths that the evaluation was given.
    fn inputs(&self) -> impl Iterator<Item = &HashedFile> {
        let of_models = self.models.iter();
        let of_models = of_models.flat_map(|model| {
            let files = model.files.iter().chain(&model.adapter_files);
            files.chain(&model.recipe)
        });
        let of_tasks = self.tasks.iter();
        let of_tasks = of_tasks.flat_map(|task| task.files.iter().chain(&task.data));
        of_models.chain(of_tasks).chain(&self.data)
    }
}

/// A report without the values of single items.
fn without_items(report: Value) -> Value {
    match report {
        Value::Object(entries) => {
            let entries = entries.into_iter();
            let entries = entries.filter(|(key, _)| key != "of_items" && key != "per_sample");
            let entries = entries.map(|(key, value)| (key, without_items(value)));
            Value::Object(entries.collect())
        }
        Value::Array(values) => values.into_iter().map(without_items).collect(),
        other => other,
    }
}

/// Reads a report, or evidence.
pub(crate) fn read_report(path: &Path) -> anyhow::Result<Value> {
    let size = std::fs::metadata(path);
    let size = size.with_context(|| format!("cannot read `{}`", path.display()))?;
    if size.len() > MOST_REPORT_BYTES {
        let found = size.len();
        anyhow::bail!(
            "`{}`: expected at most {MOST_REPORT_BYTES} bytes, found {found}",
            path.display()
        );
    }
    let bytes = std::fs::read(path).with_context(|| format!("cannot read `{}`", path.display()))?;
    serde_json::from_slice(&bytes).with_context(|| format!("`{}`: expected JSON", path.display()))
}

/// Checks an evidence file: the hashes of all files, and that the report's numbers are those of its items.
pub(super) fn check(path: &Path, is_json: bool, console: &Console) -> anyhow::Result<ExitCode> {
    let evidence: Evidence = serde_json::from_value(read_report(path)?)
        .with_context(|| format!("`{}`: expected evidence of `eval`", path.display()))?;
    if evidence.format != FORMAT {
        let found = evidence.format;
        anyhow::bail!(
            "`{}`: expected format {FORMAT}, found {found}",
            path.display()
        );
    }
    if evidence.program.sha256 != program()?.sha256 {
        let version = &evidence.version;
        console.note(format_args!(
            "another build of moeforge wrote it, of version {version}"
        ));
    }
    let mut hasher = FileHasher::new(console);
    let (folder, here) = (path.parent().unwrap_or(Path::new("")), Path::new(""));
    let inputs = evidence.inputs().map(|file| (file, here));
    let results = evidence.results.iter().map(|file| (file, folder));
    let (mut n_files, mut problems) = (0, Vec::new());
    for (file, place) in inputs.chain(results) {
        n_files += 1;
        problems.extend(problem(file, place, &mut hasher));
    }
    for model in &evidence.models {
        problems.extend(added(model)?);
    }
    problems.extend(check_numbers(&evidence, folder)?);
    let text = match problems.is_empty() {
        true => format!("{n_files} files and all numbers are as stated"),
        false => problems.join("\n"),
    };
    let json = serde_json::json!({"files": n_files, "problems": problems});
    match is_json {
        true => console.result(format_args!("{json:#}")),
        false => console.result(text),
    }
    Ok(match problems.is_empty() {
        true => ExitCode::SUCCESS,
        false => ExitCode::from(MISMATCH),
    })
}

/// The settings and templates that a model's folder has by now, and that would be read.
fn added(model: &ModelEvidence) -> anyhow::Result<Vec<String>> {
    let is_config = |file: &&HashedFile| file.path.ends_with("config.json");
    let Some(folder) = model
        .files
        .iter()
        .find(is_config)
        .and_then(|file| file.path.parent())
    else {
        return Ok(Vec::new()); // A GGUF.
    };
    let is_stated = |path: &PathBuf| model.files.iter().any(|file| file.path == *path);
    let found = settings_files(folder)?.into_iter();
    let added = found.filter(|path| !is_stated(path));
    let problem = |path: PathBuf| format!("{}: expected no file, found one", path.display());
    Ok(added.map(problem).collect())
}

/// What of the numbers is not as the items in the report say.
fn check_numbers(evidence: &Evidence, folder: &Path) -> anyhow::Result<Vec<String>> {
    let is_report = |file: &HashedFile| file.path == Path::new(REPORT_NAME);
    if !evidence.results.iter().any(is_report) {
        return Ok(vec![format!(
            "{REPORT_NAME}: expected its hash, found none"
        )]);
    }
    let path = folder.join(REPORT_NAME);
    if !path.is_file() {
        return Ok(Vec::new()); // It is among the files that are absent.
    }
    let report = read_report(&path)?;
    let mut problems = ::eval::recompute(&report)
        .with_context(|| format!("`{}`", path.display()))?
        .into_iter()
        .map(|problem| format!("{REPORT_NAME}: {problem}"))
        .collect::<Vec<_>>();
    let stated_models = evidence.models.iter().map(|model| &model.name);
    let stated_tasks = evidence.tasks.iter().map(|task| &task.task);
    let names = |values: &Value, key: &str| -> Vec<String> {
        let values = values.as_array().into_iter().flatten();
        let names = values.filter_map(|value| value[key].as_str());
        names.map(str::to_owned).collect()
    };
    let models = names(&report["models"], "name");
    let tasks = names(&report["models"][0]["tasks"], "task");
    let has_files = evidence.models.iter().all(|model| !model.files.is_empty())
        && evidence.tasks.iter().all(|task| !task.data.is_empty());
    if !stated_models.eq(&models) || !stated_tasks.eq(&tasks) || !has_files {
        problems.push(format!(
            "{EVIDENCE_NAME}: expected files of the models and tasks of `{REPORT_NAME}`, found others"
        ));
    }
    if without_items(report) != evidence.found {
        problems.push(format!(
            "{EVIDENCE_NAME}: expected `found` to be what `{REPORT_NAME}` says, found something else"
        ));
    }
    Ok(problems)
}
