use std::path::Path;

use burn::tensor::Device;
use model::Model;
use moeforge_train::{
    Error, Event, GradAudit, Host, Recipe, RunDir, RunState, TaskScore, ZeroGradient,
};
use serde_json::Value;

use super::{Place, bytes, open};

/// Records events, and may ask to stop after a step.
#[derive(Default)]
pub(super) struct Notes {
    stop_after: Option<u64>,
    pub(super) step: u64,
    steps: Vec<u64>,
    losses: Vec<f64>,
    pub(super) valid: Vec<(u64, f64, Option<f64>)>,
    rollbacks: Vec<(u64, u64)>,
    audit: Option<GradAudit>,
    pub(super) best: Option<u64>,
    /// The accuracy after each scored step.
    accuracy: Option<fn(u64) -> f64>,
    scored: Vec<u64>,
}

impl Notes {
    pub(super) fn stopping_after(step: u64) -> Self {
        Self {
            stop_after: Some(step),
            ..Self::default()
        }
    }
}

impl Host for Notes {
    fn see(&mut self, event: &Event) {
        match event {
            Event::Step(report) => {
                self.step = report.step;
                self.steps.push(report.step);
                self.losses.push(report.loss);
            }
            Event::Validated {
                step, loss, drift, ..
            } => self.valid.push((*step, *loss, *drift)),
            Event::RolledBack { step, to, .. } => {
                self.rollbacks.push((*step, *to));
            }
            Event::FirstGradient(audit) => self.audit = Some(audit.clone()),
            Event::RestoredBest { step, .. } => self.best = Some(*step),
            _ => {}
        }
    }

    fn score(&mut self, step: u64, _model: &Model) -> Result<Vec<TaskScore>, String> {
        let accuracy = self.accuracy.ok_or("no tasks")?;
        self.scored.push(step);
        let score = |metric: &str, value| TaskScore {
            task: "t".into(),
            metric: metric.into(),
            filter: "none".into(),
            is_higher_better: metric == "acc",
            value,
            standard_error: None,
        };
        Ok(vec![score("ppl", 2.0), score("acc", accuracy(step))])
    }

    fn interrupted(&mut self) -> Option<i32> {
        (self.stop_after == Some(self.step)).then_some(15)
    }
}

/// Rows of one easy pattern, with others from some row on.
fn rows(n: usize, odd: std::ops::Range<usize>) -> String {
    let row = |i: usize| -> Vec<usize> {
        let odd_ids = |j: usize| 100 + (i * 37 + j * j * 11) % 180;
        let ids = (0..24).map(|j| if odd.contains(&i) { odd_ids(j) } else { j % 3 });
        ids.collect()
    };
    (0..n)
        .map(|i| format!("{{\"input_ids\": {:?}}}\n", row(i)))
        .collect()
}

pub(super) fn fit(recipe: &Recipe, run: &RunDir, notes: &mut Notes) -> Result<(), Error> {
    let mut session = open(recipe.clone());
    session.resume(run)?;
    session.fit(run, notes)
}

/// The lines of a run's metrics that have a key.
pub(super) fn lines(run: &Path, key: &str) -> Vec<Value> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = text
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    lines.filter(|line| line.get(key).is_some()).collect()
}

const SPIKING: &str = "[train]\nmethod = \"full\"\nsteps = 40\nbatch_size = 1\nshuffle = false\nsave_every = 4\n\
     log_every = 1\nspike_factor = 1.5\nspike_steps = 2\n";

/// A recipe whose rows 29 to 32, of `samples_per_row` samples each, are unlike those before.
fn spiking(place: &Place, samples_per_row: usize, set: &[&str]) -> Recipe {
    let [n, first, end] = [60, 29, 33].map(|row| row * samples_per_row);
    std::fs::write(place.path("train.jsonl"), rows(n, first..end)).unwrap();
    place.recipe("# deepseek_v3\n", SPIKING);
    let set: Vec<String> = set.iter().map(|&setting| setting.to_owned()).collect();
    Recipe::open(&place.path("recipe.toml"), &set).unwrap()
}

#[test]
fn a_run_that_goes_astray_goes_back_and_skips_the_batches() {
    goes_back(1, &[]);
}

#[test]
fn a_packed_run_skips_packed_batches() {
    goes_back(2, &["data.packing=true", "data.max_length=48"]);
}

