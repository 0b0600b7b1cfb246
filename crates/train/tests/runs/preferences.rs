//! Training on pairs of answers.

use moeforge_train::{Event, Recipe, RunDir};
use serde_json::Value;

use super::watching::{Notes, fit, lines};
use super::{Place, bytes, open, resumed_run_is_whole_in};

/// Turns the rows of a place into preferences, with a validation split of the same.
pub(super) fn preferences(place: &Place) {
    let text = std::fs::read_to_string(place.path("train.jsonl")).unwrap();
    let rows: Vec<Value> = text
        .lines()
        .map(|row| serde_json::from_str(row).unwrap())
        .collect();
    let ids = |row: usize, range: std::ops::Range<usize>| -> Vec<i64> {
        let ids = rows[row]["input_ids"].as_array().unwrap();
        ids[range]
            .iter()
            .map(|id| 33 + id.as_i64().unwrap() % 90)
            .collect()
    };
    let word = |row, range| -> String {
        let ids = ids(row, range);
        ids.into_iter().map(|id| char::from(id as u8)).collect()
    };
    let pair = |i: usize| {
        let (prompt, chosen, rejected) =
            (word(0, i..i + 6), word(0, i + 6..i + 11), word(1, i..i + 8));
        serde_json::json!({"prompt": prompt, "chosen": chosen, "rejected": rejected}).to_string()
    };
    let rows: Vec<String> = (0..6).map(|i| pair(2 * i) + "\n").collect();
    for name in ["train.jsonl", "valid.jsonl"] {
        std::fs::write(place.path(name), rows.concat()).unwrap();
    }
}

#[test]
fn preferences_are_learned_from_a_start_at_ln_2() {
    let place = Place::new("deepseek_v3");
    preferences(&place);
    for method in [
        "method = \"lora\"",
        "method = \"full\"\nunfrozen_parameters = \"self_attn\"",
    ] {
        let recipe = place.recipe(
            "# deepseek_v3\n",
            &format!(
                "[train]\n{method}\nloss = \"dpo\"\nsteps = 12\nbatch_size = 3\naccumulate = 2\n"
            ),
        );
        let run = tempfile::tempdir().unwrap();
        let run = RunDir::create(&run.path().join("run"), &recipe).unwrap();
        let (mut reports, mut validated) = (Vec::new(), Vec::new());
        open(recipe)
            .fit(&run, &mut |event: &Event| match event {
                Event::Step(report) => reports.push(report.clone()),
                Event::Validated { loss, .. } => validated.push(*loss),
                _ => {}
            })
            .unwrap();
        // The model and its reference differ in nothing but in where a weight is read from.
        let (first, last) = (&reports[0], &reports[11]);
        assert!(
            (first.loss - std::f64::consts::LN_2).abs() < 1e-4,
            "{}",
            first.loss
        );
        assert!(first.rewards.unwrap().margin.abs() < 1e-3, "{first:?}");
        assert!(last.loss < 0.9 * first.loss, "{} {}", first.loss, last.loss);
        assert_eq!(last.rewards.unwrap().accuracy, 1.0);
        assert!(validated[0] < first.loss, "{validated:?}");
        let metrics = std::fs::read_to_string(run.path().join("metrics.jsonl")).unwrap();
        assert!(metrics.contains("\"rewards/margins\":"), "{metrics}");
        assert!(
            metrics.contains("\"valid_rewards/accuracies\":1.0"),
            "{metrics}"
        );
    }
}

#[test]
fn a_resumed_run_of_preferences_ends_in_the_same_bits() {
    let settings = "[lora]\ndropout = 0.1\n[train]\nloss = \"dpo\"\nsteps = 6\nbatch_size = 2\n\
                    save_every = 2\nkeep_last = 9\n";
    let place = Place::new("deepseek_v3");
    preferences(&place);
    resumed_run_is_whole_in(&place, settings, "adapter");
}

