//! Whole training runs against the loss curves of an independent implementation, and against themselves resumed.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

/// What a run asks of its device.
mod device_use;
/// Runs whose experts ranks share out.
mod expert_ranks;
/// What is predicted of a run.
mod forecast;
/// Training held against other programs.
mod peers;
/// Learning from preferences.
mod preferences;
/// Runs on several ranks.
mod ranks;
/// Runs that go on in another process.
mod resuming;
/// Runs that are asked to stop, or have to.
mod stops;
/// Runs on other files than JSON lines.
mod tables;
/// What a run looks at while it goes on, and what it does about it.
mod watching;

#[path = "../../../../tests/goldens/paths.rs"]
mod goldens;

use std::path::{Path, PathBuf};

use checkpoint::Safetensors;
use kernels::device;
use moeforge_train::{Event, Recipe, RunDir, Session};

/// Relative error of a loss after up to ten updates: f32 rounding, grown by the updates between.
const CURVE: f64 = 1e-3;

/// A data folder with the golden's token ids as rows, and a recipe over it.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new(name: &str) -> Self {
        let folder = tempfile::tempdir().unwrap();
        let ids = Safetensors::open(&goldens::path(name).join("golden.safetensors"))
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
            goldens::path(self.name(model)),
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
        .fit(run, &mut |event: &Event| {
            if let Event::Step(report) = event {
                losses.push(report.loss)
            }
        })
        .unwrap();
    losses
}

fn open(recipe: Recipe) -> Session {
    Session::open(recipe, &device::of_tests(), &|model| Ok(model.into())).unwrap()
}

fn expected_curve(name: &str, key: &str) -> Vec<f64> {
    let file = if ["dora", "rslora"].contains(&key) {
        "methods.json"
    } else {
        "golden.json"
    };
    let json = std::fs::read_to_string(goldens::path(name).join(file)).unwrap();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
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
    for (name, adapter, key) in [
        ("deepseek_v2_lite", "adapter_peft", "lora_peft"),
        ("deepseek_v3", "adapter_peft", "lora_peft"),
        ("deepseek_v3", "adapter_dora", "dora"),
        ("deepseek_v3", "adapter_rslora", "rslora"),
        ("qwen2_distill", "adapter_dora", "dora"),
        ("qwen2_distill", "adapter_rslora", "rslora"),
    ] {
        let place = Place::new(name);
        let model = format!(
            "# {name}\nadapter = {:?}\n",
            goldens::path(name).join(adapter)
        );
        let recipe = place.recipe(
            &model,
            "[train]\nmethod = \"lora\"\nsteps = 11\nbatch_size = 2\nshuffle = false\n",
        );
        let run = RunDir::create(&place.path("run"), &recipe).unwrap();
        let found = losses(&mut open(recipe), &run);
        assert_curve(&found, &expected_curve(name, key), &format!("{name} {key}"));
    }
}

/// An adapter's tensors, trained for one step from fresh factors.
fn first_step(place: &Place, run: &str, settings: &str) -> Safetensors {
    let train = "[train]\nsteps = 1\nbatch_size = 2\nshuffle = false\n";
    let recipe = place.recipe("# deepseek_v3\n", &format!("{settings}{train}"));
    let run = RunDir::create(&place.path(run), &recipe).unwrap();
    losses(&mut open(recipe), &run);
    Safetensors::open(&run.path().join("adapter/adapter_model.safetensors")).unwrap()
}

#[test]
fn lora_plus_moves_the_second_factor_faster() {
    let place = Place::new("deepseek_v3");
    let plain = first_step(&place, "plain", "");
    let plus = first_step(&place, "plus", "[lora]\nloraplus_lr_ratio = 16\n");
    for tensor in plain.tensors() {
        let [before, after] = [&plain, &plus].map(|file| file.tensor(&tensor.name).unwrap());
        let [before, after] = [before, after].map(|tensor| tensor.to_f32().unwrap());
        // The second factors start at zero, so that they are their first update.
        let ratio = if tensor.name.ends_with("lora_B.weight") {
            16.0
        } else {
            1.0
        };
        for (before, after) in before.iter().zip(&after) {
            let expected = ratio * before;
            assert!(
                (after - expected).abs() <= 1e-5 * expected.abs(),
                "{}: {after}, expected {expected}",
                tensor.name
            );
        }
    }
}

