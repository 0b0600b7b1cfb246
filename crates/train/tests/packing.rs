//! Packed rows against the same samples side by side, and runs on packed, weighted and grouped data resumed.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

#[path = "../../../tests/goldens/paths.rs"]
mod goldens;

use std::path::{Path, PathBuf};

use burn::tensor::{Device, Int, Tensor, TensorData};
use data::{Batch, Packing, Sample, collate, collate_rows};
use kernels::Segments;
use model::{Compute, ForwardContext, Model, Training, load};
use moeforge_train::{Event, Recipe, RunDir, Session, SessionOptions, StepReport};

/// f32 sums in another order, relative to the largest gradient of a parameter.
const TOLERANCE: f32 = 1e-4;

/// The token ids of samples of many lengths, one longer than a tile of attention.
fn ids() -> Vec<Vec<u32>> {
    let lengths = [70, 3, 17, 2, 41, 30, 9, 64, 5, 22];
    let row = |(i, len): (u32, u32)| (0..len).map(|j| (i * 31 + j * j * 7 + 5) % 280).collect();
    (0..).zip(lengths).map(row).collect()
}

fn samples() -> Vec<Sample> {
    let sample = |(i, ids): (usize, Vec<u32>)| Sample {
        trained: (0..ids.len()).map(|j| j > 0 && (i + j) % 5 != 0).collect(),
        ids,
        trained_bytes: 0,
        truncated: false,
    };
    ids().into_iter().enumerate().map(sample).collect()
}

/// The summed loss of a batch, and the gradients of all weights.
fn gradients(model: &Model, batch: &Batch, device: &Device) -> (f32, Vec<(String, Vec<f32>)>) {
    let tensor = |values: &[i32]| {
        let data = TensorData::new(values.to_vec(), [batch.rows, batch.cols]);
        Tensor::<2, Int>::from_data(data, device)
    };
    let mut ctx = ForwardContext::new(Compute::F32);
    if batch.is_packed() {
        ctx.segments = Segments::packed(batch.starts.clone());
    }
    let hidden = model.hidden(tensor(&batch.input_ids), &mut ctx);
    let loss = model.loss(hidden, tensor(&batch.targets), &ctx).sum();
    let value = loss.clone().inner().into_scalar::<f32>();
    let mut gradients = loss.backward();
    let values = |tensor: Tensor<1>| tensor.into_data().try_to_vec().unwrap();
    let named = model.gradients(&mut gradients).into_iter();
    (
        value,
        named.map(|(name, tensor)| (name, values(tensor))).collect(),
    )
}

#[test]
fn packed_samples_have_the_loss_and_gradients_of_samples_apart() {
    let samples = samples();
    let lengths: Vec<u32> = samples
        .iter()
        .map(|sample| sample.ids.len() as u32)
        .collect();
    let packing = Packing::best_fit(&lengths, 80);
    let rows: Vec<Vec<&Sample>> = (0..packing.n_rows())
        .map(|row| packing.row(row).into_iter().map(|i| &samples[i]).collect())
        .collect();
    let packed = collate_rows(&rows.iter().map(Vec::as_slice).collect::<Vec<_>>(), 1);
    let apart = collate(&samples.iter().collect::<Vec<_>>(), 1);
    assert!(packed.rows < 5 && packed.trained_tokens == apart.trained_tokens);

    let device = Device::flex().autodiff();
    for name in [
        "deepseek_v2_lite",
        "deepseek_v3",
        "qwen2_distill",
        "llama_distill",
    ] {
        let folder = checkpoint::Folder::open(&goldens::path(name)).unwrap();
        let model = load::load(&folder, Training::Full, &device).unwrap();
        let (loss, found) = gradients(&model, &packed, &device);
        let (expected_loss, expected) = gradients(&model, &apart, &device);
        assert!(
            (loss / expected_loss - 1.0).abs() < 1e-5,
            "{name}: {loss} {expected_loss}"
        );
        assert_eq!(found.len(), expected.len());
        for ((parameter, found), (_, expected)) in found.iter().zip(&expected) {
            let largest = expected
                .iter()
                .fold(0f32, |largest, g| largest.max(g.abs()));
            let close = |(f, e): (&f32, &f32)| (f - e).abs() <= TOLERANCE * largest;
            assert!(found.iter().zip(expected).all(close), "{name} {parameter}");
        }
        // Without walls it is another loss: this test can fail.
        let unwalled = Batch {
            starts: vec![vec![0]; packed.rows],
            ..packed.clone()
        };
        let (mixed, _) = gradients(&model, &unwalled, &device);
        assert!(
            (mixed / expected_loss - 1.0).abs() > 1e-4,
            "{name}: {mixed}"
        );
    }
}

