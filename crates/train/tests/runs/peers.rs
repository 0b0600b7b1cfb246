//! Training held against torch's AdamW, transformers' Trainer, PEFT and TRL. `tests/goldens/training.py` made the figures.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use burn::tensor::{Device, Tensor};
use checkpoint::{Folder, Safetensors};
use moeforge_train::{Event, Recipe, RunDir, Schedule, ScheduleKind, ScheduleSection};
use serde_json::Value;

use super::{goldens, open};

const FAMILIES: [&str; 4] = [
    "deepseek_v2_lite",
    "deepseek_v3",
    "llama_distill",
    "qwen2_distill",
];

/// Relative error of a loss: f32 rounding, grown by up to five updates.
const LOSS: f64 = 2e-5;
/// Of a gradient's norm.
const NORM: f64 = 5e-5;
/// Of the norm of a tensor's change: an update has the size of the learning rate however small the gradient, so that
/// gradients near zero move weights by their rounding.
const CHANGE: f64 = 1e-4;

fn read(name: &str) -> Value {
    let text = std::fs::read_to_string(goldens::path("training").join(name)).unwrap();
    serde_json::from_str(&text).unwrap()
}

fn numbers(value: &Value) -> Vec<f64> {
    let numbers = value.as_array().unwrap().iter();
    numbers.map(|number| number.as_f64().unwrap()).collect()
}

/// A family's figures, with its rows and pairs in folders.
struct Peer {
    family: &'static str,
    figures: Value,
    place: tempfile::TempDir,
}

