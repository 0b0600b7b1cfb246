//! Results in the files that lm-evaluation-harness writes: `results.json`, and a `samples_<task>.jsonl` of each task.
//!
//! Source: EleutherAI/lm-evaluation-harness 0.4.13: lm_eval/evaluator.py, lm_eval/loggers/evaluation_tracker.py.

use std::path::{Path, PathBuf};

use ::eval::{Answer, GroupResult, ModelScores, RowValue, TaskResult};
use anyhow::Context;
use data::{Filtered, GenerationSettings, OutputType, TaskItem, TaskRequest};
use serde_json::{Map, Value, json};

use super::tasks::{AskedTask, HarnessTask};

/// Writes the files of a model in a folder; nothing without such tasks. Returns their paths.
pub(super) fn write(
    folder: &Path,
    tasks: &[AskedTask<'_>],
    groups: &[GroupResult],
) -> anyhow::Result<Vec<PathBuf>> {
    let mut written = Vec::new();
    if tasks.is_empty() {
        return Ok(written);
    }
    std::fs::create_dir_all(folder)
        .with_context(|| format!("cannot make `{}`", folder.display()))?;
    remove_samples(folder)?;
    for asked in tasks {
        let lines = samples(asked).into_iter();
        let lines = lines.map(|sample| format!("{sample}\n"));
        let path = folder.join(format!("samples_{}.jsonl", plain(&asked.result.task)));
        checkpoint::write_file(&path, lines.collect::<String>().as_bytes())?;
        written.push(path);
    }
    let results: Vec<&TaskResult> = tasks.iter().map(|asked| asked.result).collect();
    let path = folder.join("results.json");
    let text = format!("{:#}\n", results_of(&results, groups));
    checkpoint::write_file(&path, text.as_bytes())?;
    written.push(path);
    Ok(written)
}

/// Removes the samples of an evaluation that was killed, and maybe had other tasks.
fn remove_samples(folder: &Path) -> anyhow::Result<()> {
    let entries = std::fs::read_dir(folder);
    let entries = entries.with_context(|| format!("cannot read `{}`", folder.display()))?;
    for entry in entries {
        let entry = entry?;
        let name = entry.file_name();
        let name = name.to_string_lossy();
        if name.starts_with("samples_") && name.ends_with(".jsonl") {
            std::fs::remove_file(entry.path())?;
        }
    }
    Ok(())
}

/// The name of a model, with a number if one before it has the same, or its folder the same name.
pub(super) fn name_of_its_own(name: &str, before: &[ModelScores]) -> String {
    let numbered = |n: usize| match n {
        1 => name.to_owned(),
        n => format!("{name}__{n}"),
    };
    let is_free = |name: &String| before.iter().all(|known| plain(&known.name) != plain(name));
    let mut names = (1..).map(numbered);
    names.find(is_free).unwrap_or_default()
}

/// A name without what file systems do not take.
pub(super) fn plain(name: &str) -> String {
    let is_plain = |c: char| c.is_alphanumeric() || "-_.".contains(c);
    name.chars()
        .map(|c| if is_plain(c) { c } else { '_' })
        .collect()
}

/// The results of a model's tasks and groups.
fn results_of(tasks: &[&TaskResult], groups: &[GroupResult]) -> Value {
    let mut all = json!({
        "results": {}, "n-shot": {}, "versions": {}, "higher_is_better": {}, "n-samples": {},
    });
    for task in tasks {
        let mut found = json!({"alias": task.task, "name": task.task, "sample_len": task.n});
        let mut better = Map::new();
        for metric in &task.metrics {
            let names = [metric.metric.name(), &metric.filter];
            put(&mut found, names, (metric.value, metric.standard_error));
            better.insert(names[0].into(), metric.is_higher_better.into());
        }
        let name = task.task.as_str();
        all["results"][name] = found;
        all["n-shot"][name] = task.fewshot.into();
        all["versions"][name] = version(&task.version);
        all["higher_is_better"][name] = better.into();
        all["n-samples"][name] = json!({"original": task.n_rows, "effective": task.n});
    }
    for group in groups {
        let name = group.group.as_str();
        all["group_subtasks"][name] = group.tasks.clone().into();
        if group.metrics.is_empty() {
            continue;
        }
        let alias = group.alias.as_deref().unwrap_or(name);
        let mut found = json!({"alias": alias, "name": name, "sample_len": group.n});
        for mean in &group.metrics {
            let names = [&*mean.metric, &mean.filter];
            put(&mut found, names, (mean.value, mean.standard_error));
        }
        all["groups"][name] = found.clone();
        all["results"][name] = found;
    }
    all
}

/// Puts a number and its standard error under the names of a metric and a filter.
fn put(found: &mut Value, [metric, filter]: [&str; 2], (value, error): (f64, Option<f64>)) {
    found[format!("{metric},{filter}")] = value.into();
    let error = error.map_or("N/A".into(), Value::from);
    found[format!("{metric}_stderr,{filter}")] = error;
}

/// A version as a task file has it: a number if it is one.
fn version(text: &str) -> Value {
    let number = text.parse::<f64>().ok().filter(|number| number.is_finite());
    number.map_or_else(|| text.into(), Value::from)
}

/// A line for each item and filter of a task.
fn samples(asked: &AskedTask<'_>) -> Vec<Value> {
    let AskedTask {
        task,
        items,
        result,
    } = asked;
    let filters = task.definition.filters.iter().enumerate();
    let of_filter = |(filter, pipeline): (usize, &data::FilterPipeline)| {
        let items = items.iter().enumerate();
        let of_item = move |(number, item): (usize, &TaskItem)| {
            let left = result
                .filtered
                .get(filter)
                .and_then(|left| left.get(number));
            let mut sample = sample(task, item, &result.answers.of_items[number], left);
            sample["doc_id"] = number.into();
            sample["filter"] = pipeline.name.as_str().into();
            let of_filter = result
                .metrics
                .iter()
                .filter(|of| of.filter == pipeline.name);
            let metrics: Vec<_> = of_filter.collect();
            sample["metrics"] = metrics.iter().map(|of| of.metric.name()).collect();
            for metric in metrics {
                sample[metric.metric.name()] = value(metric.of_items[number]);
            }
            sample
        };
        items.map(of_item).collect::<Vec<_>>()
    };
    filters.flat_map(of_filter).collect()
}

fn value(value: RowValue) -> Value {
    match value {
        RowValue::Number(number) => number.into(),
        // Weights are counts.
        RowValue::Weighted(number, weight) => json!([number, weight as u64]),
        RowValue::Labels(right, chosen) => json!([right, chosen]),
        // The harness keeps the texts, which the sample has anyway.
        RowValue::Bleu(_) | RowValue::Chrf(_) | RowValue::Ter(_) => {
            serde_json::to_value(value).unwrap_or_default()
        }
    }
}

fn sample(
    task: &HarnessTask,
    item: &TaskItem,
    answers: &[Answer],
    left: Option<&Filtered>,
) -> Value {
    let question = &item.question;
    let mut arguments = Map::new();
    let is_whole = task.definition.output == OutputType::LoglikelihoodRolling;
    for (number, request) in question.requests.iter().enumerate() {
        let request = match &request.continuation {
            Some(text) if is_whole => json!({"arg_0": text}),
            _ => arguments_of(request, &task.definition.generation),
        };
        arguments.insert(format!("gen_args_{number}"), request);
    }
    // Whether a whole text is the greedy one is not asked.
    let shown = |of: &Answer| match (answer(of), is_whole) {
        (Value::Array(numbers), true) => numbers.into_iter().take(1).collect(),
        (answer, _) => answer,
    };
    let answers: Vec<Value> = answers.iter().map(shown).collect();
    // A writing task has one request, which it may answer several times.
    let responses = match left {
        Some(_) => json!([answers]),
        None => answers.iter().map(|answer| json!([answer])).collect(),
    };
    let filtered = match left {
        Some(Filtered::One(text)) => json!([text]),
        Some(Filtered::Many(texts)) => json!([texts]),
        None => answers.into(),
    };
    json!({
        "doc": item.row.values(),
        "target": question.target.to_string(),
        "arguments": arguments,
        "resps": responses,
        "filtered_resps": filtered,
        "prompt_hash": item.prompt_hash(task.definition.output),
        "target_hash": item.target_hash(),
    })
}

fn arguments_of(request: &TaskRequest, settings: &GenerationSettings) -> Value {
    let second = match &request.continuation {
        Some(text) => text.as_str().into(),
        None => json!({
            "until": settings.until,
            "do_sample": settings.temperature > 0.0,
            "temperature": settings.temperature,
            "max_gen_toks": settings.max_tokens,
        }),
    };
    json!({"arg_0": request.context, "arg_1": second})
}

/// An answer; the numbers of a likelihood as Python prints them.
fn answer(answer: &Answer) -> Value {
    match answer {
        Answer::Text(text) => text.as_str().into(),
        Answer::Likelihood { logprob, is_greedy } => {
            let is_greedy = if *is_greedy { "True" } else { "False" };
            json!([format!("{logprob:?}"), is_greedy])
        }
    }
}
