//! Runs that go on: to a later end, after an interrupted validation pass, with files that are elsewhere or gone.

use moeforge_train::{Error, Event, Host, Recipe, RunDir};
use serde_json::Value;

use super::watching::{Notes, fit, lines};
use super::{Place, bytes, goldens, losses, open};

const STEPS: &str = "[train]\nsteps = 4\nbatch_size = 1\nsave_every = 3\n";

/// Goes on with a run as the program does: its recipe with changes, and its files where they are.
fn go_on(run: &RunDir, set: &[&str], host: &mut dyn Host) -> Result<(), Error> {
    let set: Vec<String> = set.iter().map(|&setting| setting.to_owned()).collect();
    let recipe = run.changed_recipe(&set)?;
    let mut session = open(run.locate(&recipe)?);
    session.resume(run)?;
    run.replace_recipe(&recipe)?;
    session.fit(run, host)
}

fn refused(found: Result<(), Error>, words: &[&str]) {
    let error = found.unwrap_err().to_string();
    for word in words {
        assert!(error.contains(word), "`{word}` is not in: {error}");
    }
}

#[test]
fn a_finished_run_goes_on_to_the_bits_of_a_longer_one() {
    for method in ["lora", "full"] {
        let place = Place::new("deepseek_v3");
        let recipe = place.recipe(
            "# deepseek_v3\n",
            &format!("{STEPS}method = \"{method}\"\n"),
        );
        let mut longer = recipe.clone();
        longer.train.steps = Some(9);
        let whole = RunDir::create(&place.path("whole"), &longer).unwrap();
        losses(&mut open(longer), &whole);

        let part = RunDir::create(&place.path("part"), &recipe).unwrap();
        losses(&mut open(recipe), &part);
        let result = if method == "lora" { "adapter" } else { "model" };
        let first = bytes(&place.path("part").join(result));
        let stopped = go_on(&part, &["train.steps=9"], &mut Notes::stopping_after(7));
        assert!(matches!(stopped, Err(Error::Interrupted { step: 7, .. })));
        // The old result has another name, and whoever resumes the run goes on to its new end.
        assert!(!place.path("part").join(result).exists());
        assert_eq!(
            bytes(&place.path("part").join(format!("{result}-4"))),
            first
        );
        assert_eq!(part.recipe().unwrap().train.steps, Some(9));
        go_on(&part, &[], &mut Notes::default()).unwrap();
        for name in [result, "checkpoint-9"] {
            let [whole, part] = ["whole", "part"].map(|run| bytes(&place.path(run).join(name)));
            assert!(whole == part, "{method}: {name}");
        }
    }
}

#[test]
fn what_may_not_change_in_a_run_is_refused_by_name() {
    let place = Place::new("deepseek_v3");
    let recipe = place.recipe("# deepseek_v3\n", STEPS);
    let path = place.path("run");
    let run = RunDir::create(&path, &recipe).unwrap();
    losses(&mut open(recipe), &run);
    let before = (
        bytes(&path.join("adapter")),
        std::fs::read(path.join("recipe.toml")).unwrap(),
    );
    let go_on = |set: &[&str]| go_on(&run, set, &mut Notes::default());
    refused(
        go_on(&["lora.rank=4"]),
        &["lora.rank, which was `8` and is `4`"],
    );
    refused(
        go_on(&[
            "train.steps=9",
            "train.seed=7",
            "optimizer.betas=[0.9, 0.95]",
        ]),
        &[
            "optimizer.betas, which was `[0.9, 0.999]`",
            "train.seed, which was `0` and is `7`",
        ],
    );
    refused(go_on(&["train.steps=2"]), &["at least 4 steps", "found 2"]);
    let other = format!("model.path={}", goldens::path("deepseek_v2_lite").display());
    refused(
        go_on(&[&other]),
        &["checkpoint-4", "another model", "model.path"],
    );
    refused(
        go_on(&["data.path=nowhere"]),
        &["data.path", "nowhere", "--set data.path=…"],
    );
    let rows = tempfile::tempdir().unwrap();
    std::fs::write(
        rows.path().join("train.jsonl"),
        "{\"input_ids\": [1, 2, 3]}\n",
    )
    .unwrap();
    let rows = format!("data.path={}", rows.path().display());
    refused(go_on(&[&rows]), &["other training rows"]);
    let after = (
        bytes(&path.join("adapter")),
        std::fs::read(path.join("recipe.toml")).unwrap(),
    );
    assert_eq!(after, before);
}

