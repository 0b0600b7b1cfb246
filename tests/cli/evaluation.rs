//! `moeforge eval`: tasks of the evaluation harness, the files they leave, gates, and what is refused.

use std::path::Path;
use std::process::Stdio;
use std::time::Duration;

use serde_json::Value;
use tempfile::TempDir;

use super::{command, golden, moeforge, moeforge_in};

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

/// An evaluation of all kinds of work in a folder, a pass for each request.
fn evaluation(folder: &Path) -> Vec<String> {
    let names = ["mapped", "answers", "rolling", "lambada_like"];
    let tasks: Vec<String> = names.map(task).to_vec();
    let data = folder.join("rows");
    std::fs::create_dir(&data).unwrap();
    let row = |n: usize| format!("{{\"text\": \"The sum of {n} and {n} is {}.\"}}\n", 2 * n);
    std::fs::write(
        data.join("test.jsonl"),
        (0..12).map(row).collect::<String>(),
    )
    .unwrap();
    let adapter = golden("deepseek_v3/adapter_peft").display().to_string();
    let words = [
        "eval",
        &model(),
        "--adapter",
        &adapter,
        "--data",
        "rows",
        "--tasks",
        &tasks.join(","),
        "--batch",
        "1",
    ];
    let gate = ["--gate", "mapped acc >= base - 0.9", "--out", "out"];
    words
        .iter()
        .chain(&gate)
        .map(|word| (*word).to_owned())
        .collect()
}

/// The files in a folder, without answers and without files that a killed program was writing.
fn files(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(place) = folders.pop() {
        for entry in std::fs::read_dir(&place).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() && !path.ends_with("answers") {
                folders.push(path);
            } else if path.is_file() && path.extension().is_none_or(|kind| kind != "tmp") {
                let name = path.strip_prefix(folder).unwrap().display().to_string();
                found.push((name, std::fs::read(&path).unwrap()));
            }
        }
    }
    found.sort();
    found
}

/// Starts an evaluation and kills it when there are some more answers than before; whether it had not ended by then.
fn kill_after(more: usize, folder: &Path, words: &[&str]) -> bool {
    let before = kept_answers(folder);
    let mut command = command(words);
    command.current_dir(folder);
    let command = command.stderr(Stdio::null()).stdout(Stdio::null());
    let mut child = command.spawn().unwrap();
    while kept_answers(folder) < before + more && child.try_wait().unwrap().is_none() {
        std::thread::sleep(Duration::from_millis(1));
    }
    child.kill().unwrap();
    child.wait().unwrap().code().is_none()
}

/// The lines in all files of answers.
fn kept_answers(folder: &Path) -> usize {
    let entries = std::fs::read_dir(folder.join("out/answers"));
    let entries = entries.into_iter().flatten();
    let texts = entries.map(|entry| std::fs::read(entry.unwrap().path()).unwrap());
    texts
        .map(|text| text.iter().filter(|byte| **byte == b'\n').count())
        .sum()
}

#[test]
fn a_killed_evaluation_goes_on_and_ends_with_the_same_bytes() {
    let (whole, killed) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
    let words = evaluation(whole.path());
    evaluation(killed.path());
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let output = moeforge_in(whole.path(), &words);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");

    // Each goes on from those before it. Some end before the first answer.
    let mut kills = 0;
    for kill in 0..20 {
        let before = kept_answers(killed.path());
        if !kill_after(kill * 7 % 5, killed.path(), &words) {
            break;
        }
        kills += 1;
        assert!(kept_answers(killed.path()) >= before);
    }
    let (n_kept, n_answers) = (kept_answers(killed.path()), kept_answers(whole.path()));
    assert!(
        kills > 3 && n_kept > 3,
        "{kills} kills, {n_kept} of {n_answers} answers"
    );
    if !killed.path().join("out/evidence.json").is_file() {
        let output = moeforge_in(killed.path(), &words);
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{stderr}");
    }
    let [expected, found] = [&whole, &killed].map(|place| files(&place.path().join("out")));
    assert!(expected.len() > 10, "{}", expected.len());
    for (expected, found) in expected.iter().zip(&found) {
        assert!(expected == found, "{}, {}", expected.0, found.0);
    }
    assert_eq!(expected.len(), found.len());
}

#[test]
fn kept_answers_serve_another_evaluation() {
    let place = tempfile::tempdir().unwrap();
    let words = evaluation(place.path());
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    assert!(moeforge_in(place.path(), &words).status.success());
    let n_answers = kept_answers(place.path());
    let others = ["other", "--answers", "out/answers"];
    let again = [&words[..words.len() - 1], &others].concat();
    assert!(moeforge_in(place.path(), &again).status.success());
    assert_eq!(kept_answers(place.path()), n_answers);
    let report = |folder: &str| std::fs::read(place.path().join(folder).join("report.json"));
    assert!(report("out").unwrap() == report("other").unwrap());
}

