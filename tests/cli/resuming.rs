//! Runs that are stopped, killed, moved and extended, in processes of their own.

use std::path::{Path, PathBuf};
use std::process::Output;

use serde_json::Value;
use tempfile::TempDir;

use super::{Broken, moeforge_in, refused};

/// A project: a model, data, and a recipe that names both by relative paths.
struct Project {
    place: TempDir,
}

const RECIPE: &str = "[model]\npath = \"model\"\n[data]\npath = \"data\"\n[schedule]\nkind = \"constant\"\n\
                      [train]\nbatch_size = 2\nlog_every = 1\n";

impl Project {
    fn new(settings: &str) -> Self {
        let place = tempfile::tempdir().unwrap();
        let model = Broken::new("deepseek_v3");
        std::fs::rename(model.place.keep(), place.path().join("model")).unwrap();
        std::fs::create_dir(place.path().join("data")).unwrap();
        let row = |i: usize| (i..i + 30).map(|id| id * 7 % 280).collect::<Vec<_>>();
        let rows: String = (0..40)
            .map(|i| format!("{{\"input_ids\": {:?}}}\n", row(i)))
            .collect();
        std::fs::write(place.path().join("data/train.jsonl"), rows).unwrap();
        std::fs::write(
            place.path().join("recipe.toml"),
            format!("{RECIPE}{settings}"),
        )
        .unwrap();
        Self { place }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    fn run(&self, words: &[&str]) -> Output {
        moeforge_in(self.place.path(), words)
    }

    fn train(&self, run: &str, set: &[&str]) {
        succeeds(&self.run(&with_settings(&["train", "recipe.toml", "--out", run], set)));
    }

    /// The bits of a run's result.
    fn result(&self, run: &str) -> Vec<u8> {
        std::fs::read(self.path(run).join("adapter/adapter_model.safetensors")).unwrap()
    }
}

fn with_settings<'a>(words: &[&'a str], set: &[&'a str]) -> Vec<&'a str> {
    let set = set.iter().flat_map(|setting| ["--set", setting]);
    words.iter().copied().chain(set).collect()
}

fn succeeds(output: &Output) -> String {
    let stderr = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{stderr}");
    stderr
}

/// The lines of a run's metrics, without times.
fn metrics(run: &Path) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let line = |line: &str| {
        let mut line: Value = serde_json::from_str(line).unwrap();
        line.as_object_mut().unwrap().remove("seconds");
        line
    };
    // What a process took of memory is no part of a run.
    let lines = text.lines().map(line);
    lines.filter(|line| line.get("memory").is_none()).collect()
}

#[cfg(unix)]
mod interrupted {
    use std::process::{Child, Command, Stdio};
    use std::time::{Duration, Instant};

    use super::super::command;
    use super::*;

    impl Project {
        fn start(&self, words: &[&str]) -> Child {
            let mut command = command(words);
            command.current_dir(self.place.path());
            command.stdout(Stdio::piped()).stderr(Stdio::piped());
            command.spawn().unwrap()
        }

        /// Waits until a run has logged a step, and then a while.
        fn wait_for(&self, run: &str, step: u64, longer: Duration) {
            let (metrics, words) = (
                self.path(run).join("metrics.jsonl"),
                format!("\"step\":{step},"),
            );
            let is_there =
                || std::fs::read_to_string(&metrics).is_ok_and(|text| text.contains(&words));
            let started = Instant::now();
            while !is_there() {
                assert!(
                    started.elapsed() < Duration::from_secs(60),
                    "no step {step}"
                );
                std::thread::sleep(Duration::from_millis(1));
            }
            std::thread::sleep(longer);
        }
    }

    fn send(signal: &str, child: &Child) {
        let words = ["-s", signal, &child.id().to_string()];
        assert!(Command::new("kill").args(words).status().unwrap().success());
    }

