//! Results in the files that lm-evaluation-harness writes: `results.json`, and a `samples_<task>.jsonl` of each task.
//!
//! Source: EleutherAI/lm-evaluation-harness 0.4.13: lm_eval/evaluator.py, lm_eval/loggers/evaluation_tracker.py.

use std::path::Path;

use ::eval::{Answer, GroupResult, ModelScores, RowValue, TaskResult};
use anyhow::Context;
use data::{Filtered, GenerationSettings, TaskItem, TaskRequest};
use serde_json::{Map, Value, json};

use super::tasks::{HarnessTask, LoadedTask};

/// Writes the files of each model in a folder of its own, called after it; nothing for a model without such tasks.
pub(super) fn write(
    out: &Path,
    tasks: &[LoadedTask],
    models: &[ModelScores],
) -> anyhow::Result<()> {
    for (number, model) in models.iter().enumerate() {
        let results = tasks.iter().zip(&model.tasks);
        let of_harness = results.filter_map(|(task, result)| match task {
            LoadedTask::Harness(task) => Some((&**task, result)),
            LoadedTask::Rows(_) => None,
        });
        let of_harness: Vec<(&HarnessTask, &TaskResult)> = of_harness.collect();
        if of_harness.is_empty() {
            continue;
        }
        let folder = out.join(folder_name(number, models));
        std::fs::create_dir_all(&folder)
            .with_context(|| format!("cannot make `{}`", folder.display()))?;
        for (task, result) in &of_harness {
            let lines = samples(task, result)
                .into_iter()
                .map(|sample| format!("{sample}\n"));
            let path = folder.join(format!("samples_{}.jsonl", plain(&result.task)));
            checkpoint::write_file(&path, lines.collect::<String>().as_bytes())?;
        }
        let of_model: Vec<&TaskResult> = of_harness.iter().map(|(_, result)| *result).collect();
        let text = format!("{:#}\n", results_of(&of_model, &model.groups));
        checkpoint::write_file(&folder.join("results.json"), text.as_bytes())?;
    }
    Ok(())
}

/// The name of a model's folder: its own, with a number if another model has the same.
fn folder_name(number: usize, models: &[ModelScores]) -> String {
    let name = plain(&models[number].name);
    let same = |other: &&ModelScores| plain(&other.name) == name;
    match models[..number].iter().filter(same).count() {
        0 => name,
        before => format!("{name}__{}", before + 1),
    }
}

/// A name without what file systems do not take.
fn plain(name: &str) -> String {
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
            let (name, filter) = (metric.metric.name(), &metric.filter);
            found[format!("{name},{filter}")] = metric.value.into();
            let error = metric.standard_error.map_or("N/A".into(), Value::from);
            found[format!("{name}_stderr,{filter}")] = error;
            better.insert(name.into(), metric.is_higher_better.into());
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
        let alias = group.alias.as_deref().unwrap_or(name);
        let mut found = json!({"alias": alias, "name": name, "sample_len": group.n});
        for mean in &group.metrics {
            let (metric, filter) = (&mean.metric, &mean.filter);
            found[format!("{metric},{filter}")] = mean.value.into();
            let error = mean.standard_error.map_or("N/A".into(), Value::from);
            found[format!("{metric}_stderr,{filter}")] = error;
        }
        all["groups"][name] = found.clone();
        all["results"][name] = found;
    }
    all
}

/// A version as a task file has it: a number if it is one.
fn version(text: &str) -> Value {
    let number = text.parse::<f64>().ok().filter(|number| number.is_finite());
    number.map_or_else(|| text.into(), Value::from)
}

/// A line for each item and filter of a task.
fn samples(task: &HarnessTask, result: &TaskResult) -> Vec<Value> {
    let filters = task.definition.filters.iter().enumerate();
    let of_filter = |(filter, pipeline): (usize, &data::FilterPipeline)| {
        let items = task.items.iter().enumerate();
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
        RowValue::Weighted(number, weight) => json!([number, weight]),
        RowValue::Labels(right, chosen) => json!([right, chosen]),
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
    for (number, request) in question.requests.iter().enumerate() {
        let request = arguments_of(request, &task.definition.generation);
        arguments.insert(format!("gen_args_{number}"), request);
    }
    let answers: Vec<Value> = answers.iter().map(answer).collect();
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