fn goes_back(samples_per_row: usize, set: &[&str]) {
    let place = Place::new("deepseek_v3");
    let recipe = spiking(&place, samples_per_row, set);
    assert_eq!(open(recipe.clone()).train.rows(), 60);
    let whole = RunDir::create(&place.path("whole"), &recipe).unwrap();
    let mut notes = Notes::default();
    fit(&recipe, &whole, &mut notes).unwrap();
    // Steps 30 and 31 are the first two odd rows; the checkpoint before them is that of 28. Rows 31 and 32 then come
    // in their places.
    assert_eq!(notes.rollbacks, [(31, 28), (31, 28)], "{:?}", notes.losses);
    let found = lines(whole.path(), "rolled_back");
    assert_eq!(found.len(), 1);
    assert_eq!(found[0]["step"], 29);
    let skipped = &found[0]["rolled_back"]["skipped_batches"];
    assert_eq!(skipped.to_string(), "[[29,31],[31,33]]");
    let steps: Vec<u64> = lines(whole.path(), "loss")
        .iter()
        .map(|l| l["step"].as_u64().unwrap())
        .collect();
    assert_eq!(steps, (1..=40).collect::<Vec<_>>());

    // A run that is stopped before, in the middle of, or after the spike makes the same of it.
    for stop_after in [10, 30, 33] {
        let part = RunDir::create(&place.path(&format!("part {stop_after}")), &recipe).unwrap();
        let mut notes = Notes::stopping_after(stop_after);
        let stopped = fit(&recipe, &part, &mut notes).unwrap_err();
        assert!(
            matches!(stopped, Error::Interrupted { signal: 15, .. }),
            "{stopped}"
        );
        fit(&recipe, &part, &mut Notes::default()).unwrap();
        for result in ["model", "checkpoint-40"] {
            let [whole, part] = [&whole, &part].map(|run| bytes(&run.path().join(result)));
            assert_eq!(whole, part, "{result}, stopped after {stop_after}");
        }
        assert_eq!(lines(part.path(), "rolled_back"), found);
    }
}

#[test]
fn a_run_that_goes_astray_too_often_stops_with_a_checkpoint_from_before() {
    let place = Place::new("deepseek_v3");
    let recipe = spiking(&place, 1, &["train.max_rollbacks=1"]);
    let run = RunDir::create(&place.path("run"), &recipe).unwrap();
    let error = fit(&recipe, &run, &mut Notes::default()).unwrap_err();
    let is_expected = matches!(
        error,
        Error::Diverged {
            step: 31,
            anchor: 28,
            rollbacks: 1,
            ..
        }
    );
    assert!(is_expected, "{error}");
    assert_eq!(run.latest().unwrap().unwrap().0, 28);
    // It is still so after another try.
    let error = fit(&recipe, &run, &mut Notes::default()).unwrap_err();
    assert!(matches!(error, Error::Diverged { .. }), "{error}");
}

const OVERFITTING: &str = "[train]\nmethod = \"lora\"\nsteps = 60\nbatch_size = 1\nsave_every = 5\neval_every = 3\n\
     keep_last = 1\nkeep_best = true\n[eval]\npatience = 2\n";

#[test]
fn a_run_ends_when_the_validation_loss_rises_and_leaves_the_best() {
    let place = Place::new("deepseek_v3");
    std::fs::write(place.path("train.jsonl"), rows(20, 0..0)).unwrap();
    // What is learned is wrong here, after a while.
    std::fs::write(place.path("valid.jsonl"), rows(6, 3..6)).unwrap();
    let recipe = place.recipe("# deepseek_v3\n", OVERFITTING);
    let whole = RunDir::create(&place.path("whole"), &recipe).unwrap();
    let mut notes = Notes::default();
    fit(&recipe, &whole, &mut notes).unwrap();
    let (best, _, _) = *notes
        .valid
        .iter()
        .min_by(|a, b| a.1.total_cmp(&b.1))
        .unwrap();
    let last = notes.valid.last().unwrap().0;
    assert_eq!(
        (notes.best, last),
        (Some(best), best + 6),
        "{:?}",
        notes.valid
    );
    assert!(last < 60 && notes.step == last, "{:?}", notes.valid);
    // The adapter moves the routing, and more and more of it.
    let drifts: Vec<f64> = notes
        .valid
        .iter()
        .map(|(_, _, drift)| drift.unwrap())
        .collect();
    assert!(
        drifts[0] < drifts[drifts.len() - 1] && drifts.iter().all(|d| *d < 1.0),
        "{drifts:?}"
    );

    let weights = |folder: &str| {
        std::fs::read(whole.path().join(folder).join("adapter_model.safetensors")).unwrap()
    };
    assert_eq!(weights("adapter"), weights(&format!("checkpoint-{best}")));
    assert_ne!(weights("adapter"), weights(&format!("checkpoint-{last}")));

    for stop_after in [1, best, last - 1] {
        let part = RunDir::create(&place.path(&format!("part {stop_after}")), &recipe).unwrap();
        let mut notes = Notes::stopping_after(stop_after);
        fit(&recipe, &part, &mut notes).unwrap_err();
        fit(&recipe, &part, &mut Notes::default()).unwrap();
        for result in ["adapter".to_owned(), format!("checkpoint-{last}")] {
            let [whole, part] = [&whole, &part].map(|run| bytes(&run.path().join(&result)));
            assert_eq!(whole, part, "{result}, stopped after {stop_after}");
        }
    }
    // Over is over: resumed once more it makes no step, and misses a best that is gone.
    std::fs::remove_dir_all(whole.path().join("adapter")).unwrap();
    let mut notes = Notes::default();
    fit(&recipe, &whole, &mut notes).unwrap();
    assert!(notes.steps.is_empty() && whole.path().join("adapter").exists());
    std::fs::remove_dir_all(whole.path().join(format!("checkpoint-{best}"))).unwrap();
    let error = fit(&recipe, &whole, &mut Notes::default()).unwrap_err();
    assert!(matches!(error, Error::NoBest { .. }), "{error}");
}