/// The exit code of a check of evidence, and what it says.
fn check(folder: &Path) -> (i32, String) {
    let output = moeforge_in(folder, &["eval", "--check", "out/evidence.json"]);
    let text = String::from_utf8(output.stdout).unwrap();
    (output.status.code().unwrap(), text)
}

#[test]
fn evidence_shows_what_was_changed() {
    let place = tempfile::tempdir().unwrap();
    let words = evaluation(place.path());
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    assert!(moeforge_in(place.path(), &words).status.success());
    let (code, text) = check(place.path());
    let is_whole = text.ends_with("files and all numbers are as stated\n");
    assert!(code == 0 && is_whole, "{text}");

    let changed = |name: &str, from: &str, to: &str| {
        let path = place.path().join(name);
        let before = std::fs::read_to_string(&path).unwrap();
        assert!(before.contains(from), "{name}: {from}");
        std::fs::write(&path, before.replacen(from, to, 1)).unwrap();
        let (code, text) = check(place.path());
        std::fs::write(&path, before).unwrap();
        assert_eq!(code, 4, "{name}: {text}");
        text
    };
    let text = changed("rows/test.jsonl", "sum", "Sum");
    let is_found = text.starts_with("rows/test.jsonl: expected SHA-256 ");
    assert!(is_found && text.lines().count() == 1, "{text}");
    let samples = "deepseek_v3/samples_mapped.jsonl";
    let text = changed(&format!("out/{samples}"), "doc_id", "Doc_id");
    let is_found = text.starts_with(&format!("{samples}: expected SHA-256 "));
    assert!(is_found, "{text}");
    let [passed, failed] = ["passed", "failed"].map(|it| format!("\"verdict\": \"{it}\""));
    let text = changed("out/report.json", &passed, &failed);
    for expected in [
        "report.json: expected SHA-256 ",
        "report.json: gates[0].verdict: stated \"failed\", computed \"passed\"",
        "evidence.json: expected `found` to be what `report.json` says",
    ] {
        assert!(text.contains(expected), "{text}");
    }
    let text = changed(
        "out/evidence.json",
        "\"task\": \"answers\"",
        "\"task\": \"other\"",
    );
    assert!(
        text.contains("expected files of the models and tasks"),
        "{text}"
    );
    let text = changed("out/evidence.json", &passed, &failed);
    assert!(
        text.starts_with("evidence.json: expected `found`"),
        "{text}"
    );
    std::fs::remove_file(place.path().join("out/report.txt")).unwrap();
    let expected = "report.txt: expected a file, found none\n";
    assert_eq!(check(place.path()), (4, expected.to_owned()));
}

#[test]
fn evidence_shows_what_was_added_to_a_model() {
    let place = tempfile::tempdir().unwrap();
    let copy = place.path().join("copy");
    std::fs::create_dir(&copy).unwrap();
    for file in std::fs::read_dir(golden("deepseek_v3")).unwrap() {
        let file = file.unwrap().path();
        if file.is_file() {
            std::fs::copy(&file, copy.join(file.file_name().unwrap())).unwrap();
        }
    }
    let task = task("mapped");
    let words = [
        "eval",
        "copy",
        "--tasks",
        &task,
        "--max-samples",
        "1",
        "--out",
        "out",
    ];
    assert!(moeforge_in(place.path(), &words).status.success());
    assert_eq!(check(place.path()).0, 0);
    std::fs::write(copy.join("chat_template.jinja"), "x").unwrap();
    let expected = "copy/chat_template.jinja: expected no file, found one\n";
    assert_eq!(check(place.path()), (4, expected.to_owned()));
}

#[test]
fn evidence_that_is_none_is_refused() {
    let place = tempfile::tempdir().unwrap();
    let refused = |text: &str| {
        std::fs::write(place.path().join("other.json"), text).unwrap();
        let output = moeforge_in(place.path(), &["eval", "--check", "other.json"]);
        assert_eq!(output.status.code(), Some(1));
        String::from_utf8(output.stderr).unwrap()
    };
    assert!(refused("[").starts_with("error: `other.json`: expected JSON: "));
    assert!(refused("{}").starts_with("error: `other.json`: expected evidence of `eval`: "));
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

#[test]
fn the_bundled_tasks_run_by_one_name() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out");
    let words = [
        "eval",
        "recipes/quickstart/base",
        "--include-path",
        "datasets",
        "--tasks",
        "moeforge_small",
        "--max-samples",
        "2",
        "--out",
        out.to_str().unwrap(),
    ];
    let output = moeforge(&words);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let results = std::fs::read_to_string(out.join("base/results.json")).unwrap();
    let results: Value = serde_json::from_str(&results).unwrap();
    let numbers = [
        ("factbook_choice", "acc_norm,none"),
        ("factbook_answer", "exact_match,value"),
        ("shakespeare_cloze", "perplexity,none"),
        ("shakespeare_rolling", "bits_per_byte,none"),
        ("small_addition", "exact_match,number"),
        ("small_subtraction", "exact_match,number"),
        ("small_multiplication", "exact_match,number"),
        ("small_arithmetic", "exact_match,number"),
    ];
    for (task, number) in numbers {
        let found = &results["results"][task][number];
        assert!(found.is_number(), "{task} {number}: {found}");
    }
    assert_eq!(results["n-samples"]["factbook_choice"]["original"], 400);
    assert_eq!(results["n-shot"]["small_addition"], 5);
}

