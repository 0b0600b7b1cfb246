//! Task files that are refused, and how many of the harness's own are read.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

use std::collections::BTreeMap;
use std::path::Path;

use moeforge_data::{
    Error, FewshotPool, QuestionMaker, TaskChat, TaskDefinition, TaskIndex, TaskRow,
};
use tempfile::TempDir;

/// A task that is right.
const RIGHT: &str = "task: t\ndataset_path: json\ndataset_kwargs: {data_files: rows.jsonl}\ntest_split: train\n\
                     output_type: multiple_choice\ndoc_to_text: \"{{q}}\"\ndoc_to_target: a\ndoc_to_choice: [x, y]\n";

/// A folder with files.
fn folder(files: &[(&str, &str)]) -> TempDir {
    let folder = tempfile::tempdir().unwrap();
    for (name, text) in files {
        std::fs::write(folder.path().join(name), text).unwrap();
    }
    folder
}

/// The error of a task file, without its folder.
fn refused(text: &str) -> String {
    let folder = folder(&[("t.yaml", text)]);
    let problem = TaskDefinition::open(&folder.path().join("t.yaml")).unwrap_err();
    without(&problem, folder.path())
}

fn without(problem: &Error, folder: &Path) -> String {
    problem
        .to_string()
        .replace(&format!("{}/", folder.display()), "")
}

#[test]
fn what_is_not_known_is_refused_with_its_line_and_key() {
    assert!(TaskDefinition::open(&folder(&[("t.yaml", RIGHT)]).path().join("t.yaml")).is_ok());
    for (line, problem) in [
        (
            "fewshot_spilt: train",
            "t.yaml:9: expected a known key, such as `fewshot_split`, ",
        ),
        (
            "process_docs: !function utils.f",
            "t.yaml:9: expected a known function of rows as `process_docs`, found `!function utils.f`: Python is not run, and",
        ),
        (
            "num_fewshot: many",
            "t.yaml:9: expected a whole number from 0 as `num_fewshot`, found `many`",
        ),
        (
            "metric_list: [{metric: bleu}]",
            "acc_mutual_info, exact_match, f1, mcc as `metric_list[0].metric`, found `bleu`",
        ),
        (
            "metric_list: [{metric: acc, odd: 1}]",
            "found `metric_list[0].odd`",
        ),
        (
            "filter_list: [{name: n, filter: [{function: regex, regex_pattern: \"(\"}]}]",
            "t.yaml:9: expected a regular expression as `filter_list[0].filter[0].regex_pattern`, found",
        ),
        (
            "description: \"{% if %}\"",
            "t.yaml:9: expected a template as `description`, found syntax error",
        ),
        (
            "fewshot_config: {sampler: balanced}",
            "expected one of default, first_n as `fewshot_config.sampler`, found `balanced`",
        ),
        (
            "generation_kwargs: {until: []}",
            "t.yaml:9: expected nothing without `output_type: generate_until` as `generation_kwargs`",
        ),
        (
            "unsafe_code: true",
            "expected false as `unsafe_code`, found true: answers are not run",
        ),
        ("a: [", "t.yaml:"),
        (
            "x: &x [*x]",
            "t.yaml:9: expected YAML, found an anchor that is named inside of its own value",
        ),
    ] {
        let found = refused(&format!("{RIGHT}{line}\n"));
        assert!(
            found.contains(problem) && !found.contains('\n'),
            "{line}: {found}"
        );
    }
    let without_choice = RIGHT.replace("doc_to_choice: [x, y]\n", "");
    assert_eq!(
        refused(&without_choice),
        "t.yaml: expected `doc_to_choice`, found none"
    );
}

#[test]
fn includes_and_names_are_followed_no_further_than_they_lead() {
    let cyclic = folder(&[
        ("a.yaml", "include: b.yaml\ntask: a\n"),
        ("b.yaml", "include: a.yaml\n"),
    ]);
    let problem = TaskDefinition::open(&cyclic.path().join("a.yaml")).unwrap_err();
    assert_eq!(
        without(&problem, cyclic.path()),
        "b.yaml:1: expected at most 64 files, each once, as `include`, found `a.yaml`"
    );
    let absent = folder(&[("a.yaml", "include: gone.yaml\ntask: a\n")]);
    let problem = TaskDefinition::open(&absent.path().join("a.yaml")).unwrap_err();
    assert!(
        without(&problem, absent.path()).starts_with("gone.yaml: cannot read"),
        "{problem}"
    );
    let twice = folder(&[("a.yaml", RIGHT), ("b.yaml", RIGHT)]);
    let problem = TaskIndex::open(twice.path()).unwrap_err();
    assert_eq!(
        without(&problem, twice.path()),
        "b.yaml:1: expected a name of its own as `task`, found `t`, which `a.yaml` defines too"
    );
}

#[test]
fn rows_that_a_task_does_not_fit_are_refused() {
    let folder = folder(&[("t.yaml", RIGHT)]);
    let task = TaskDefinition::open(&folder.path().join("t.yaml")).unwrap();
    let row = |text: &str| TaskRow::new(serde_json::from_str(text).unwrap());
    let ask = |text: &str, count: usize| {
        let chat = TaskChat::default();
        let pool = FewshotPool::new(vec![row("{\"q\": \"r\", \"a\": 7}")], false);
        let mut maker = QuestionMaker::new(&task, pool, count, &chat);
        maker
            .question(&row(text))
            .map_err(|problem| problem.to_string())
    };
    assert!(ask("{\"q\": \"w\", \"a\": 1}", 0).is_ok());
    for (text, count, problem) in [
        ("{\"a\": 1}", 0, "'q' is undefined"),
        ("{\"q\": \"w\", \"a\": {}}", 0, "expected a text, found"),
        (
            "{\"q\": \"w\", \"a\": 1}",
            2,
            "expected at least 2 rows to take examples from, found 1",
        ),
        (
            "{\"q\": \"w\", \"a\": 1}",
            1,
            "expected the number of one of 2 choices, found `7`",
        ),
    ] {
        let found = ask(text, count).unwrap_err();
        assert!(found.contains(problem), "{text}: {found}");
    }
}

/// Tasks of the harness, version 0.4.13, that need no Python.
const DECLARATIVE: usize = 4537;

/// The harness's own tasks: `MOEFORGE_HARNESS=…/lm_eval/tasks cargo test -p moeforge-data --test tasks`. Why the others are
/// refused is in `moeforge-census.txt`, in the folder for temporary files.
#[test]
fn declarative_tasks_of_the_harness_are_read() {
    let Some(folder) = std::env::var_os("MOEFORGE_HARNESS") else {
        return;
    };
    let index = TaskIndex::open(Path::new(&folder)).unwrap();
    let (mut read, mut refusals) = (0, BTreeMap::<String, usize>::new());
    for name in index.names() {
        let Err(problem) = index.task(name) else {
            read += 1;
            continue;
        };
        let text = problem.to_string();
        let reason = match text.split_once(": ") {
            _ if text.contains("Python") => "needs Python",
            Some((_, reason)) => reason,
            None => &text,
        };
        *refusals.entry(reason.to_owned()).or_default() += 1;
    }
    let report = format!("{read} tasks are read; the others: {refusals:#?}\n");
    std::fs::write(std::env::temp_dir().join("moeforge-census.txt"), &report).unwrap();
    assert!(read as f64 >= 0.95 * DECLARATIVE as f64, "{report}");
}
