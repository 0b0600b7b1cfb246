//! The evaluation harness's tasks: the numbers that the harness gives for the same models.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

#[path = "../../../tests/goldens/paths.rs"]
mod goldens;

use std::path::PathBuf;
use std::sync::Arc;

use burn::tensor::Device;
use data::{
    ChatTemplate, ItemLimits, Special, TaskChat, TaskDataset, TaskDefinition, TaskIndex, TaskItem,
    Tokenizer,
};
use infer::Engine;
use model::Compute;
use moeforge_eval::{Answer, AnswerConfig, TaskRequests, TaskResult};
use serde_json::Value;

/// f32 sums in another order, for log-likelihoods of up to some hundred nats.
const LOGPROB: f64 = 1e-3;
/// Of metrics, and of standard errors: three and four decimals, relative to numbers beyond 1.
const METRIC: f64 = 5e-4;
const ERROR: f64 = 5e-5;

fn folder() -> PathBuf {
    goldens::path("harness_tasks")
}

fn run(
    engine: &mut Engine,
    tokenizer: &Arc<Tokenizer>,
    task: &TaskDefinition,
    pass_tokens: usize,
    chat: &TaskChat<'_>,
) -> (Vec<TaskItem>, TaskResult) {
    let dataset = TaskDataset::find(&task.dataset, &task.file, None).unwrap();
    let items = task.items(&dataset, ItemLimits::default(), chat).unwrap();
    let config = AnswerConfig {
        max_length: engine.model.config.max_position_embeddings,
        pass_tokens,
        batch: 3,
        end_ids: tokenizer.end_ids().to_vec(),
        seed: 0,
        thought_end: None,
    };
    let requests = TaskRequests::new(tokenizer, task, &items.items, config).unwrap();
    let answers = requests
        .answer(engine, tokenizer, &mut (), &mut |_, _| {})
        .unwrap();
    let counts = (task.fewshot_count(None), items.n_rows);
    let result = TaskResult::new(task, &items.items, counts, answers).unwrap();
    (items.items, result)
}

/// Compares the answers to an item with those of the harness.
fn same_answers(found: &[Answer], expected: &Value, what: &str) {
    let expected = expected.as_array().unwrap();
    // The harness keeps the first of repeated answers.
    assert!(
        found.len() >= expected.len() && !expected.is_empty(),
        "{what}"
    );
    for (found, expected) in found.iter().zip(expected) {
        match (found, expected) {
            (Answer::Text(text), expected) => assert_eq!(text, expected, "{what}"),
            (Answer::Likelihood { logprob, is_greedy }, Value::Array(expected)) => {
                let difference = (logprob - expected[0].as_f64().unwrap()).abs();
                assert!(difference < LOGPROB, "{what}: {logprob}, not {expected:?}");
                assert_eq!(*is_greedy, expected[1], "{what}");
            }
            // Of a whole text.
            (Answer::Likelihood { logprob, .. }, expected) => {
                let difference = (logprob - expected.as_f64().unwrap()).abs();
                assert!(difference < LOGPROB, "{what}: {logprob}, not {expected}");
            }
        }
    }
}

fn same_metrics(result: &TaskResult, expected: &Value, what: &str) {
    let expected = expected.as_object().unwrap();
    let close = |found: Option<f64>, key: String, tolerance: f64| {
        let Some(number) = expected.get(&key).expect(&key).as_f64() else {
            assert_eq!(
                (found, &expected[&key]),
                (None, &"N/A".into()),
                "{what} {key}"
            );
            return;
        };
        let difference = (found.unwrap() - number).abs() / number.abs().max(1.0);
        assert!(
            difference < tolerance,
            "{what} {key}: {found:?}, not {number}"
        );
    };
    // The standard error of F1 takes the harness too long.
    let has_errors = result.task != "labels";
    for metric in &result.metrics {
        let (name, filter) = (metric.metric.name(), &metric.filter);
        close(Some(metric.value), format!("{name},{filter}"), METRIC);
        if has_errors {
            let key = format!("{name}_stderr,{filter}");
            close(metric.standard_error, key, ERROR);
        }
    }
    let numbers = if has_errors { 2 } else { 1 };
    assert_eq!(numbers * result.metrics.len(), expected.len(), "{what}");
}

/// Compares everything about a task that the harness was asked too.
fn same_task(
    model: (&mut Engine, &Arc<Tokenizer>),
    task: &TaskDefinition,
    chat: &TaskChat<'_>,
    expected: &Value,
    what: &str,
) {
    let (engine, tokenizer) = model;
    // Passes of one request, and of many that share their beginnings.
    for pass_tokens in [1, 1000] {
        let (items, result) = run(engine, tokenizer, task, pass_tokens, chat);
        let answers = expected["answers"].as_array().unwrap();
        let hashes = expected["hashes"].as_array().unwrap();
        assert_eq!(answers.len(), items.len() * task.filters.len(), "{what}");
        for (number, item) in items.iter().enumerate() {
            let found = &result.answers.of_items[number];
            same_answers(found, &answers[number], &format!("{what} {number}"));
            let found = [item.prompt_hash(task.output), item.target_hash()];
            assert_eq!(serde_json::json!(found), hashes[number], "{what} {number}");
        }
        same_metrics(&result, &expected["metrics"], what);
        assert!(result.answers.read <= result.answers.asked);
    }
}

#[test]
fn answers_and_metrics_are_those_of_the_harness() {
    let golden = std::fs::read_to_string(folder().join("scored.json")).unwrap();
    let golden: Value = serde_json::from_str(&golden).unwrap();
    let index = TaskIndex::open(&folder()).unwrap();
    let source = std::fs::read_to_string(folder().join("chat_template.jinja")).unwrap();
    for (name, tasks) in golden.as_object().unwrap() {
        let path = goldens::path(name.trim_end_matches(" chat"));
        let mut engine = Engine::open(&path, Compute::F32, Device::flex()).unwrap();
        let tokenizer = Arc::new(Tokenizer::open(&path).unwrap());
        let token = |id: Option<u32>| tokenizer.decode(&[id.unwrap()], Special::Keep).unwrap();
        let tokens = [
            ("bos_token", tokenizer.bos_id()),
            ("eos_token", tokenizer.eos_id()),
        ];
        let tokens = tokens.map(|(name, id)| (name.to_owned(), token(id).into()));
        let template = ChatTemplate::new(&source, tokens.into()).unwrap();
        let is_chat = name.ends_with(" chat");
        let chat = TaskChat {
            template: is_chat.then_some(&template),
            system: is_chat.then_some("Answer well."),
            ..TaskChat::default()
        };
        let tasks = tasks.as_object().unwrap();
        assert_eq!(index.names().count(), tasks.len());
        for (task, expected) in tasks {
            let what = format!("{name} {task}");
            let task = index.task(task).unwrap();
            same_task((&mut engine, &tokenizer), &task, &chat, expected, &what);
        }
    }
}
