//! Whole training runs against the loss curves of an independent implementation, and against themselves resumed.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

use std::path::{Path, PathBuf};

use checkpoint::Safetensors;
use moeforge_train::{Event, Recipe, RunDir, Session};

/// Relative error of a loss after up to ten updates: f32 rounding, grown by the updates between.
const CURVE: f64 = 1e-3;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/goldens")
        .join(name)
}

/// A data folder with the golden's token ids as rows, and a recipe over it.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new(name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ids = Safetensors::open(&golden(name).join("golden.safetensors"))
            .unwrap()
            .tensor("input_ids")
            .unwrap();
        let values: Vec<i64> = ids
            .bytes
            .chunks(8)
            .map(|id| i64::from_le_bytes(id.try_into().unwrap()))
            .collect();
        let rows: Vec<String> = values
            .chunks(ids.shape[1])
            .map(|row| format!("{{\"input_ids\": {row:?}}}\n"))
            .collect();
        std::fs::write(folder.path().join("train.jsonl"), rows.concat()).unwrap();
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn recipe(&self, model: &str, settings: &str) -> Recipe {
        let base = format!(
            "[model]\npath = {:?}\n{model}[data]\npath = {:?}\n[optimizer]\nlearning_rate = 1e-3\nclip = 0.0\n[schedule]\nkind = \"constant\"\n{settings}",
            golden(self.name(model)),
            self.folder.path()
        );
        std::fs::write(self.path("recipe.toml"), base).unwrap();
        Recipe::open(&self.path("recipe.toml"), &[]).unwrap()
    }

    fn name<'a>(&self, model: &'a str) -> &'a str {
        model
            .trim_start_matches("# ")
            .split_whitespace()
            .next()
            .unwrap()
    }
}

fn losses(session: &mut Session, run: &RunDir) -> Vec<f64> {
    let mut losses = Vec::new();
    session
        .fit(run, &mut |event| {
            if let Event::Step(report) = event {
                losses.push(report.loss)
            }
        })
        .unwrap();
    losses
}

fn open(recipe: Recipe) -> Session {
    Session::open(recipe, &|model| Ok(model.into())).unwrap()
}

fn expected_curve(name: &str, key: &str) -> Vec<f64> {
    let json: serde_json::Value =
        serde_json::from_str(&std::fs::read_to_string(golden(name).join("golden.json")).unwrap())
            .unwrap();
    json[key]["adamw_loss_curve"]
        .as_array()
        .unwrap()
        .iter()
        .map(|loss| loss.as_f64().unwrap())
        .collect()
}

fn assert_curve(found: &[f64], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}");
    for (step, (found, expected)) in found.iter().zip(expected).enumerate() {
        assert!(
            (found / expected - 1.0).abs() < CURVE,
            "{what} step {step}: {found}, expected {expected}"
        );
    }
}

#[test]
fn full_training_follows_the_golden_curve() {
    for name in [
        "deepseek_v2_lite",
        "deepseek_v3",
        "qwen2_distill",
        "llama_distill",
    ] {
        let place = Place::new(name);
        let recipe = place.recipe(
            &format!("# {name}\n"),
            "[train]\nmethod = \"full\"\nsteps = 11\nbatch_size = 2\nshuffle = false\n",
        );
        let run = RunDir::create(&place.path("run"), &recipe).unwrap();
        assert_curve(
            &losses(&mut open(recipe), &run),
            &expected_curve(name, "full_ft"),
            name,
        );
        assert!(place.path("run/model/model.safetensors").exists());
    }
}

#[test]
fn lora_training_follows_the_golden_curve() {
    for name in ["deepseek_v2_lite", "deepseek_v3"] {
        let place = Place::new(name);
        let model = format!(
            "# {name}\nadapter = {:?}\n",
            golden(name).join("adapter_peft")
        );
        let recipe = place.recipe(
            &model,
            "[train]\nmethod = \"lora\"\nsteps = 11\nbatch_size = 2\nshuffle = false\n",
        );
        let run = RunDir::create(&place.path("run"), &recipe).unwrap();
        assert_curve(
            &losses(&mut open(recipe), &run),
            &expected_curve(name, "lora_peft"),
            name,
        );
    }
}

#[test]
fn accumulated_steps_are_one_large_batch() {
    let place = Place::new("deepseek_v3");
    let curve = |settings: &str, run: &str| {
        let recipe = place.recipe(
            "# deepseek_v3\n",
            &format!("[train]\nmethod = \"full\"\nsteps = 4\nshuffle = false\n{settings}"),
        );
        let run = RunDir::create(&place.path(run), &recipe).unwrap();
        losses(&mut open(recipe), &run)
    };
    let (whole, parts) = (
        curve("batch_size = 2\n", "whole"),
        curve("batch_size = 1\naccumulate = 2\n", "parts"),
    );
    assert_curve(&parts, &whole, "accumulated");
}

/// Every file of a result, for a comparison bit by bit.
fn bytes(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .collect();
    files.sort();
    files
        .into_iter()
        .map(|file| {
            (
                file.file_name().unwrap().to_string_lossy().into(),
                std::fs::read(&file).unwrap(),
            )
        })
        .collect()
}

#[test]
fn resumed_runs_end_in_the_same_bits() {
    let common = "steps = 6\nbatch_size = 1\nsave_every = 2\nbalance_loss = 0.01\nkeep_last = 9\n";
    let lora = format!("[lora]\ndropout = 0.1\n[train]\nmethod = \"lora\"\n{common}");
    let full = format!("[train]\nmethod = \"full\"\nbias_update_speed = 0.001\n{common}");
    for (settings, result) in [(lora, "adapter"), (full, "model")] {
        resumed_run_is_whole(&settings, result);
    }
}

fn resumed_run_is_whole(settings: &str, result: &str) {
    let place = Place::new("deepseek_v3");
    let recipe = place.recipe("# deepseek_v3\n", settings);
    let whole = RunDir::create(&place.path("whole"), &recipe).unwrap();
    losses(&mut open(recipe.clone()), &whole);

    // A run that has come to the checkpoint of step 4 and no further.
    let part = RunDir::create(&place.path("part"), &recipe).unwrap();
    std::fs::create_dir(place.path("part/checkpoint-4")).unwrap();
    for (name, content) in bytes(&place.path("whole/checkpoint-4")) {
        std::fs::write(place.path("part/checkpoint-4").join(name), content).unwrap();
    }
    let mut session = open(recipe);
    assert_eq!(session.resume(&part).unwrap(), Some(4));
    assert_eq!(losses(&mut session, &part).len(), 2);
    for result in [result, "checkpoint-6"] {
        assert_eq!(
            bytes(&place.path("whole").join(result)),
            bytes(&place.path("part").join(result)),
            "{result}"
        );
    }

    // Resumed once more, the finished run only makes its result again.
    let (metrics, made) = (
        place.path("part/metrics.jsonl"),
        place.path("part").join(result),
    );
    let before = (std::fs::read(&metrics).unwrap(), bytes(&made));
    std::fs::remove_dir_all(&made).unwrap();
    assert_eq!(session.resume(&part).unwrap(), Some(6));
    assert!(losses(&mut session, &part).is_empty());
    assert_eq!((std::fs::read(&metrics).unwrap(), bytes(&made)), before);
}