#[test]
fn a_run_leaves_the_step_with_the_best_score() {
    // The start is better than all, and no result.
    let accuracy: fn(u64) -> f64 = |step| [0.9, 0.0, 0.5, 0.0, 0.75, 0.0, 0.5, 0.0][step as usize];
    let place = Place::new("deepseek_v3");
    let settings = "[train]\nsteps = 7\nbatch_size = 1\nkeep_last = 1\nkeep_best = \"t acc\"\n[eval]\ntasks = [\"t\"]\ntasks_every = 2\n";
    let recipe = place.recipe("# deepseek_v3\n", settings);
    let scoring = |stop_after| Notes {
        accuracy: Some(accuracy),
        stop_after,
        ..Notes::default()
    };
    let whole = RunDir::create(&place.path("whole"), &recipe).unwrap();
    let mut notes = scoring(None);
    fit(&recipe, &whole, &mut notes).unwrap();
    assert_eq!((notes.scored, notes.best), (vec![0, 2, 4, 6, 7], Some(4)));
    let weights = |folder: &str| {
        std::fs::read(whole.path().join(folder).join("adapter_model.safetensors")).unwrap()
    };
    assert_eq!(weights("adapter"), weights("checkpoint-4"));
    assert_ne!(weights("adapter"), weights("checkpoint-7"));
    let logged: Vec<f64> = lines(whole.path(), "scores")
        .iter()
        .map(|line| line["scores"][1]["value"].as_f64().unwrap())
        .collect();
    assert_eq!(logged, [0.9, 0.5, 0.75, 0.5, 0.0]);

    for stop_after in [1, 4, 5] {
        let part = RunDir::create(&place.path(&format!("part {stop_after}")), &recipe).unwrap();
        fit(&recipe, &part, &mut scoring(Some(stop_after))).unwrap_err();
        fit(&recipe, &part, &mut scoring(None)).unwrap();
        for result in ["adapter", "checkpoint-7"] {
            let [whole, part] = [&whole, &part].map(|run| bytes(&run.path().join(result)));
            assert_eq!(whole, part, "{result}, stopped after {stop_after}");
        }
    }

    let other = place.recipe("# deepseek_v3\n", &settings.replace("t acc", "t f1"));
    let run = RunDir::create(&place.path("other"), &other).unwrap();
    let problem = fit(&other, &run, &mut scoring(None))
        .unwrap_err()
        .to_string();
    assert_eq!(
        problem,
        "eval.tasks: expected `t f1` of `train.keep_best` among the scores, found t ppl, t acc"
    );
}

#[test]
fn settings_that_need_validation_rows_say_so() {
    let place = Place::new("deepseek_v3");
    for settings in [
        "[train]\nkeep_best = true\n",
        "[train]\neval_every = 1\n[eval]\npatience = 1\n",
    ] {
        let recipe = place.recipe("# deepseek_v3\n", settings);
        let error =
            moeforge_train::Session::open(recipe, &Device::flex(), &|model| Ok(model.into()))
                .unwrap_err();
        assert!(
            error.to_string().contains("needs validation rows"),
            "{error}"
        );
    }
}