impl Peer {
    fn new(family: &'static str) -> Self {
        let figures = read(&format!("{family}.json"));
        let place = tempfile::tempdir().unwrap();
        for kind in ["rows", "pairs"] {
            let folder = place.path().join(kind);
            std::fs::create_dir(&folder).unwrap();
            let rows = figures[kind].as_array().unwrap().iter();
            let rows: String = rows.map(|row| format!("{row}\n")).collect();
            std::fs::write(folder.join("train.jsonl"), rows).unwrap();
        }
        Self {
            family,
            figures,
            place,
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    /// The adapter that a case starts from.
    fn start(&self, case: &str) -> PathBuf {
        let kind = if case == "dora" { "dora" } else { "lora" };
        let golden = goldens::path("training").join(format!("{}_{kind}", self.family));
        if case != "rslora" {
            return golden;
        }
        let folder = self.path("start");
        std::fs::create_dir_all(&folder).unwrap();
        let weights = "adapter_model.safetensors";
        std::fs::copy(golden.join(weights), folder.join(weights)).unwrap();
        let config = std::fs::read_to_string(golden.join("adapter_config.json")).unwrap();
        let mut config: Value = serde_json::from_str(&config).unwrap();
        config["use_rslora"] = true.into();
        std::fs::write(folder.join("adapter_config.json"), config.to_string()).unwrap();
        folder
    }

    fn recipe(&self, case: &str) -> Recipe {
        let is_dpo = case.starts_with("dpo");
        let settings = &self.figures["settings"];
        let number = |key: &str| settings[key].as_f64().unwrap();
        let data = self.path(if is_dpo { "pairs" } else { "rows" });
        let mut set = vec![
            format!("model.path={}", goldens::path(self.family).display()),
            format!("data.path={}", data.display()),
            "data.max_length=64".to_owned(),
            format!("optimizer.learning_rate={}", number("learning_rate")),
            format!("optimizer.weight_decay={}", number("weight_decay")),
            format!(
                "optimizer.betas=[{}, {}]",
                number("adam_beta1"),
                number("adam_beta2")
            ),
            format!("optimizer.clip={}", number("max_grad_norm")),
            "schedule.kind=constant".to_owned(),
            "train.steps=6".to_owned(),
            "train.shuffle=false".to_owned(),
            "train.batch_size=2".to_owned(),
            "train.accumulate=2".to_owned(),
        ];
        match case {
            "full" => set.push("train.method=full".to_owned()),
            _ => set.push(format!("model.adapter={}", self.start(case).display())),
        }
        if case == "loraplus" {
            set.push(format!(
                "lora.loraplus_lr_ratio={}",
                self.figures["loraplus_ratio"]
            ));
        }
        if is_dpo {
            set.extend(
                ["train.loss=dpo", "train.batch_size=3", "train.accumulate=1"].map(str::to_owned),
            );
            set.push(format!("dpo.beta={}", self.figures["beta"]));
        }
        if case == "dpo_smoothed" {
            set.push(format!("dpo.label_smoothing={}", self.figures["smoothing"]));
        }
        if case == "dpo_base" {
            set.push("dpo.reference=base".to_owned());
        }
        let path = self.path("recipe.toml");
        std::fs::write(&path, "").unwrap();
        Recipe::open(&path, &set).unwrap()
    }

    /// Runs a case, and compares it.
    fn check(&self, case: &str, tally: &mut Tally) {
        let recipe = self.recipe(case);
        let run = RunDir::create(&self.path(case), &recipe).unwrap();
        let (mut losses, mut norms, mut margins) = (vec![], vec![], vec![]);
        let mut session = open(recipe);
        session
            .fit(&run, &mut |event: &Event| {
                if let Event::Step(report) = event {
                    losses.push(report.loss);
                    norms.push(report.grad_norm);
                    margins.extend(report.rewards.map(|rewards| rewards.margin));
                }
            })
            .unwrap();
        let expected = &self.figures["cases"][case];
        let what = |kind: &str| format!("{} {case}: {kind}", self.family);
        tally.close(
            &losses,
            &numbers(&expected["losses"]),
            LOSS,
            &what("losses"),
        );
        tally.close(
            &norms,
            &numbers(&expected["grad_norms"]),
            NORM,
            &what("gradient norms"),
        );
        if !margins.is_empty() {
            // Margins begin at 0, so that they are compared with 1.
            let wanted = numbers(&expected["margins"]);
            let above =
                |margins: Vec<f64>| margins.into_iter().map(|m| m + 1.0).collect::<Vec<_>>();
            tally.close(&above(margins), &above(wanted), LOSS, &what("margins"));
        }
        let [before, after] = self.weights(case, run.path());
        let tensors = expected["tensors"].as_object().unwrap();
        assert!(tensors.len() > 5);
        for (name, wanted) in tensors {
            let [norm, sum, n] = changes(&before, &after, name);
            let wanted = numbers(wanted);
            tally.close(&[norm], &wanted[..1], CHANGE, &what(name));
            // A sum of values of both signs: compared with the size of the changes in it.
            let size = wanted[0].max(1e-2) * n.sqrt();
            let [sum, wanted] = [sum, wanted[1]].map(|sum| sum / size);
            assert!(
                (sum - wanted).abs() < CHANGE,
                "{}: sum {sum} {wanted}",
                what(name)
            );
            tally.n_figures += 1;
        }
    }

    /// The trained tensors before and after a run.
    fn weights(&self, case: &str, run: &Path) -> [BTreeMap<String, Vec<f32>>; 2] {
        if case != "full" {
            let files = [self.start(case), run.join("adapter")];
            return files.map(|folder| {
                let file = Safetensors::open(&folder.join("adapter_model.safetensors")).unwrap();
                let tensors = file.tensors().iter();
                tensors
                    .map(|tensor| (tensor.name.to_string(), tensor.to_f32().unwrap()))
                    .collect()
            });
        }
        let state = run.join("checkpoint-6/optimizer.safetensors");
        let state = Safetensors::open(&state).unwrap();
        let after = state.tensors().iter().filter_map(|tensor| {
            let name = tensor.name.to_string();
            let name = name.strip_prefix("parameter/")?;
            Some((name.to_owned(), tensor.to_f32().unwrap()))
        });
        let base = Folder::open(&goldens::path(self.family)).unwrap();
        let before = base.names().map(|name| {
            let tensor = base.tensor(name).unwrap();
            (name.to_owned(), tensor.to_f32().unwrap())
        });
        [before.collect(), after.collect()]
    }
}

/// The norm of a tensor's change, the sum of its values, and their number. Experts of a layer are one tensor for
/// transformers, one per projection for a run, and one each in a checkpoint.
fn changes(
    before: &BTreeMap<String, Vec<f32>>,
    after: &BTreeMap<String, Vec<f32>>,
    name: &str,
) -> [f64; 3] {
    let parts: Vec<String> = match name.split_once(".experts.") {
        Some((layer, "gate_up_proj")) => ["gate_proj", "up_proj"]
            .map(|part| format!("{layer}.experts.weights.{part}"))
            .to_vec(),
        Some((layer, "down_proj")) => vec![format!("{layer}.experts.weights.down_proj")],
        _ => vec![name.to_owned()],
    };
    let (mut squares, mut sum, mut n) = (0.0, 0.0, 0.0);
    for part in parts {
        let now = after
            .get(&part)
            .unwrap_or_else(|| panic!("no {part} in {:?}", after.keys()));
        let then = before.get(&part).cloned().unwrap_or_else(|| {
            let (layer, projection) = part.split_once(".weights.").unwrap();
            let expert = |e: usize| before.get(&format!("{layer}.{e}.{projection}.weight"));
            (0..).map_while(expert).flatten().copied().collect()
        });
        assert_eq!(now.len(), then.len(), "{part}");
        for (now, then) in now.iter().zip(&then) {
            squares += f64::from(now - then).powi(2);
            sum += f64::from(*now);
        }
        n += now.len() as f64;
    }
    [squares.sqrt(), sum, n]
}

/// How many figures were compared, and the largest relative difference by the bound that they have.
#[derive(Default)]
struct Tally {
    n_figures: usize,
    worst: Vec<(f64, f64, String)>,
}

impl Tally {
    fn close(&mut self, found: &[f64], expected: &[f64], bound: f64, what: &str) {
        assert_eq!(
            found.len(),
            expected.len(),
            "{what}: {found:?} {expected:?}"
        );
        for (i, (found, expected)) in found.iter().zip(expected).enumerate() {
            let error = (found - expected).abs() / expected.abs().max(1e-6);
            assert!(error <= bound, "{what} {i}: {found}, expected {expected}");
            self.n_figures += 1;
            match self.worst.iter_mut().find(|(of, ..)| *of == bound) {
                Some((_, worst, _)) if *worst >= error => {}
                Some(entry) => *entry = (bound, error, what.to_owned()),
                None => self.worst.push((bound, error, what.to_owned())),
            }
        }
    }
}

#[test]
#[expect(
    clippy::print_stdout,
    reason = "the differences are for tests/FIGURES.md"
)]
fn training_agrees_with_transformers_peft_and_trl() {
    let mut tally = Tally::default();
    for family in FAMILIES {
        let peer = Peer::new(family);
        for case in [
            "full",
            "lora",
            "rslora",
            "dora",
            "loraplus",
            "dpo",
            "dpo_smoothed",
            "dpo_base",
        ] {
            peer.check(case, &mut tally);
        }
    }
    assert!(tally.n_figures > 600, "{} figures", tally.n_figures);
    println!("{} figures; the largest differences:", tally.n_figures);
    for (bound, worst, what) in &tally.worst {
        println!("{worst:.1e} of {bound:.0e}: {what}");
    }
}