#[test]
fn tasks_are_asked_in_conversations() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out");
    let tasks = "datasets/factbook/factbook_answer.yaml";
    let base = [
        "eval",
        "recipes/quickstart/base",
        "--tasks",
        tasks,
        "--max-samples",
        "1",
    ];
    let run = |more: &[&str]| moeforge(&[&base[..], &["--num-fewshot", "1"], more].concat());
    let words = [
        "--chat-template",
        "--system",
        "Be short.",
        "--out",
        out.to_str().unwrap(),
    ];
    let output = run(&words);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let sample = &lines(&out.join("base/samples_factbook_answer.jsonl"))[0];
    let tokenizer = std::fs::read_to_string("recipes/quickstart/tokenizer/tokenizer_config.json");
    let tokenizer: Value = serde_json::from_str(&tokenizer.unwrap()).unwrap();
    let prompt = sample["arguments"]["gen_args_0"]["arg_0"].as_str().unwrap();
    for part in ["Be short.", "<｜User｜>", "<｜Assistant｜>"] {
        assert!(prompt.contains(part), "{prompt} {tokenizer}");
    }
    assert_eq!(prompt.matches("<｜Assistant｜>").count(), 2, "{prompt}");

    let refused = |words: &[&str], expected: &str| {
        let output = moeforge(words);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert!(
            !output.status.success() && stderr.contains(expected),
            "{stderr}"
        );
    };
    let mapped = task("mapped");
    let plain = ["eval", &model(), "--tasks", &mapped, "--chat-template"];
    refused(&plain, "deepseek_v3: expected a chat template, found none");
    let thoughts = [&plain[..], &["--think"]].concat();
    refused(
        &thoughts,
        "--think: expected a task with written answers, found `mapped`",
    );
    refused(
        &["eval", &model(), "--tasks", &mapped, "--think"],
        "--chat-template",
    );
}

#[test]
fn what_could_not_be_told_apart_or_has_no_effect_is_refused() {
    let place = tempfile::tempdir().unwrap();
    for folder in ["a", "b"] {
        std::fs::create_dir(place.path().join(folder)).unwrap();
        let file = place.path().join(folder).join("test.jsonl");
        std::fs::copy("datasets/factbook/choices.jsonl", file).unwrap();
    }
    let refused = |words: &[&str], code: i32, expected: &str| {
        let output = moeforge_in(place.path(), words);
        let stderr = String::from_utf8(output.stderr).unwrap();
        assert_eq!(output.status.code(), Some(code), "{stderr}");
        assert!(stderr.contains(expected), "{stderr}");
    };
    let rows = ["eval", "no/model", "--tasks", "a/test.jsonl"];
    let two = ["eval", "no/model", "--tasks", "a/test.jsonl,b/test.jsonl"];
    refused(&two, 1, "two called `test`");
    for option in [
        &["--system", "x"][..],
        &["--num-fewshot", "1"],
        &["--chat-template"],
    ] {
        let expected = format!("{}: expected a task of lm-evaluation-harness", option[0]);
        refused(&[&rows[..], option].concat(), 2, &expected);
    }
    refused(
        &["eval", "--check", "e.json", "--max-samples", "3"],
        2,
        "--max-samples",
    );
    let gate = ["--gate", "test acc,valu >= 0.5"];
    let expected = "found the metric `acc`; there are acc,none, acc_bytes,none, acc_norm,none";
    refused(&[&rows[..], &gate].concat(), 2, expected);
}

#[test]
fn models_of_one_name_are_numbered() {
    let place = tempfile::tempdir().unwrap();
    let (model, task, out) = (model(), task("mapped"), place.path().join("out"));
    let words = [
        "eval",
        &model,
        &model,
        &model,
        "--tasks",
        &task,
        "--max-samples",
        "1",
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
    assert!(table.contains("deepseek_v3__3  deepseek_v3 "), "{table}");
    for name in ["deepseek_v3", "deepseek_v3__2", "deepseek_v3__3"] {
        assert!(out.join(name).join("results.json").is_file());
    }
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