#[test]
fn what_is_changed_in_a_runs_recipe_by_hand_is_refused_by_name() {
    let place = Place::new("deepseek_v3");
    let recipe = place.recipe("# deepseek_v3\n", STEPS);
    let run = RunDir::create(&place.path("run"), &recipe).unwrap();
    losses(&mut open(recipe), &run);
    let path = place.path("run/recipe.toml");
    let text = std::fs::read_to_string(&path).unwrap();
    std::fs::write(&path, text.replace("rank = 8", "rank = 9")).unwrap();
    let found = go_on(&run, &[], &mut Notes::default());
    refused(
        found,
        &["checkpoint-4", "lora.rank, which was `8` and is `9`"],
    );
}

/// Asks to stop in a validation pass, after some batches of all passes together.
#[derive(Default)]
struct Interrupting {
    batches: u64,
    stop_after: Option<u64>,
    totals: Vec<u64>,
}

impl Host for Interrupting {
    fn see(&mut self, event: &Event) {
        if let Event::Validating(progress) = event {
            self.batches += 1;
            self.totals.push(progress.total);
            assert!(progress.batches <= progress.total && progress.tokens > 0);
        }
    }

    fn interrupted(&mut self) -> Option<i32> {
        (self.stop_after == Some(self.batches)).then_some(2)
    }
}

/// The lines of a run's metrics, without times.
fn metrics(run: &RunDir) -> Vec<Value> {
    let mut lines = lines(run.path(), "step");
    for line in &mut lines {
        line.as_object_mut().unwrap().remove("seconds");
    }
    lines
}

#[test]
fn a_validation_pass_stops_at_any_batch_and_is_made_again() {
    let place = Place::new("deepseek_v3");
    std::fs::copy(place.path("train.jsonl"), place.path("valid.jsonl")).unwrap();
    let settings = "[train]\nsteps = 4\nbatch_size = 1\neval_every = 2\nsave_every = 2\nkeep_best = true\nlog_every = 1\n\
                    [eval]\nbatch_size = 1\n";
    let recipe = place.recipe("# deepseek_v3\n", settings);
    let whole = RunDir::create(&place.path("whole"), &recipe).unwrap();
    let mut host = Interrupting::default();
    open(recipe.clone()).fit(&whole, &mut host).unwrap();
    // Two rows; the first pass has the reference's routing too.
    assert_eq!(host.totals, [4, 4, 4, 4, 2, 2]);

    for stop_after in 1..host.batches {
        let name = format!("stopped-{stop_after}");
        let part = RunDir::create(&place.path(&name), &recipe).unwrap();
        let mut host = Interrupting {
            stop_after: Some(stop_after),
            ..Interrupting::default()
        };
        let stopped = open(recipe.clone()).fit(&part, &mut host);
        assert!(
            matches!(stopped, Err(Error::Interrupted { .. })),
            "{stop_after}: {stopped:?}"
        );
        assert_eq!(host.batches, stop_after);
        // Once more, in the pass that is made again.
        let mut again = Interrupting {
            stop_after: Some(1),
            ..Interrupting::default()
        };
        fit_with(&recipe, &part, &mut again).unwrap_err();
        fit_with(&recipe, &part, &mut Interrupting::default()).unwrap();
        assert_eq!(metrics(&part), metrics(&whole), "{stop_after}");
        for result in ["adapter", "checkpoint-2", "checkpoint-4"] {
            let [whole, part] = [&whole, &part].map(|run| bytes(&run.path().join(result)));
            assert!(whole == part, "{stop_after}: {result}");
        }
    }
}