    #[test]
    fn a_validation_pass_obeys_signals_within_a_batch_and_is_made_again_after_a_kill() {
        let project = Project::new("steps = 4\neval_every = 2\n[eval]\nbatch_size = 1\n");
        // One batch takes a few milliseconds, and the pass some seconds.
        let row: Vec<usize> = (0..60).map(|id| id * 11 % 280).collect();
        let rows = format!("{{\"input_ids\": {row:?}}}\n").repeat(400);
        std::fs::write(project.path("data/valid.jsonl"), rows).unwrap();
        project.train("whole", &[]);
        assert_eq!(
            metrics(&project.path("whole"))
                .iter()
                .filter(|l| l["valid_loss"].is_f64())
                .count(),
            2
        );

        let resume = ["train", "--resume", "run"];
        for (signal, code) in [("INT", 130), ("TERM", 143)] {
            let child = project.start(&["train", "recipe.toml", "--out", "run"]);
            project.wait_for("run", 2, Duration::from_millis(20));
            send(signal, &child);
            let asked = Instant::now();
            let output = child.wait_with_output().unwrap();
            assert!(
                asked.elapsed() < Duration::from_secs(5),
                "{:?}",
                asked.elapsed()
            );
            refused(
                &output,
                code,
                &["after step 2, which is saved", "--resume run"],
            );
            assert!(
                metrics(&project.path("run"))
                    .iter()
                    .all(|line| line["valid_loss"].is_null())
            );
            // Killed twice: in the pass that is made again, and in a later one.
            for wait in [300, 900] {
                let mut child = project.start(&resume);
                std::thread::sleep(Duration::from_millis(wait));
                child.kill().unwrap();
                child.wait().unwrap();
            }
            succeeds(&project.run(&resume));
            assert_eq!(
                metrics(&project.path("run")),
                metrics(&project.path("whole")),
                "{signal}"
            );
            assert_eq!(project.result("run"), project.result("whole"), "{signal}");
            std::fs::remove_dir_all(project.path("run")).unwrap();
        }
    }

    #[test]
    fn a_validation_pass_shows_its_progress() {
        let project = Project::new("steps = 1\n[eval]\nbatch_size = 1\n");
        let row: Vec<usize> = (0..60).map(|id| id * 11 % 280).collect();
        let rows = format!("{{\"input_ids\": {row:?}}}\n").repeat(6000);
        std::fs::write(project.path("data/valid.jsonl"), rows).unwrap();
        let child = project.start(&["train", "recipe.toml", "--out", "run"]);
        project.wait_for("run", 1, Duration::from_secs(7));
        send("INT", &child);
        let output = child.wait_with_output().unwrap();
        let stderr = String::from_utf8_lossy(&output.stderr);
        // Six thousand batches, and sixteen of the reference.
        let line = stderr.lines().find(|line| line.starts_with("validating "));
        let line = line.unwrap_or_else(|| panic!("{stderr}"));
        assert!(line.contains("/6016 "), "{line}");
        assert!(
            line.contains(" tokens/s ") && line.ends_with(" s left"),
            "{line}"
        );
        refused(&output, 130, &["after step 1, which is saved"]);
    }

    #[test]
    fn a_run_that_is_killed_after_its_extension_ends_in_the_bits_of_a_longer_one() {
        let project = Project::new("steps = 40\nsave_every = 4\n");
        project.train("whole", &["train.steps=90"]);
        project.train("run", &[]);
        let extend = ["train", "--resume", "run", "--set", "train.steps=90"];
        let mut child = project.start(&extend);
        project.wait_for("run", 46, Duration::ZERO);
        child.kill().unwrap();
        child.wait().unwrap();
        // The new end is the run's own from then on.
        let child = project.start(&["train", "--resume", "run"]);
        project.wait_for("run", 60, Duration::ZERO);
        send("INT", &child);
        refused(&child.wait_with_output().unwrap(), 130, &["which is saved"]);
        succeeds(&project.run(&["train", "--resume", "run"]));
        assert_eq!(project.result("run"), project.result("whole"));
        assert!(project.path("run/adapter-40/adapter_config.json").exists());
        assert_eq!(
            metrics(&project.path("run")),
            metrics(&project.path("whole"))
        );
    }
}

#[test]
fn an_extension_says_where_the_schedule_ends_now() {
    let project = Project::new("steps = 4\n");
    project.train("run", &["schedule.kind=cosine"]);
    let output = project.run(&["train", "--resume", "run", "--set", "train.steps=8"]);
    let stderr = succeeds(&output);
    for words in [
        "resuming after step 4 of 8, which ended at 4 before",
        "learning rate: 2.00e-5 in step 4, by the schedule until then; ",
        "2.00e-5 in step 8, where the schedule ends now",
        "the result of step 4 is now run/adapter-4",
    ] {
        assert!(stderr.contains(words), "`{words}` is not in {stderr}");
    }
    let again = succeeds(&project.run(&["train", "--resume", "run"]));
    assert!(
        again.contains("finished after step 8 of 8; `--set train.steps=N`"),
        "{again}"
    );
    let changed = project.run(&["train", "--resume", "run", "--set", "lora.rank=4"]);
    refused(&changed, 2, &["lora.rank, which was `8` and is `4`"]);
}