#[test]
fn a_thousand_updates_are_torchs() {
    let device = Device::flex();
    let figures = read("optimizer.json");
    for (beta2, states) in figures["adamw"].as_object().unwrap() {
        let n = 8;
        let starts: Vec<f32> = (0..n).map(|i| (i as f32 - 3.5) / 4.0).collect();
        let mut p = Tensor::<1>::from_floats(starts.as_slice(), &device);
        let mut moments = [Tensor::zeros([n], &device), Tensor::zeros([n], &device)];
        for number in 1..=1000u64 {
            let gradient = |i: usize| {
                let x = (i * 7919 + number as usize * 104_729) % 2048;
                (x as f32 - 1024.0 + 200.0 * i as f32) / 4096.0
            };
            let gradients: Vec<f32> = (0..n).map(gradient).collect();
            let gradients = Tensor::<1>::from_floats(gradients.as_slice(), &device);
            let step = kernels::AdamWStep {
                rate: 1e-3,
                betas: [0.9, beta2.parse().unwrap()],
                eps: 1e-8,
                weight_decay: 0.01,
                number,
                gradient_scale: 1.0,
                noise: None,
                first: 0,
            };
            (p, moments) = kernels::adamw(p, gradients, moments, step);
            let Some(expected) = states.get(number.to_string()) else {
                continue;
            };
            let values = |x: &Tensor<1>| -> Vec<f64> {
                x.clone().into_data().iter::<f32>().map(f64::from).collect()
            };
            // A rounding of f32 per update, a thousand of which are as often up as down; values that pass through 0 keep
            // those of their larger past.
            let all = [
                (&p, "p", 5e-6),
                (&moments[0], "m", 1e-6),
                (&moments[1], "v", 1e-6),
            ];
            for (found, name, bound) in all {
                let (found, wanted) = (values(found), numbers(&expected[name]));
                let what = format!("beta {beta2}, update {number}, {name}");
                Tally::default().close(&found, &wanted, bound, &what);
            }
        }
    }
}

/// Our first step has a rate, and our last one is the end of the schedule: step `i` has the rate of step `i + 1` there.
#[test]
fn schedules_are_transformers_one_step_ahead() {
    let figures = read("optimizer.json");
    let schedules = figures["schedules"].as_array().unwrap();
    assert_eq!(schedules.len(), 6);
    for expected in schedules {
        let kind = match expected["kind"].as_str().unwrap() {
            "cosine" => ScheduleKind::Cosine,
            _ => ScheduleKind::Linear,
        };
        let section = ScheduleSection {
            kind,
            warmup_steps: expected["warmup"].as_u64().unwrap(),
            final_ratio: 0.0,
        };
        let (schedule, total) = (
            Schedule::new(2e-4, &section),
            expected["total"].as_u64().unwrap(),
        );
        let found: Vec<f64> = (0..total).map(|step| schedule.rate(step, total)).collect();
        let what = format!("{section:?}");
        Tally::default().close(&found, &numbers(&expected["rates"])[1..], 1e-12, &what);
    }
}