fn fit_with(recipe: &Recipe, run: &RunDir, host: &mut dyn Host) -> Result<(), Error> {
    let mut session = open(recipe.clone());
    session.resume(run)?;
    session.fit(run, host)
}

#[test]
fn what_was_measured_after_an_interrupted_pass_is_not_measured_twice() {
    let place = Place::new("deepseek_v3");
    std::fs::copy(place.path("train.jsonl"), place.path("valid.jsonl")).unwrap();
    let settings = "[train]\nsteps = 3\nbatch_size = 1\neval_every = 1\nlog_every = 1\n[eval]\nbatch_size = 1\n";
    let recipe = place.recipe("# deepseek_v3\n", settings);
    let whole = RunDir::create(&place.path("whole"), &recipe).unwrap();
    open(recipe.clone())
        .fit(&whole, &mut Interrupting::default())
        .unwrap();
    let part = RunDir::create(&place.path("part"), &recipe).unwrap();
    let mut host = Interrupting {
        stop_after: Some(1),
        ..Interrupting::default()
    };
    open(recipe.clone()).fit(&part, &mut host).unwrap_err();
    // A process that measures everything and is killed before it saves leaves its lines and the old checkpoint.
    let saved = tempfile::tempdir().unwrap();
    for (name, content) in bytes(&part.path().join("checkpoint-1")) {
        std::fs::write(saved.path().join(name), content).unwrap();
    }
    fit(&recipe, &part, &mut Notes::default()).unwrap();
    for name in ["checkpoint-3", "adapter"] {
        std::fs::remove_dir_all(part.path().join(name)).unwrap();
    }
    std::fs::remove_dir_all(part.path().join("checkpoint-1")).unwrap();
    std::fs::create_dir(part.path().join("checkpoint-1")).unwrap();
    for (name, content) in bytes(saved.path()) {
        std::fs::write(part.path().join("checkpoint-1").join(name), content).unwrap();
    }
    fit(&recipe, &part, &mut Notes::default()).unwrap();
    assert_eq!(metrics(&part), metrics(&whole));
}

/// Runs a recipe over rows, and returns its losses and its result.
fn result_of(
    place: &Place,
    name: &str,
    rows: &[&str],
    settings: &str,
) -> (Vec<f64>, Vec<(String, Vec<u8>)>) {
    let folder = place.path(name);
    std::fs::create_dir(&folder).unwrap();
    for split in ["train.jsonl", "valid.jsonl"] {
        std::fs::write(folder.join(split), rows.join("\n")).unwrap();
    }
    place.recipe("# deepseek_v3\n", settings);
    let is_packed = settings.contains("data.packing=true");
    let set = [
        format!("data.path={}", folder.display()),
        "data.max_length=12".to_owned(),
        format!("data.packing={is_packed}"),
    ];
    let recipe = Recipe::open(&place.path("recipe.toml"), &set).unwrap();
    let run = RunDir::create(&folder.join("run"), &recipe).unwrap();
    let mut session = open(recipe);
    let left_out = if rows.len() > 3 { rows.len() - 3 } else { 0 };
    let per_row = if settings.contains("dpo") { 2 } else { 1 };
    assert_eq!(session.train.corpus.left_out, left_out * per_row);
    assert_eq!(session.valid.as_ref().unwrap().left_out, left_out * per_row);
    let losses = losses(&mut session, &run);
    let counts = &lines(run.path(), "data")[0]["data"];
    for split in ["train", "valid"] {
        assert_eq!(counts[split]["samples"], 3 * per_row, "{counts}");
        assert_eq!(counts[split]["left_out"], left_out * per_row, "{counts}");
    }
    let valid = lines(run.path(), "valid_loss")[0]["valid_loss"]
        .as_f64()
        .unwrap();
    (
        losses.into_iter().chain([valid]).collect(),
        bytes(&folder.join("run/adapter")),
    )
}

