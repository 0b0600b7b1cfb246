//! `moeforge data check`, `train` and the verbs about runs: what they refuse, leave behind and compare.

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};
use std::time::Duration;

use tempfile::TempDir;

use super::{Broken, command, golden, moeforge, refused};

/// A recipe over the golden model, and data in files of its own.
fn recipe(place: &TempDir, train: &str, row: &str) -> String {
    std::fs::write(place.path().join("train.jsonl"), row).unwrap();
    let recipe = place.path().join("recipe.toml");
    let text = format!(
        "[model]\npath = {:?}\n[data]\npath = {:?}\n{train}",
        golden("deepseek_v3"),
        place.path()
    );
    std::fs::write(&recipe, text).unwrap();
    recipe.to_string_lossy().into_owned()
}

#[test]
fn wrong_recipes_and_rows_are_refused_in_one_sentence() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("run").to_string_lossy().into_owned();
    let good = "{\"input_ids\": [1, 2, 3]}\n";
    let cases = [
        (
            "[train]\nmethod = \"lora\"\nbatchsize = 2\n",
            good,
            2,
            vec!["recipe.toml", "batchsize", "batch_size"],
        ),
        (
            "[lora]\ntarget = [\"q_b_prj\"]\n",
            good,
            1,
            vec!["q_b_prj", "q_b_proj"],
        ),
        (
            "",
            "{\"input_ids\": [1, 2, 3]}\n{\"input_ids\": [1, 2,\n",
            1,
            vec!["train.jsonl:2"],
        ),
        (
            "",
            "{\"input_ids\": [1, 2, 999]}\n",
            1,
            vec!["train.jsonl:1", "999"],
        ),
        ("", "{\"txt\": \"a\"}\n", 1, vec!["train.jsonl:1", "txt"]),
    ];
    for (train, row, code, words) in cases {
        let recipe = recipe(&place, train, row);
        refused(&moeforge(&["train", &recipe, "--out", &out]), code, &words);
        let _ = std::fs::remove_dir_all(&out);
    }
}

/// Forty rows over which a small model learns something.
fn forty_rows() -> String {
    let row = |i: i32| (0..30).map(|j| (i * 7 + j * j) % 280).collect::<Vec<_>>();
    (0..40)
        .map(|i| format!("{{\"input_ids\": {:?}}}\n", row(i)))
        .collect()
}