#[test]
fn loads_add_up_and_the_first_gradient_is_explained() {
    let place = Place::new("deepseek_v3");
    let settings = "[lora]\ntarget = [\"o_proj\", \"experts\"]\n[train]\nsteps = 5\nbatch_size = 2\nlog_every = 2\nsave_every = 3\n";
    let recipe = place.recipe("# deepseek_v3\n", settings);
    let run = RunDir::create(&place.path("run"), &recipe).unwrap();
    let mut notes = Notes::default();
    fit(&recipe, &run, &mut notes).unwrap();

    let config = open(recipe.clone()).base_folder().unwrap().config().clone();
    let top_k = config["num_experts_per_tok"].as_u64().unwrap();
    let tokens: u64 = lines(run.path(), "tokens")[0]["tokens"].as_u64().unwrap();
    let found = lines(run.path(), "experts");
    // Two steps in each line, but one in the last.
    for (line, n_steps) in found.iter().zip([2, 2, 1]) {
        for layer in line["experts"].as_array().unwrap() {
            let load: Vec<u64> = serde_json::from_value(layer["load"].clone()).unwrap();
            assert_eq!(load.iter().sum::<u64>(), n_steps * tokens * top_k, "{line}");
            let dead = load.iter().filter(|n| **n == 0).count();
            assert_eq!(layer["dead"], dead);
        }
    }
    assert_eq!(found.len(), 3);
    // The checkpoint of step 3 holds what came after the line of step 2.
    let (_, folder) = run.latest().unwrap().unwrap();
    assert!(RunState::read(&folder).unwrap().expert_loads.is_empty());
    let state = RunState::read(&run.path().join("checkpoint-3")).unwrap();
    let sum: u64 = state.expert_loads.values().next().unwrap().iter().sum();
    assert_eq!(sum, tokens * top_k);

    let audit = notes.audit.unwrap();
    for tensor in &audit.tensors {
        let is_first = tensor.name.ends_with("lora_a");
        let expected = is_first.then_some(ZeroGradient::SecondFactorIsZero);
        assert_eq!(tensor.zero, expected, "{tensor:?}");
        assert_eq!(tensor.norm == 0.0, is_first);
    }
    assert!(audit.summary().contains("lora_b starts at zero"));
    let written: Value =
        serde_json::from_slice(&std::fs::read(run.path().join("gradients.json")).unwrap()).unwrap();
    assert_eq!(
        written["tensors"].as_array().unwrap().len(),
        audit.tensors.len()
    );
}

/// The gradient audit of a run's first step.
fn audit(place: &Place, name: &str, settings: &str) -> GradAudit {
    let settings = format!("{settings}steps = 1\nbatch_size = 2\n");
    let recipe = place.recipe("# deepseek_v3\n", &settings);
    let run = RunDir::create(&place.path(name), &recipe).unwrap();
    let mut notes = Notes::default();
    fit(&recipe, &run, &mut notes).unwrap();
    notes.audit.unwrap()
}

#[test]
fn the_first_gradient_of_every_method_is_explained() {
    let place = Place::new("deepseek_v3");
    let dora = "[lora]\nuse_dora = true\nexclude = \"experts\"\n[train]\n";
    let shared = "[lora]\ntarget = \"experts\"\nexperts_share = \"outer\"\n[train]\n";
    let subset = "[lora]\ntarget = \"mlp.experts.3\"\n[train]\n";
    let full = "[train]\nmethod = \"full\"\nunfrozen_parameters = [\"mlp.experts.3\", \"norm\"]\n";
    let methods = [
        ("dora", dora, "lora_magnitude_vector"),
        ("shared", shared, "down_proj.lora_b"),
        ("subset", subset, "up_proj.lora_b"),
        ("full", full, "weights.trained.up_proj"),
    ];
    for (name, settings, reached) in methods {
        let audit = audit(&place, name, settings);
        let mut has_gradient = false;
        for tensor in &audit.tensors {
            let is_first = tensor.name.ends_with("lora_a");
            assert_eq!(
                tensor.zero == Some(ZeroGradient::SecondFactorIsZero),
                is_first,
                "{tensor:?}"
            );
            let is_known = is_first || matches!(tensor.zero, None | Some(ZeroGradient::NoToken));
            assert!(is_known, "{name}: {tensor:?}");
            has_gradient |= tensor.name.ends_with(reached) && tensor.norm > 0.0;
            let idle = &tensor.experts_without_token;
            assert!(
                idle.iter().all(|expert| *expert == 3 || name == "shared"),
                "{tensor:?}"
            );
        }
        assert!(has_gradient, "{name}: {audit:?}");
    }
}