#[test]
fn a_run_of_preferences_ends_when_the_validation_loss_rises_and_leaves_the_best() {
    let place = Place::new("deepseek_v3");
    preferences(&place);
    // What is preferred in training is what should not be.
    let swap = |row: &str| {
        let mut row: Value = serde_json::from_str(row).unwrap();
        let (chosen, rejected) = (row["chosen"].take(), row["rejected"].take());
        (row["chosen"], row["rejected"]) = (rejected, chosen);
        row.to_string() + "\n"
    };
    let rows = std::fs::read_to_string(place.path("train.jsonl")).unwrap();
    let swapped: String = rows.lines().map(swap).collect();
    std::fs::write(place.path("valid.jsonl"), swapped).unwrap();
    let settings = "[train]\nloss = \"dpo\"\nsteps = 30\nbatch_size = 2\nlog_every = 1\neval_every = 2\n\
                    keep_last = 1\nkeep_best = true\n[eval]\npatience = 2\nbatch_size = 4\n";
    let recipe = place.recipe("# deepseek_v3\n", settings);
    let whole = RunDir::create(&place.path("whole"), &recipe).unwrap();
    let mut notes = Notes::default();
    fit(&recipe, &whole, &mut notes).unwrap();
    assert_eq!((notes.best, notes.step), (Some(2), 6), "{:?}", notes.valid);
    let drifts: Vec<f64> = notes
        .valid
        .iter()
        .filter_map(|(.., drift)| *drift)
        .collect();
    assert!(drifts.len() == 3 && drifts[2] > 0.0, "{drifts:?}");
    let last = &lines(whole.path(), "valid_loss")[2];
    assert!(
        last["valid_rewards/margins"].as_f64().unwrap() < 0.0,
        "{last}"
    );

    // Both answers of a pair are routed.
    let step = &lines(whole.path(), "tokens")[0];
    let config = open(recipe.clone()).base_folder().unwrap().config().clone();
    let slots = step["tokens"].as_u64().unwrap() * config["num_experts_per_tok"].as_u64().unwrap();
    let load = &lines(whole.path(), "experts")[0]["experts"][0]["load"];
    let load: Vec<u64> = serde_json::from_value(load.clone()).unwrap();
    assert_eq!(load.iter().sum::<u64>(), slots);

    let part = RunDir::create(&place.path("part"), &recipe).unwrap();
    let mut notes = Notes::stopping_after(3);
    fit(&recipe, &part, &mut notes).unwrap_err();
    fit(&recipe, &part, &mut Notes::default()).unwrap();
    for result in ["adapter", "checkpoint-6"] {
        let [whole, part] = [&whole, &part].map(|run| bytes(&run.path().join(result)));
        assert_eq!(whole, part, "{result}");
    }
}

#[test]
fn an_update_that_does_nothing_leaves_the_reference() {
    let place = Place::new("deepseek_v3");
    preferences(&place);
    let subset = "[lora]\ntarget = [\"mlp.experts.1\", \"mlp.experts.2\", \"self_attn\"]\n";
    for settings in [
        "",
        subset,
        "[lora]\nuse_dora = true\nexclude = \"experts\"\n",
        "[lora]\nexperts_share = \"outer\"\n",
        "[lora]\nquantizer = \"gguf:q4_0\"\n",
        "[train]\nrouter = \"trainable\"\n",
        "[train]\nmethod = \"full\"\n",
    ] {
        place.recipe("# deepseek_v3\n", settings);
        let set = [
            "train.loss=dpo",
            "train.steps=1",
            "optimizer.learning_rate=1e-30",
            "optimizer.weight_decay=0",
        ];
        let set = set.map(str::to_owned);
        let recipe = Recipe::open(&place.path("recipe.toml"), &set).unwrap();
        let run = tempfile::tempdir().unwrap();
        let run = RunDir::create(&run.path().join("run"), &recipe).unwrap();
        let mut notes = Notes::default();
        fit(&recipe, &run, &mut notes).unwrap();
        let (_, loss, drift) = notes.valid[0];
        assert!(
            (loss - std::f64::consts::LN_2).abs() < 1e-5,
            "{settings}: {loss}"
        );
        assert_eq!(drift, Some(0.0), "{settings}");
    }
}