/// Two folders of rows, and a recipe over both.
struct Place {
    folder: tempfile::TempDir,
}

impl Place {
    fn new() -> Self {
        let folder = tempfile::tempdir().unwrap();
        let lines: Vec<String> = ids()
            .iter()
            .map(|ids| format!("{{\"input_ids\": {ids:?}}}\n"))
            .collect();
        for (name, lines) in [("a", &lines[..7]), ("b", &lines[7..])] {
            std::fs::create_dir(folder.path().join(name)).unwrap();
            std::fs::write(folder.path().join(name).join("train.jsonl"), lines.concat()).unwrap();
        }
        Self { folder }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.folder.path().join(name)
    }

    fn recipe(&self, model: &str, data: &str, settings: &str) -> Recipe {
        let text = format!(
            "[model]\npath = {:?}\n[data]\npath = [{:?}, {:?}]\nmax_length = 80\n{data}{settings}",
            goldens::path(model),
            self.path("a"),
            self.path("b")
        );
        std::fs::write(self.path("recipe.toml"), text).unwrap();
        Recipe::open(&self.path("recipe.toml"), &[]).unwrap()
    }

    fn open(&self, recipe: Recipe) -> Session {
        let device = Device::flex();
        let options = SessionOptions {
            token_cache: Some(&self.path("cache")),
            ..SessionOptions::new(&device, &|model| Ok(model.into()))
        };
        Session::open_with(recipe, options).unwrap()
    }
}

fn reports(session: &mut Session, run: &RunDir) -> Vec<StepReport> {
    let mut reports = Vec::new();
    session
        .fit(run, &mut |event: &Event| {
            if let Event::Step(report) = event {
                reports.push(report.clone());
            }
        })
        .unwrap();
    reports
}

#[test]
fn packed_runs_are_runs_of_the_same_samples_apart() {
    let place = Place::new();
    let run = |name: &str, data: &str, batch_size: usize| {
        let settings = format!(
            "[train]\nmethod = \"full\"\nsteps = 3\nbatch_size = {batch_size}\nbalance_loss = 0.1\nlog_every = 1\n"
        );
        let recipe = place.recipe("deepseek_v3", data, &settings);
        let run = RunDir::create(&place.path(name), &recipe).unwrap();
        reports(&mut place.open(recipe), &run)
    };
    let packed = run("packed", "packing = true\n", 4);
    let apart = run("apart", "", 10);
    for (packed, apart) in packed.iter().zip(&apart) {
        let close = |a: f64, b: f64| (a / b - 1.0).abs() < 1e-3;
        assert!(close(packed.loss, apart.loss), "{packed:?} {apart:?}");
        assert!(
            close(packed.grad_norm, apart.grad_norm),
            "{packed:?} {apart:?}"
        );
        let [a, b] = [packed, apart].map(|report| report.balance_loss.unwrap());
        assert!(close(a, b), "{packed:?} {apart:?}");
        assert_eq!(
            (packed.tokens, packed.trained_tokens),
            (apart.tokens, apart.trained_tokens)
        );
    }
    assert_eq!(packed.len(), 3);
    // The same tokens meet the same routers, and no padding is counted.
    let [found, expected] = ["packed", "apart"].map(|name| first_experts(&place.path(name)));
    assert!(
        !expected.is_empty() && found == expected,
        "{found:?} {expected:?}"
    );
}