#[test]
fn rows_with_nothing_to_train_on_are_as_if_they_were_not_there() {
    let rows = |n: usize| format!("{{\"input_ids\": {:?}}}", (n..n + 7).collect::<Vec<_>>());
    let [a, b, c] = [10, 20, 30].map(rows);
    let masked = "{\"input_ids\": [5, 6, 7], \"labels\": [-100, -100, -100]}";
    let cut = format!(
        "{{\"prompt\": \"{}\", \"completion\": \"y\"}}",
        "x ".repeat(20)
    );
    let pair =
        |n: usize| format!("{{\"prompt\": \"p{n}\", \"chosen\": \"b{n}\", \"rejected\": \"c\"}}");
    let [d, e, f] = [1, 2, 3].map(pair);
    let cut_pair = format!(
        "{{\"prompt\": \"{}\", \"chosen\": \"b\", \"rejected\": \"c\"}}",
        "x ".repeat(20)
    );
    let train = "[train]\nsteps = 4\nbatch_size = 2\n";
    let packed = format!("{train}# data.packing=true\n");
    let dpo = format!("{train}loss = \"dpo\"\n");
    let samples = (vec![&*a, masked, &b, &cut, masked, &c], vec![&*a, &b, &c]);
    let pairs = (vec![&*cut_pair, &d, &e, &cut_pair, &f], vec![&*d, &e, &f]);
    for (settings, (with, without)) in [
        (train, &samples),
        (packed.as_str(), &samples),
        (&dpo, &pairs),
    ] {
        let place = Place::new("deepseek_v3");
        let found = result_of(&place, "with", with, settings);
        let expected = result_of(&place, "without", without, settings);
        assert_eq!(found, expected, "{settings}");
    }
}

#[test]
fn preferences_are_learned_relative_to_the_adapter_that_a_run_starts_from() {
    let place = Place::new("deepseek_v3");
    super::preferences::preferences(&place);
    let adapter = place.path("start");
    std::fs::create_dir(&adapter).unwrap();
    for (name, content) in bytes(&goldens::path("deepseek_v3/adapter_classic")) {
        std::fs::write(adapter.join(name), content).unwrap();
    }
    let model = format!("# deepseek_v3\nadapter = {adapter:?}\n");
    let settings = "[train]\nloss = \"dpo\"\nsteps = 5\nbatch_size = 2\nsave_every = 2\n";
    let recipe = place.recipe(&model, settings);
    let whole = RunDir::create(&place.path("whole"), &recipe).unwrap();
    let curve = losses(&mut open(recipe.clone()), &whole);
    // Nothing is preferred yet, to the bit.
    assert!(
        (curve[0] - std::f64::consts::LN_2).abs() < 1e-7,
        "{curve:?}"
    );
    let base = place.recipe(&model, &format!("{settings}[dpo]\nreference = \"base\"\n"));
    let run = RunDir::create(&place.path("base"), &base).unwrap();
    let of_base = losses(&mut open(base), &run);
    assert!(
        (of_base[0] - std::f64::consts::LN_2).abs() > 1e-4,
        "{of_base:?}"
    );

    // The reference outlives the files that it was read from.
    let part = RunDir::create(&place.path("part"), &recipe).unwrap();
    fit(&recipe, &part, &mut Notes::stopping_after(3)).unwrap_err();
    std::fs::remove_dir_all(&adapter).unwrap();
    go_on(&part, &[], &mut Notes::default()).unwrap();
    for result in ["adapter", "checkpoint-5"] {
        let [whole, part] = [&whole, &part].map(|run| bytes(&run.path().join(result)));
        assert!(whole == part, "{result}");
    }
}
