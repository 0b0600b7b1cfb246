//! `moeforge eval`: tasks of the evaluation harness, the files they leave, gates, and what is refused.

use std::path::Path;

use serde_json::Value;
use tempfile::TempDir;

use super::{golden, moeforge};

fn task(name: &str) -> String {
    golden(&format!("harness_tasks/{name}.yaml"))
        .display()
        .to_string()
}

fn model() -> String {
    golden("deepseek_v3").display().to_string()
}

fn lines(path: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(path).unwrap();
    text.lines()
        .map(|line| serde_json::from_str(line).unwrap())
        .collect()
}

#[test]
fn tasks_leave_the_files_of_the_harness() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out");
    let tasks = [task("mapped"), task("answers")].join(",");
    let words = [
        "eval",
        &model(),
        "--tasks",
        &tasks,
        "--max-samples",
        "2",
        "--out",
        out.to_str().unwrap(),
    ];
    let output = moeforge(&words);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let table = String::from_utf8(output.stdout).unwrap();
    assert!(
        table.contains("mapped   none    0       acc_mutual_info  ↑"),
        "{table}"
    );

    let results = std::fs::read_to_string(out.join("deepseek_v3/results.json")).unwrap();
    let results: Value = serde_json::from_str(&results).unwrap();
    assert_eq!(results["results"]["mapped"]["sample_len"], 2);
    assert!(results["results"]["mapped"]["acc_stderr,none"].is_number());
    assert_eq!(results["results"]["answers"]["exact_match,mapped"], 0.5);
    assert_eq!(results["n-samples"]["mapped"]["original"], 16);

    let samples = lines(&out.join("deepseek_v3/samples_mapped.jsonl"));
    assert_eq!(samples.len(), 2);
    assert_eq!(samples[1]["doc"]["question"], "What is 0 + 1?");
    assert_eq!(samples[1]["arguments"]["gen_args_1"]["arg_1"], "B");
    assert_eq!(samples[1]["resps"].as_array().unwrap().len(), 4);
    assert_eq!(samples[1]["resps"][0][0][1], "False");
    // An item and filter each.
    let samples = lines(&out.join("deepseek_v3/samples_answers.jsonl"));
    assert_eq!(samples.len(), 4);
    assert_eq!(
        (&samples[2]["filter"], &samples[2]["filtered_resps"][0]),
        (&"mapped".into(), &"Y".into())
    );
    assert_eq!(samples[2]["exact_match"], 1.0);

    let again = moeforge(&words);
    assert!(!again.status.success());
}

#[test]
fn a_gate_decides_the_exit_code() {
    let (model, task) = (model(), task("mapped"));
    let code = |words: &[&str]| {
        let words = [&["eval", &model, "--tasks", &task], words].concat();
        let output = moeforge(&words);
        (
            output.status.code().unwrap(),
            String::from_utf8(output.stdout).unwrap(),
        )
    };
    let base = ["--baseline", &model];
    let gate = |gate: &'static str| ["--gate", gate];
    assert_eq!(code(&gate("mapped acc >= 0.0")).0, 0);
    let (failed, text) = code(&gate("mapped acc >= 1.0"));
    assert!(
        failed == 3 && text.contains("gate `mapped acc >= 1.0`, deepseek_v3: failed"),
        "{text}"
    );
    let open = [&base[..], &gate("mapped acc >= base + 0.01")].concat();
    let (inconclusive, text) = code(&open);
    assert!(
        inconclusive == 3 && text.contains(": inconclusive;"),
        "{text}"
    );
    assert_eq!(code(&[&open[..], &["--allow-inconclusive"]].concat()).0, 0);
    assert_eq!(code(&gate("mapped acc >= base")).0, 2);
    assert_eq!(code(&gate("other acc >= 1")).0, 2);
    assert_eq!(code(&gate("mapped acc > 1")).0, 2);
}

/// What is said of a task and its rows; the model does not even exist.
fn problem(place: &TempDir, task: &str, rows: &str) -> String {
    std::fs::write(place.path().join("task.yaml"), task).unwrap();
    std::fs::write(place.path().join("rows.jsonl"), rows).unwrap();
    let file = place.path().join("task.yaml");
    let output = moeforge(&["eval", "no/model", "--tasks", file.to_str().unwrap()]);
    assert_eq!(
        (output.status.code(), output.stdout.as_slice()),
        (Some(1), &b""[..])
    );
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert_eq!(stderr.lines().count(), 1, "{stderr}");
    stderr
        .trim_end()
        .replace(&place.path().display().to_string(), "DIR")
}

#[test]
fn malformed_tasks_are_refused_in_one_sentence_before_a_model_is_opened() {
    let place = tempfile::tempdir().unwrap();
    let task = |more: &str| {
        format!(
            "task: t\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: rows.jsonl}}}}\ntest_split: test\noutput_type: multiple_choice\ndoc_to_text: \"{{{{q}}}}\"\ndoc_to_target: a\ndoc_to_choice: [x, y]\n{more}"
        )
    };
    let row = "{\"q\": \"?\", \"a\": 0}\n";
    let rows = row.repeat(17);
    for (more, rows, expected) in [
        (
            "",
            "",
            "error: DIR/task.yaml: DIR/rows.jsonl: expected at least one row, found none"
                .to_owned(),
        ),
        (
            "metric: acc\n",
            &*rows,
            "error: DIR/task.yaml:9: expected a known key".to_owned(),
        ),
        (
            "test_split: other\n",
            &rows,
            "error: DIR/task.yaml: expected a split `other` in `data_files`, found `test`"
                .to_owned(),
        ),
        (
            "include: task.yaml\n",
            &rows,
            "error: DIR/task.yaml:9: expected at most 64 files, each once,".to_owned(),
        ),
        (
            "",
            &format!("{rows}{{\"q\": \"?\", \"a\": 2}}\n"),
            "error: DIR/task.yaml, row 17: expected a target among 2 choices, found `2`".to_owned(),
        ),
        (
            "description: \"{{b}}\"\n",
            &rows,
            "error: DIR/task.yaml, row 0: ".to_owned(),
        ),
        (
            "filter_list: [{name: n, filter: [{function: lowercase}, {function: take_first}]}]\n",
            &rows,
            "error: DIR/task.yaml: filter `n`: expected `take_first` for answers without a text"
                .to_owned(),
        ),
        (
            "",
            "{\"p\": 1, \"a\": 0}\n",
            "error: DIR/task.yaml, row 0: ".to_owned(),
        ),
    ] {
        let found = problem(&place, &task(more), rows);
        assert!(found.starts_with(&expected), "{found}\n{expected}");
    }
}

#[test]
fn unknown_tasks_and_those_of_one_name_are_refused() {
    let place = tempfile::tempdir().unwrap();
    let names = [
        golden("harness_tasks"),
        golden("harness_tasks/arc_like.yaml"),
    ];
    let names = names.map(|path| path.display().to_string()).join(",");
    let other = place.path().join("task.yaml");
    std::fs::copy(golden("harness_tasks/arc_like.yaml"), &other).unwrap();
    let twice = format!("{names},{}", other.display());
    let output = moeforge(&["eval", "no/model", "--tasks", &twice]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.contains("expected tasks of different names, found `arc_like` twice"),
        "{stderr}"
    );
    let output = moeforge(&["eval", "no/model", "--tasks", "mmlu"]);
    let stderr = String::from_utf8(output.stderr).unwrap();
    assert!(
        stderr.contains("give the folder that has it with --include-path"),
        "{stderr}"
    );
}