/// What `data check` prints for a folder or a file, and whether it succeeds.
fn checked(data: &Path, options: &[&str]) -> (bool, String) {
    let (data, model) = (data.to_string_lossy(), golden("deepseek_v2_lite"));
    let model = model.to_string_lossy();
    let words = ["data", "check", &data, "--model", &model];
    let words = [&words[..], options].concat();
    let output = moeforge(&words);
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.success(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

#[test]
fn tables_are_checked_as_folders_and_files() {
    let place = tempfile::tempdir().unwrap();
    let write = |file: &str, text: &str| std::fs::write(place.path().join(file), text).unwrap();
    write("train.csv", "question,answer,source\n1+1=,2,web\n2+2=,4,\n");
    write(
        "val.json",
        "[{\"prompt\": \"3+3=\", \"completion\": \"6\", \"text\": null}]",
    );
    write("notes.csv", "");
    let (is_ok, text) = checked(place.path(), &[]);
    assert!(
        !is_ok && text.contains("train.csv:2: expected one of the rows"),
        "{text}"
    );
    assert!(
        text.contains(
            "`data.columns = { prompt = \"question\", completion = \"answer\" }` reads them"
        ),
        "{text}"
    );
    std::fs::remove_file(place.path().join("val.json")).unwrap();
    let columns = ["--columns", "prompt=question,completion=answer"];
    for data in [place.path().to_owned(), place.path().join("train.csv")] {
        let (is_ok, text) = checked(&data, &columns);
        assert!(is_ok && text.contains("2+2=«4"), "{text}");
        assert!(
            text.contains("ignored keys in rows: source (1 row)"),
            "{text}"
        );
        assert_eq!(text.contains("notes.csv"), data.is_dir(), "{text}");
    }
    write("train.parquet", "");
    let (is_ok, text) = checked(place.path(), &columns);
    assert!(
        !is_ok
            && text.contains("expected one training split, found `train.csv` and `train.parquet`"),
        "{text}"
    );
}

#[test]
fn data_is_checked_counted_and_shown() {
    let place = tempfile::tempdir().unwrap();
    let write = |file: &str, rows: &[&str]| {
        std::fs::write(place.path().join(file), rows.join("\n")).unwrap();
    };
    let chat = r#"{"messages": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "yo"}]}"#;
    let long = r#"{"input_ids": [5, 6, 7, 8, 9, 10, 11, 12, 13, 14]}"#;
    let masked = r#"{"input_ids": [5, 6], "labels": [5, -100], "id": 3}"#;
    write("train.jsonl", &[long, masked, long]);
    write(
        "valid.jsonl",
        &[r#"{"prompt": "a", "chosen": "b", "rejected": "c"}"#, long],
    );
    let (dir, model) = (place.path().to_string_lossy(), golden("deepseek_v3"));
    let model = model.to_string_lossy();
    let words = [
        "data",
        "check",
        &dir,
        "--model",
        &model,
        "--max-length",
        "8",
    ];
    let output = moeforge(&words);
    let stdout = String::from_utf8_lossy(&output.stdout);
    assert!(output.status.success(), "{output:?}");
    for expected in [
        "train.jsonl: 1 sample occurs earlier in train.jsonl; the first is sample 3, equal to sample 1 there",
        "valid.jsonl: 1 sample occurs earlier in train.jsonl; the first is sample 3, equal to sample 1 there",
        "train.jsonl, sample 1, truncated:",
        "«",
    ] {
        assert!(stdout.contains(expected), "{stdout}");
    }
    assert!(!stdout.contains('\u{1b}'), "{stdout}");
    assert!(String::from_utf8_lossy(&output.stderr).contains("ignored keys in rows: id"));

    let output = moeforge(&[&words[..], &["--json"]].concat());
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let train = &found["files"][0];
    assert_eq!(train["counts"]["truncated_rows"], 2, "{found}");
    assert_eq!(train["counts"]["untrained_samples"], 1, "{found}");
    assert_eq!(train["survey"]["lengths"]["max"], 8, "{found}");
    assert_eq!(
        found["files"][1]["survey"]["shared"][0]["samples"], 1,
        "{found}"
    );

    write("valid.jsonl", &[masked]);
    refused(
        &moeforge(&words),
        1,
        &["valid.jsonl", "no token to train on in 1 rows"],
    );
    // This model has no chat template.
    write("valid.jsonl", &[chat]);
    refused(&moeforge(&words), 1, &["valid.jsonl:1", "no chat template"]);
}

#[test]
fn runs_killed_at_any_moment_end_in_the_same_bits() {
    let place = tempfile::tempdir().unwrap();
    let settings = "[lora]\ndropout = 0.1\n[train]\nmethod = \"lora\"\nsteps = 60\nbatch_size = 2\nsave_every = 3\n";
    let recipe = recipe(&place, settings, &forty_rows());
    let out = place.path().join("out").to_string_lossy().into_owned();
    let words = ["resume-check", &recipe, "--out", &out, "--kills", "12"];
    let output = moeforge(&[&words[..], &["--json"]].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["kills"], 12, "{found}");
    assert_eq!(found["equal"], true, "{found}");
    // The runs that ended alike are gone, and the one they are like is not overwritten.
    assert!(!Path::new(&out).join("killed-1").exists());
    refused(&moeforge(&words), 1, &["whole", "--out"]);
}

#[cfg(unix)]
#[test]
fn a_run_that_is_asked_to_stop_saves_its_step_and_goes_on_to_the_same_bits() {
    let place = tempfile::tempdir().unwrap();
    let settings = "[train]\nmethod = \"lora\"\nsteps = 200\nbatch_size = 2\nlog_every = 1\n";
    let recipe = recipe(&place, settings, &forty_rows());
    let path = |name: &str| place.path().join(name).to_string_lossy().into_owned();
    assert!(
        moeforge(&["train", &recipe, "--out", &path("whole")])
            .status
            .success()
    );

    for (signal, code) in [("INT", 130), ("TERM", 143)] {
        let run = path(signal);
        let child = command(&["train", &recipe, "--out", &run])
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let metrics = Path::new(&run).join("metrics.jsonl");
        while !std::fs::read(&metrics).is_ok_and(|text| !text.is_empty()) {
            std::thread::sleep(Duration::from_millis(1));
        }
        let sent = ["-s", signal, &child.id().to_string()];
        assert!(Command::new("kill").args(sent).status().unwrap().success());
        let output = child.wait_with_output().unwrap();
        let words = ["saved", "moeforge train --resume", signal];
        refused(&output, code, &words);
        assert!(!Path::new(&run).join("adapter").exists());

        let resumed = moeforge(&["train", "--resume", &run]);
        assert!(resumed.status.success());
        let weights = |run: &str| {
            let file = Path::new(run).join("adapter/adapter_model.safetensors");
            std::fs::read(file).unwrap()
        };
        assert_eq!(weights(&run), weights(&path("whole")));
    }
}

#[test]
fn a_run_is_reported_with_its_samples_on_a_page_of_its_own() {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name).to_string_lossy().into_owned();
    let run = path("run");
    let smoke = ["train", "recipes/smoke/lora.toml", "--out", &run];
    let samples = [
        "--set",
        "eval.prompts=[\"What is <b>?\"]",
        "--set",
        "eval.max_new_tokens=4",
        "--set",
        "train.log_every=1",
    ];
    let output = moeforge(&[&smoke[..], &samples].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    for words in [
        "first gradient: in ",
        "step 0: What is <b>? →",
        "step 3: What is <b>? →",
    ] {
        assert!(stderr.contains(words), "`{words}` is not in: {stderr}");
    }
    assert!(moeforge(&["report", &run]).status.success());
    let page = std::fs::read_to_string(place.path().join("run/report.html")).unwrap();
    for words in [
        "<svg",
        ">Loss<",
        "Sample: What is &lt;b&gt;?",
        "use_rslora = true",
    ] {
        assert!(page.contains(words), "`{words}` is not in the page");
    }
    // Nothing is fetched: the one address is the name of SVG.
    assert_eq!(
        page.matches("http").count(),
        page.matches("xmlns=\"http").count()
    );
    refused(
        &moeforge(&["report", &path("")]),
        1,
        &["recipe.toml", "found none"],
    );
}

/// The exit code of a short run with tasks, what it says, and its folder.
fn scored_run(place: &TempDir, settings: &[&str]) -> (Option<i32>, String, PathBuf) {
    let run = place.path().join("run");
    let tasks = "eval.tasks=[\"datasets/factbook/factbook_choice.yaml\"]";
    let out = run.to_str().unwrap();
    let words = ["train", "recipes/smoke/lora.toml", "--out", out];
    let few = [tasks, "eval.tasks_max_samples=8"];
    let settings = few.iter().chain(settings).flat_map(|it| ["--set", it]);
    let output = moeforge(&words.into_iter().chain(settings).collect::<Vec<_>>());
    let stderr = String::from_utf8(output.stderr).unwrap();
    (output.status.code(), stderr, run)
}

#[test]
fn a_recipe_scores_tasks_while_it_learns() {
    let place = tempfile::tempdir().unwrap();
    let gate = "eval.gates=[\"factbook_choice acc >= base - 0.9\"]";
    let (code, stderr, run) = scored_run(&place, &["eval.tasks_every=2", gate]);
    assert_eq!(code, Some(0), "{stderr}");
    for words in [
        "step 0: factbook_choice acc ",
        "step 2: factbook_choice acc ",
        "step 3: factbook_choice acc_norm ",
        "gate `factbook_choice acc >= base - 0.9`, step 3: passed",
    ] {
        assert!(stderr.contains(words), "`{words}` is not in: {stderr}");
    }
    for step in [0, 2, 3] {
        assert!(run.join(format!("scores/step_{step:08}.json")).is_file());
    }
    assert!(
        moeforge(&["report", run.to_str().unwrap()])
            .status
            .success()
    );
    let page = std::fs::read_to_string(run.join("report.html")).unwrap();
    assert!(page.contains("factbook_choice acc_norm"), "{page}");
}

#[test]
fn a_result_that_does_not_keep_its_bounds_is_there_but_judged() {
    let place = tempfile::tempdir().unwrap();
    let gate = "eval.gates=[\"factbook_choice acc >= 1.0\"]";
    let (code, stderr, run) = scored_run(&place, &[gate]);
    assert!(code == Some(3) && stderr.contains(": failed;"), "{stderr}");
    assert!(run.join("adapter/adapter_model.safetensors").is_file());
}

#[test]
fn a_run_that_began_without_tasks_is_scored_but_not_judged() {
    let place = tempfile::tempdir().unwrap();
    let run = place.path().join("run").display().to_string();
    let recipe = "recipes/smoke/lora.toml";
    assert!(moeforge(&["train", recipe, "--out", &run]).status.success());
    let tasks = "eval.tasks=[\"datasets/factbook/factbook_choice.yaml\"]";
    let few = "eval.tasks_max_samples=4";
    let more = [
        "train",
        "--resume",
        &run,
        "--set",
        "train.steps=4",
        "--set",
        tasks,
        "--set",
        few,
    ];
    let gated = [
        &more[..],
        &["--set", "eval.gates=[\"factbook_choice acc >= base\"]"],
    ]
    .concat();
    let words = [
        "eval.gates",
        "scores of the run's start",
        "step_00000000.json",
    ];
    refused(&moeforge(&gated), 1, &words);
    let output = moeforge(&more);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("step 4: factbook_choice acc "), "{stderr}");
}

#[test]
fn a_run_that_goes_on_is_judged_by_the_questions_of_its_start() {
    let place = tempfile::tempdir().unwrap();
    let gate = "eval.gates=[\"factbook_choice acc >= base - 0.9\"]";
    let (code, stderr, run) = scored_run(&place, &[gate]);
    assert_eq!(code, Some(0), "{stderr}");
    let run = run.display().to_string();
    let more = ["train", "--resume", &run, "--set", "train.steps=4"];
    let others = [&more[..], &["--set", "eval.tasks_max_samples=9"]].concat();
    refused(
        &moeforge(&others),
        1,
        &["questions of `factbook_choice`", "found others"],
    );
    let output = moeforge(&more);
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{stderr}");
    assert!(stderr.contains("step 4: passed"), "{stderr}");
}

#[test]
fn tasks_of_a_recipe_are_refused_before_a_run_begins() {
    let place = tempfile::tempdir().unwrap();
    for (setting, code, expected) in [
        (
            "eval.gates=[\"other acc >= 1.0\"]",
            2,
            "error: eval.gates: `other acc >= 1.0`: expected a gate about what is evaluated, found the task `other`; there are factbook_choice\n",
        ),
        (
            "eval.tasks=[\"no.yaml\"]",
            1,
            "error: eval.tasks: `no.yaml`: expected a task's file, a folder of tasks, a file of rows or the name of a task, found none; give its file or folder\n",
        ),
    ] {
        let (found, stderr, run) = scored_run(&place, &[setting]);
        assert_eq!((found, stderr.as_str()), (Some(code), expected));
        assert!(!run.exists());
    }
}

#[test]
fn a_learning_rate_is_suggested_and_no_run_is_left() {
    let place = tempfile::tempdir().unwrap();
    let svg = place.path().join("lr.svg").to_string_lossy().into_owned();
    let recipe = recipe(
        &place,
        "[train]\nmethod = \"lora\"\nbatch_size = 2\n",
        &forty_rows(),
    );
    let before = std::fs::read_dir(place.path()).unwrap().count();
    let words = [
        "find-lr", &recipe, "--from", "1e-5", "--to", "1e-1", "--steps", "20", "--out", &svg,
    ];
    let output = moeforge(&[&words[..], &["--json"]].concat());
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let steps = found["steps"].as_array().unwrap();
    let loss = |i: usize| steps[i]["smoothed_loss"].as_f64().unwrap();
    assert!(loss(steps.len() - 1) < loss(0), "{found}");
    let suggestion = found["suggestion"].as_f64().unwrap();
    assert!(suggestion > 1e-5 && suggestion < 1e-1, "{found}");
    assert_eq!(std::fs::read_dir(place.path()).unwrap().count(), before + 1);
    let backwards = moeforge(&["find-lr", &recipe, "--from", "1e-1", "--to", "1e-6"]);
    assert_eq!(backwards.status.code(), Some(2));
    assert!(String::from_utf8_lossy(&backwards.stderr).contains("0 < from < to"));
}

/// The program on a disk that is full when a file has this many blocks of 512 bytes.
#[cfg(unix)]
fn with_room_for(blocks: usize, words: &[&str]) -> Output {
    // Ignored, the signal becomes an error of the write, as a full disk does.
    let script = format!("trap '' XFSZ; ulimit -f {blocks}; exec \"$0\" \"$@\"");
    Command::new("sh")
        .args(["-c", &script, env!("CARGO_BIN_EXE_moeforge")])
        .args(words)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .stdin(Stdio::null())
        .output()
        .unwrap()
}

#[cfg(unix)]
#[test]
fn a_full_disk_is_one_sentence_and_leaves_nothing() {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name).to_string_lossy().into_owned();
    let left = || {
        let names = std::fs::read_dir(place.path()).unwrap();
        let mut names: Vec<_> = names.map(|entry| entry.unwrap().file_name()).collect();
        names.sort_unstable();
        names
    };
    let rows: String = (0..4)
        .map(|i| format!("{{\"input_ids\": {:?}}}\n", (i..i + 60).collect::<Vec<_>>()))
        .collect();
    let recipe = recipe(&place, "[train]\nmethod = \"lora\"\nsteps = 2\n", &rows);
    let ids = serde_json::json!({ "input_ids": [(0..100).collect::<Vec<_>>()] });
    std::fs::write(path("ids.json"), ids.to_string()).unwrap();
    let before = left();

    let model = golden("deepseek_v3").to_string_lossy().into_owned();
    let adapter = format!("{model}/adapter_peft");
    let merged = path("merged");
    let merge = ["merge", &model, "--adapter", &adapter, "--out", &merged];
    refused(
        &with_room_for(64, &merge),
        1,
        &["write", "model-00001-of-000003.safetensors"],
    );
    let logits = path("logits.safetensors");
    let write = [
        "logits",
        &model,
        "--ids",
        &path("ids.json"),
        "--out",
        &logits,
    ];
    refused(
        &with_room_for(64, &write),
        1,
        &["write", "logits.safetensors"],
    );
    assert_eq!(left(), before);

    // A run keeps its folder, and is resumed in it once there is room.
    let run = path("run");
    let train = ["train", &recipe, "--out", &run];
    refused(&with_room_for(64, &train), 1, &["write", "checkpoint-2"]);
    let names = std::fs::read_dir(&run).unwrap();
    let mut names: Vec<_> = names
        .map(|entry| entry.unwrap().file_name().into_string().unwrap())
        .collect();
    names.sort_unstable();
    let expected = ".lock device.txt events.out.tfevents.0000000001.moeforge gradients.json metrics.jsonl origin.json \
                    precision.txt recipe.toml";
    assert_eq!(names.join(" "), expected);
    let resumed = moeforge(&["train", "--resume", &run]);
    assert!(resumed.status.success());
}

#[test]
fn precisions_are_compared_and_finished_runs_are_not_trained_again() {
    let place = tempfile::tempdir().unwrap();
    let row = |i: i32| (0..40).map(|j| (i * 7 + j * j) % 280).collect::<Vec<_>>();
    let rows: String = (0..20)
        .map(|i| format!("{{\"input_ids\": {:?}}}\n", row(i)))
        .collect();
    let settings = "[optimizer]\nlearning_rate = 1e-2\n[train]\nmethod = \"lora\"\nsteps = 6\n";
    let recipe = recipe(&place, settings, &rows);
    let out = place.path().join("out").to_string_lossy().into_owned();
    let words = ["precision", &recipe, "--out", &out, "--skip", "2", "--json"];
    let compare = || {
        let output = moeforge(&words);
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        serde_json::from_slice::<serde_json::Value>(&output.stdout).unwrap()
    };
    let report = compare();
    let error = |run: usize| report["runs"][run]["mean_error"].as_f64().unwrap();
    assert_eq!((report["steps"].as_u64(), error(0)), (Some(4), 0.0));
    // Rounding to four bits of mantissa more is seen, and is not the end of the world.
    assert!(error(2) > 1e-6 && error(2) < 0.1, "{report}");
    assert!(error(3) < error(2), "{report}");
    for file in ["report.txt", "report.json", "loss_error.svg"] {
        assert!(Path::new(&out).join(file).exists(), "{file}");
    }

    let other = moeforge(&[&words[..], &["--set", "train.seed=1"]].concat());
    refused(&other, 1, &["bf16", "of this recipe", "--out"]);
    refused(
        &moeforge(&[&words[..], &["--smoothing", "2"]].concat()),
        2,
        &["--smoothing"],
    );

    let metrics = Path::new(&out).join("fp8/metrics.jsonl");
    let before = std::fs::metadata(&metrics).unwrap().modified().unwrap();
    let again = compare();
    assert_eq!(
        again["runs"][2]["last_loss"],
        report["runs"][2]["last_loss"]
    );
    assert_eq!(
        std::fs::metadata(&metrics).unwrap().modified().unwrap(),
        before
    );
}

/// Where a tensor's bytes start in a safetensors file.
fn start_of(file: &[u8], tensor: &str) -> usize {
    let header = u64::from_le_bytes(file[..8].try_into().unwrap()) as usize;
    let json: serde_json::Value = serde_json::from_slice(&file[8..8 + header]).unwrap();
    8 + header + json[tensor]["data_offsets"][0].as_u64().unwrap() as usize
}

#[test]
fn a_number_that_is_not_finite_stops_a_run_and_leaves_its_checkpoint() {
    // Token 200 is not a number, and first seen in the third step.
    let broken = Broken::new("deepseek_v3");
    let index: serde_json::Value =
        serde_json::from_str(&broken.text("model.safetensors.index.json")).unwrap();
    let shard = index["weight_map"]["model.embed_tokens.weight"]
        .as_str()
        .unwrap();
    broken.bytes(shard, |bytes| {
        let row = start_of(bytes, "model.embed_tokens.weight") + 200 * 64 * 2;
        bytes[row..row + 2].copy_from_slice(&half_nan());
    });
    let rows = [
        "[1, 2, 3, 4]",
        "[5, 6, 7, 8]",
        "[9, 200, 11, 12]",
        "[13, 14, 15, 16]",
    ];
    let rows: String = rows
        .iter()
        .map(|ids| format!("{{\"input_ids\": {ids}}}\n"))
        .collect();
    let settings =
        "[train]\nmethod = \"lora\"\nsteps = 4\nbatch_size = 1\nshuffle = false\nsave_every = 2\n";
    let place = tempfile::tempdir().unwrap();
    let recipe = recipe(&place, settings, &rows);
    let run = place.path().join("run");
    let model = format!("model.path={}", broken.place.path().display());
    let words = [
        "train",
        &recipe,
        "--set",
        &model,
        "--out",
        &run.to_string_lossy(),
    ];
    for precision in ["f32", "f16"] {
        let _ = std::fs::remove_dir_all(&run);
        let compute = format!("precision.compute={precision}");
        let output = moeforge(&[&words[..], &["--set", &compute]].concat());
        refused(&output, 6, &["step 3", "`model.embed_tokens`", "intact"]);
        let checkpoint = run.join("checkpoint-2");
        let files = || {
            let read = |entry: std::io::Result<std::fs::DirEntry>| {
                let path = entry.unwrap().path();
                (path.clone(), std::fs::read(path).unwrap())
            };
            let mut files: Vec<_> = std::fs::read_dir(&checkpoint).unwrap().map(read).collect();
            files.sort();
            files
        };
        let before = files();
        assert!(before.len() > 2 && !run.join("adapter").exists());

        // Resuming meets it again, and the checkpoint stays intact.
        let output = moeforge(&["train", "--resume", &run.to_string_lossy()]);
        refused(&output, 6, &["step 3", "`model.embed_tokens`"]);
        assert_eq!(files(), before);
    }
}

/// Not a number, in bf16.
fn half_nan() -> [u8; 2] {
    0x7FC0u16.to_le_bytes()
}