/// What each expert got in the first step, by layer.
fn first_experts(run: &Path) -> Vec<Vec<u64>> {
    let text = std::fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let line = text
        .lines()
        .find(|line| line.contains("\"experts\""))
        .unwrap();
    let line: serde_json::Value = serde_json::from_str(line).unwrap();
    let layers = line["experts"].as_array().unwrap().iter();
    layers
        .map(|layer| serde_json::from_value(layer["load"].clone()).unwrap())
        .collect()
}

fn bytes(folder: &Path) -> Vec<(PathBuf, Vec<u8>)> {
    let entries = std::fs::read_dir(folder).unwrap();
    let mut files: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    files.sort();
    let read = |file: PathBuf| {
        (
            file.file_name().unwrap().into(),
            std::fs::read(&file).unwrap(),
        )
    };
    files.into_iter().map(read).collect()
}

#[test]
fn resumed_runs_see_the_same_batches() {
    let settings =
        "[train]\nmethod = \"lora\"\nsteps = 8\nbatch_size = 2\nsave_every = 3\nkeep_last = 9\n";
    for data in [
        "packing = true\n",
        "weights = [1, 2.5]\n",
        "group_by_length = true\n",
        "weights = [1, 2.5]\npacking = true\n",
        "weights = [3, 1]\ngroup_by_length = true\n",
    ] {
        let place = Place::new();
        let recipe = place.recipe("qwen2_distill", data, settings);
        let whole = RunDir::create(&place.path("whole"), &recipe).unwrap();
        reports(&mut place.open(recipe.clone()), &whole);
        let part = RunDir::create(&place.path("part"), &recipe).unwrap();
        std::fs::create_dir(place.path("part/checkpoint-3")).unwrap();
        for (name, content) in bytes(&place.path("whole/checkpoint-3")) {
            std::fs::write(place.path("part/checkpoint-3").join(name), content).unwrap();
        }
        // The token cache may go at any time.
        std::fs::remove_dir_all(place.path("cache")).unwrap();
        let mut session = place.open(recipe.clone());
        assert_eq!(session.resume(&part).unwrap(), Some(3));
        assert_eq!(reports(&mut session, &part).len(), 5);
        assert_eq!(
            bytes(&place.path("whole/adapter")),
            bytes(&place.path("part/adapter")),
            "{data}"
        );

        // Over other rows the run is another one.
        std::fs::write(place.path("b/train.jsonl"), "{\"input_ids\": [1, 2, 3]}\n").unwrap();
        let problem = place.open(recipe).resume(&part).unwrap_err().to_string();
        assert!(problem.contains("other training rows"), "{problem}");
    }
}

#[test]
fn a_weighted_folder_without_rows_is_refused() {
    let place = Place::new();
    std::fs::remove_file(place.path("b/train.jsonl")).unwrap();
    let recipe = place.recipe("qwen2_distill", "weights = [1, 1]\n", "");
    let problem = Session::open(recipe, &Device::flex(), &|model| Ok(model.into()))
        .unwrap_err()
        .to_string();
    assert!(
        problem.starts_with("no training split (`train.jsonl`, ") && problem.contains("/b`"),
        "{problem}"
    );
}

#[test]
fn weights_that_leave_no_row_are_refused() {
    let place = Place::new();
    std::fs::write(place.path("b/train.jsonl"), "").unwrap();
    let recipe = place.recipe("qwen2_distill", "weights = [0, 1]\n", "");
    let problem = Session::open(recipe, &Device::flex(), &|model| Ok(model.into()))
        .unwrap_err()
        .to_string();
    assert!(
        problem.starts_with(
            "`data.weights`: expected a row to train on in every folder of positive weight"
        ),
        "{problem}"
    );
}