#[test]
fn what_is_not_chosen_keeps_its_bytes() {
    let place = Place::new("deepseek_v3");
    let chosen = "unfrozen_parameters = [\"layers.1.mlp.experts.*\", \"norm\"]\n";
    for (settings, trained) in [
        (chosen, &["mlp.experts", "model.norm"][..]),
        (
            "router = \"frozen\"\n",
            &["mlp", "self_attn", "norm", "embed", "head"][..],
        ),
        (
            "router = \"bias-only\"\nbias_update_speed = 0.001\nunfrozen_parameters = \"norm\"\n",
            &["e_score_correction_bias", "model.norm"][..],
        ),
    ] {
        let recipe = place.recipe(
            "# deepseek_v3\n",
            &format!("[train]\nmethod = \"full\"\nsteps = 2\nbatch_size = 2\n{settings}"),
        );
        let run = tempfile::tempdir().unwrap();
        let run = RunDir::create(&run.path().join("run"), &recipe).unwrap();
        losses(&mut open(recipe), &run);
        let [before, after] = [goldens::path("deepseek_v3"), run.path().join("model")]
            .map(|path| checkpoint::Folder::open(&path).unwrap());
        let mut changed = 0;
        for name in before.names() {
            let [old, new] = [&before, &after].map(|folder| folder.tensor(name).unwrap());
            let router = name.ends_with("mlp.gate.weight");
            let may_change = !router && trained.iter().any(|part| name.contains(part));
            assert!(may_change || old.bytes == new.bytes, "{settings}: {name}");
            changed += usize::from(old.bytes != new.bytes);
        }
        assert!(changed > 0, "{settings}");
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

/// Every file of a result, for a comparison bit by bit. A card, and the manifest that has its hash, are left out: it says
/// which recipe and rows a run had, and those of the runs that are compared differ.
fn bytes(folder: &Path) -> Vec<(String, Vec<u8>)> {
    let has_card = folder.join("README.md").exists();
    let is_of_card =
        |file: &Path| file.ends_with("README.md") || file.ends_with("moeforge.manifest.json");
    let mut files: Vec<_> = std::fs::read_dir(folder)
        .unwrap()
        .map(|entry| entry.unwrap().path())
        .filter(|file| !(has_card && is_of_card(file)))
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
    // In f16 the scale falls at first and grows every other step; in FP8 the moments are bf16, rounded at random.
    let f16 = "[precision]\ncompute = \"f16\"\nloss_scale = 1099511627776.0\n\
               loss_scale_growth_interval = 2\n";
    let f16 = format!("{f16}{full}");
    let fp8 = format!("[precision]\ncompute = \"fp8\"\n{full}");
    let aware = lora.replace("dropout = 0.1", "quantizer = \"gguf:q4_0\"");
    let dora = lora.replace("[train]", "use_dora = true\nexclude = \"experts\"\n[train]");
    let shared = "loraplus_lr_ratio = 4.0\nexperts_share = \"outer\"\n[train]";
    let shared = lora.replace("[train]", shared);
    let some = format!("{full}unfrozen_parameters = [\"layers.2.mlp.experts.3\", \"self_attn\"]\n");
    for (settings, result) in [
        (lora, "adapter"),
        (full, "model"),
        (f16, "model"),
        (fp8, "model"),
        (aware, "adapter"),
        (dora, "adapter"),
        (shared, "adapter"),
        (some, "model"),
    ] {
        resumed_run_is_whole(&settings, result);
    }
}

fn resumed_run_is_whole(settings: &str, result: &str) {
    resumed_run_is_whole_in(&Place::new("deepseek_v3"), settings, result);
}

fn resumed_run_is_whole_in(place: &Place, settings: &str, result: &str) {
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

/// Steps and overflows of a run, and the scale of the loss in every step.
fn scaled_run(place: &Place, name: &str, scale: f64) -> (Vec<f64>, Vec<(u64, f64)>, Vec<f64>) {
    let settings = format!(
        "[precision]\ncompute = \"f16\"\nloss_scale = {scale:?}\n\
         [train]\nmethod = \"full\"\nsteps = 4\nbatch_size = 1\naccumulate = 2\n"
    );
    let recipe = place.recipe("# deepseek_v3\n", &settings);
    let run = RunDir::create(&place.path(name), &recipe).unwrap();
    let (mut losses, mut overflows, mut scales) = (Vec::new(), Vec::new(), Vec::new());
    open(recipe)
        .fit(&run, &mut |event: &Event| match event {
            Event::Step(report) => {
                losses.push(report.loss);
                scales.push(report.loss_scale.unwrap());
            }
            Event::Overflowed { step, loss_scale } => overflows.push((*step, *loss_scale)),
            _ => {}
        })
        .unwrap();
    (losses, overflows, scales)
}

#[test]
fn an_overflow_in_f16_costs_no_data() {
    let place = Place::new("deepseek_v3");
    let (losses, overflows, scales) = scaled_run(&place, "overflowing", 2f64.powi(60));
    assert!(overflows.len() > 10, "{overflows:?}");
    assert!(
        overflows.iter().all(|(step, _)| *step == 1),
        "{overflows:?}"
    );
    assert_eq!(overflows.last().unwrap().1, scales[0]);

    // The run is the one that started with the scale it found.
    let (expected, none, same) = scaled_run(&place, "calm", scales[0]);
    assert!(none.is_empty(), "{none:?}");
    assert_eq!((losses, scales), (expected, same));
    let model = |run: &str| bytes(&place.path(run).join("model"));
    assert_eq!(model("overflowing"), model("calm"));
}

#[test]
fn fully_trained_fp8_models_are_fp8_again() {
    let place = Place::new("deepseek_v3_fp8");
    let recipe = place.recipe(
        "# deepseek_v3_fp8\n",
        "[precision]\ncompute = \"fp8\"\n[train]\nmethod = \"full\"\nsteps = 3\nbatch_size = 2\n",
    );
    let run = RunDir::create(&place.path("run"), &recipe).unwrap();
    let losses = losses(&mut open(recipe), &run);
    assert!(losses[2] < losses[0], "{losses:?}");
    let (before, after) = (
        checkpoint::Folder::open(&goldens::path("deepseek_v3_fp8")).unwrap(),
        checkpoint::Folder::open(&place.path("run/model")).unwrap(),
    );
    let mut names = [&before, &after].map(|folder| folder.names().collect::<Vec<_>>());
    names.iter_mut().for_each(|names| names.sort_unstable());
    assert_eq!(names[0], names[1]);
    for name in before.names() {
        let [old, new] = [&before, &after].map(|folder| folder.tensor(name).unwrap());
        assert_eq!((old.dtype, &old.shape), (new.dtype, &new.shape), "{name}");
    }
    assert_eq!(
        before.config()["quantization_config"],
        after.config()["quantization_config"]
    );
    // In FP8 products its codes are what the same run's bf16 export rounds to.
    let wide = place.recipe(
        "# deepseek_v3_fp8\n",
        "[precision]\ncompute = \"fp8\"\n[train]\nmethod = \"full\"\nsteps = 3\nbatch_size = 2\n\
         export_dtype = \"bf16\"\n",
    );
    let run = RunDir::create(&place.path("wide"), &wide).unwrap();
    self::losses(&mut open(wide.clone()), &run);
    let [narrow, wide] = ["run", "wide"].map(|name| {
        let mut recipe = wide.clone();
        recipe.model.path = Some(place.path(name).join("model").display().to_string());
        recipe.train.steps = Some(1);
        let run = RunDir::create(&place.path(&format!("{name} again")), &recipe).unwrap();
        self::losses(&mut open(recipe), &run)[0]
    });
    // bf16 rounds before FP8 does, and a random model's routing turns on little.
    assert!((narrow / wide - 1.0).abs() < 0.1, "{narrow} {wide}");
    assert!(
        narrow < losses[2] && losses[2] > 1.3 * wide,
        "{narrow} {losses:?}"
    );
}