#[test]
fn a_run_is_resumed_wherever_it_and_its_files_are() {
    let project = Project::new("steps = 3\nsave_every = 2\n");
    project.train("whole", &["train.steps=7"]);
    project.train("runs/a", &[]);
    let elsewhere = tempfile::tempdir().unwrap();
    let resume = |run: &Path, set: &[&str]| {
        let run = run.to_string_lossy().into_owned();
        moeforge_in(
            elsewhere.path(),
            &with_settings(&["train", "--resume", &run], set),
        )
    };
    // From another folder.
    succeeds(&resume(&project.path("runs/a"), &["train.steps=4"]));
    // The run alone is moved.
    let alone = elsewhere.path().join("alone");
    std::fs::rename(project.path("runs/a"), &alone).unwrap();
    succeeds(&resume(&alone, &["train.steps=5"]));
    // The whole project is moved, with the run in its place.
    std::fs::rename(&alone, project.path("runs/a")).unwrap();
    let moved = elsewhere.path().join("project");
    std::fs::create_dir(&moved).unwrap();
    for name in ["model", "data", "runs"] {
        std::fs::rename(project.path(name), moved.join(name)).unwrap();
    }
    succeeds(&resume(&moved.join("runs/a"), &["train.steps=6"]));
    // The model alone is moved: it is missed by name, and found by its new place.
    std::fs::rename(moved.join("data"), moved.join("rows")).unwrap();
    let lost = resume(&moved.join("runs/a"), &[]);
    refused(
        &lost,
        1,
        &["recipe.toml", "data.path", "`data`", "--set data.path=…"],
    );
    std::fs::rename(moved.join("model"), elsewhere.path().join("base")).unwrap();
    let found = [
        "train.steps=7",
        "model.path=base",
        &format!("data.path={}", moved.join("rows").display()),
    ];
    refused(&resume(&moved.join("runs/a"), &found[2..]), 1, &["model"]);
    succeeds(&resume(&moved.join("runs/a"), &found));
    let weights =
        |run: &Path| std::fs::read(run.join("adapter/adapter_model.safetensors")).unwrap();
    assert!(weights(&project.path("whole")) == weights(&moved.join("runs/a")));
}

#[test]
fn what_is_easily_overlooked_is_said_before_the_first_step() {
    let project = Project::new("steps = 2\naccumulate = 30\n");
    let masked = "{\"input_ids\": [1, 2], \"labels\": [-100, -100]}\n";
    let rows = std::fs::read_to_string(project.path("data/train.jsonl")).unwrap();
    std::fs::write(
        project.path("data/train.jsonl"),
        format!("{masked}{rows}{masked}"),
    )
    .unwrap();
    let words = [
        "train",
        "recipe.toml",
        "--out",
        "run",
        "--set",
        "data.max_length=600",
    ];
    let stderr = succeeds(&project.run(&words));
    for words in [
        "training rows: 2 of 42 samples have nothing to train on",
        "data.max_length is 600, and the model has 512 positions",
        "0 samples are longer",
        "a step takes 60 rows (train.batch_size × train.accumulate) and an epoch has 40",
    ] {
        assert!(stderr.contains(words), "`{words}` is not in {stderr}");
    }
    succeeds(&project.run(&["report", "run"]));
    let page = std::fs::read_to_string(project.path("run/report.html")).unwrap();
    assert!(page.contains("2 samples left out"), "{page}");
    let check = project.run(&["data", "check", "data", "--model", "model"]);
    let stderr = succeeds(&check);
    assert!(
        stderr.contains("train.jsonl: 2 of 42 samples have nothing to train on"),
        "{stderr}"
    );

    std::fs::write(project.path("data/train.jsonl"), masked.repeat(3)).unwrap();
    let words = ["train", "recipe.toml", "--out", "none"];
    refused(
        &project.run(&words),
        1,
        &[
            "train.jsonl",
            "no token to train on in 3 rows",
            "data.max_length",
        ],
    );
    assert!(!project.path("none").exists());
}

#[test]
fn a_tokenizer_larger_than_the_embedding_is_said() {
    let project = Project::new("steps = 1\n");
    let path = project.path("model/tokenizer.json");
    let mut tokenizer: Value =
        serde_json::from_str(&std::fs::read_to_string(&path).unwrap()).unwrap();
    let vocabulary = tokenizer["model"]["vocab"].as_object_mut().unwrap();
    vocabulary.insert("zzz".into(), 400.into());
    std::fs::write(&path, tokenizer.to_string()).unwrap();
    let stderr = succeeds(&project.run(&["train", "recipe.toml", "--out", "run"]));
    assert!(
        stderr.contains("the tokenizer has 401 tokens and the model's embedding 288"),
        "{stderr}"
    );
}

#[test]
fn the_check_of_resumed_runs_takes_validation_too() {
    let project = Project::new("steps = 12\nsave_every = 3\neval_every = 3\n");
    std::fs::copy(
        project.path("data/train.jsonl"),
        project.path("data/valid.jsonl"),
    )
    .unwrap();
    let words = [
        "resume-check",
        "recipe.toml",
        "--out",
        "out",
        "--kills",
        "6",
        "--json",
    ];
    let output = project.run(&words);
    succeeds(&output);
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["equal"], true, "{found}");
}
