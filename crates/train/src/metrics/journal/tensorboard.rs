//! What the `tensorboard` package reads from our event files is what `metrics.jsonl` says.
//!
//! `tests/goldens/event_files` has the files of a run before and after it was resumed from its second step, and what
//! the package read. To make it again after a change of the files: delete its two folders, run these tests (they write
//! missing files, and fail), and then `event_files.py`.

use std::cell::Cell;
use std::collections::BTreeMap;
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::{Value as Json, json};

use super::*;
use crate::StepMemory;

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("../../tests/goldens/event_files")
        .join(name)
}

thread_local! {
    static TICKS: Cell<u32> = const { Cell::new(0) };
}

const START: f64 = 1_750_000_000.0;

/// A clock that goes on by a quarter of a second whenever it is read.
fn tick() -> f64 {
    TICKS.set(TICKS.get() + 1);
    START + 0.25 * f64::from(TICKS.get())
}

/// A journal of a process whose clock starts at a number of ticks.
fn journal(folder: &Path, last_step: Option<u64>, ticks: u32) -> Journal {
    TICKS.set(ticks);
    let last = last_step.map(LastLine::of_step);
    let mut events = EventFile::open(folder, last).unwrap();
    events.wall_time = tick;
    Journal {
        metrics: Metrics::open(&folder.join("metrics.jsonl"), last).unwrap(),
        events,
    }
}

/// Numbers that f32 has to round, unlike in every process and step.
fn report(process: u64, step: u64) -> StepReport {
    let x = (10 * process + step) as f64;
    let rewards = Rewards {
        chosen: 0.1 * x,
        rejected: -0.2 * x,
        margin: 0.3 * x,
        accuracy: 1.0 / x,
    };
    StepReport {
        step,
        loss: 4.7 / x,
        rewards: Some(rewards),
        learning_rate: 1e-5 * x,
        grad_norm: 0.7 * x,
        tokens: 100 + step as usize,
        trained_tokens: 50,
        balance_loss: Some(1e-3 * x),
        loss_scale: Some(65536.0),
        saved_activation_bytes: 1000,
        memory: StepMemory::default(),
        seconds: 0.3 * x,
    }
}

const PEAK_BYTES: u64 = 5_000_000_000;

/// A step and whatever can follow it.
fn write(journal: &mut Journal, process: u64, step: u64) {
    let more = 1 + process + step;
    let loads = [
        LayerLoad::new(1, &[3 * more, 0, 5, 8]),
        LayerLoad::new(12, &[0, more, 0, 0]),
    ];
    // Loads are logged at every second step.
    let loads = &loads[..if step.is_multiple_of(2) { 2 } else { 0 }];
    let report = report(process, step);
    journal.step(&report, loads, Some(PEAK_BYTES)).unwrap();
    if loads.is_empty() {
        return;
    }
    let drift = LayerDrift {
        layer: 1,
        drift: 0.1 * more as f64,
    };
    let validation = Validation {
        valid_loss: report.loss + 0.01,
        rewards: report.rewards,
        routing_drift: vec![drift],
    };
    journal.validation(step, &validation).unwrap();
    let sample = |prompt: &str, text: String| SampledText {
        prompt: prompt.into(),
        text,
    };
    let samples = [
        sample("Où?", format!("À {step} pas.\nDe {process} <b>")),
        sample("2", String::new()),
    ];
    journal.samples(step, &samples).unwrap();
}

/// The run: five steps, one far out; then, resumed after the second, three others and a return. Calls `seen` after each
/// process.
fn run(folder: &Path, mut seen: impl FnMut(&str)) {
    let mut first = journal(folder, None, 0);
    for step in [1, 2, 3, 4, 70_000] {
        write(&mut first, 0, step);
    }
    seen("whole");
    let mut second = journal(folder, Some(2), 1000);
    for step in [3, 4, 5] {
        write(&mut second, 1, step);
    }
    second.rollback(6, 9, 8.5, 2.5, &[[7, 9]]).unwrap();
    seen("resumed");
}

#[test]
fn the_files_are_those_that_tensorboard_read() {
    let folder = tempfile::tempdir().unwrap();
    let mut missing = Vec::new();
    run(folder.path(), |name| {
        let golden = golden(name);
        let is_new = !golden.exists();
        fs::create_dir_all(&golden).unwrap();
        let names = |folder: &Path| {
            let entries = fs::read_dir(folder).unwrap();
            let names = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap());
            let mut names: Vec<_> = names.filter(|name| name.starts_with("events.")).collect();
            names.sort_unstable();
            names
        };
        for file in names(folder.path()) {
            let (found, expected) = (folder.path().join(&file), golden.join(&file));
            if is_new {
                fs::copy(found, &expected).unwrap();
                missing.push(expected);
            } else {
                assert!(
                    fs::read(found).unwrap() == fs::read(expected).unwrap(),
                    "{name}/{file} has changed"
                );
            }
        }
        assert_eq!(names(folder.path()), names(&golden), "{name}");
    });
    assert!(
        missing.is_empty(),
        "these were missing; run event_files.py: {missing:?}"
    );
}

/// What TensorBoard should show for lines of `metrics.jsonl`: values by tag, each with its step.
fn expected(folder: &Path) -> BTreeMap<String, Vec<Json>> {
    let mut shown = BTreeMap::<String, Vec<Json>>::new();
    let text = fs::read_to_string(folder.join("metrics.jsonl")).unwrap();
    for line in text.lines() {
        let line: Json = serde_json::from_str(line).unwrap();
        let mut show = |tag: &str, value: Json| {
            let values = shown.entry(tag.to_owned()).or_default();
            values.push(json!([line["step"], value]));
        };
        for (tag, value) in scalars(&line) {
            show(&tag, json!(value));
        }
        for layer in line["experts"].as_array().into_iter().flatten() {
            let tag = format!("moe/layer_{:02}/load", layer["layer"].as_u64().unwrap());
            show(&tag, histogram(&layer["load"]));
        }
        let samples = line["samples"].as_array().into_iter().flatten();
        for (i, sample) in samples.enumerate() {
            let [prompt, text] = ["prompt", "text"].map(|key| sample[key].as_str().unwrap());
            let text = format!("    {prompt}\n\n    {}", text.replace('\n', "\n    "));
            show(&format!("samples/{i}"), json!(text));
        }
    }
    shown
}

/// The numbers of a line, by tag.
fn scalars(line: &Json) -> Vec<(String, f64)> {
    let mut scalars = Vec::new();
    for (key, value) in line.as_object().unwrap() {
        let tag = match key.as_str() {
            "loss" | "learning_rate" | "grad_norm" | "balance_loss" | "loss_scale" => {
                format!("train/{key}")
            }
            "valid_loss" => "eval/loss".into(),
            key if key.starts_with("rewards/") => format!("train/{key}"),
            "tokens" => {
                let rate = value.as_f64().unwrap() / line["seconds"].as_f64().unwrap();
                scalars.push(("perf/tokens_per_sec".into(), rate));
                scalars.push(("memory/peak_bytes".into(), PEAK_BYTES as f64));
                continue;
            }
            "rolled_back" => {
                let skipped = value["skipped_batches"].as_array().unwrap().len();
                scalars.push(("train/rollbacks".into(), skipped as f64));
                continue;
            }
            key => match key.strip_prefix("valid_rewards/") {
                Some(name) => format!("eval/rewards/{name}"),
                None => continue,
            },
        };
        scalars.push((tag, value.as_f64().unwrap()));
    }
    let layers = ["experts", "routing_drift"].map(|key| line[key].as_array().cloned());
    for layer in layers.into_iter().flatten().flatten() {
        let number = layer["layer"].as_u64().unwrap();
        for (key, name) in [
            ("entropy", "load_entropy"),
            ("dead", "dead_experts"),
            ("drift", "routing_drift"),
        ] {
            let tag = format!("moe/layer_{number:02}/{name}");
            scalars.extend(layer[key].as_f64().map(|value| (tag, value)));
        }
    }
    scalars
}

/// The histogram of an expert load: the buckets, the bars that the page draws for those between the first and the last
/// expert with a token, and the statistics.
fn histogram(load: &Json) -> Json {
    let counts = load.as_array().unwrap().iter();
    let counts: Vec<f64> = counts.map(|count| count.as_f64().unwrap()).collect();
    let bars = (0..).zip(&counts);
    let bars: Vec<_> = bars
        .map(|(i, count)| [f64::from(i), f64::from(i + 1), *count])
        .collect();
    let is_full = |bar: &[f64; 3]| bar[2] > 0.0;
    let first = bars.iter().position(is_full).unwrap();
    let last = bars.iter().rposition(is_full).unwrap();
    let moment = |power: i32| -> f64 {
        let part = |bar: &[f64; 3]| bar[2] * (bar[0] + 0.5).powi(power);
        bars.iter().map(part).sum()
    };
    json!({
        "bucket_limit": bars.iter().map(|bar| bar[1]).collect::<Vec<_>>(),
        "bucket": counts,
        "bars": bars[first..=last],
        "min": bars[first][0],
        "max": bars[last][1],
        "num": moment(0),
        "sum": moment(1),
        "sum_squares": moment(2),
    })
}

#[test]
fn tensorboard_reads_what_metrics_jsonl_says() {
    let read = fs::read_to_string(golden("read.json")).unwrap();
    let read: Json = serde_json::from_str(&read).unwrap();
    let folder = tempfile::tempdir().unwrap();
    run(folder.path(), |name| {
        let expected = expected(folder.path());
        let found = read[name]["values"].as_object().unwrap();
        let tags: Vec<_> = found.keys().collect();
        let mut expected_tags: Vec<_> = expected.keys().collect();
        expected_tags.sort_unstable();
        assert_eq!(tags, expected_tags, "{name}");
        for (tag, values) in &expected {
            let found = found[tag].as_array().unwrap();
            assert_eq!(found.len(), values.len(), "{name} {tag}");
            for (found, value) in found.iter().zip(values) {
                assert_eq!(found["step"], value[0], "{name} {tag}");
                assert_eq!(
                    same_numbers(&found["value"]),
                    same_numbers(&value[1]),
                    "{name} {tag}"
                );
            }
        }
    });
}

/// With all numbers as event files have scalars, in f32: JSON does not tell 2 from 2.0, and serde_json may miss the
/// last bit of an f64.
fn same_numbers(value: &Json) -> Json {
    match value {
        Json::Number(number) => json!(number.as_f64().map(|value| value as f32)),
        Json::Array(values) => values.iter().map(same_numbers).collect(),
        Json::Object(values) => {
            let values = values.iter();
            Json::Object(
                values
                    .map(|(key, v)| (key.clone(), same_numbers(v)))
                    .collect(),
            )
        }
        other => other.clone(),
    }
}

#[test]
fn wall_times_and_places_on_the_page_are_what_was_meant() {
    let read = fs::read_to_string(golden("read.json")).unwrap();
    let read: Json = serde_json::from_str(&read).unwrap();
    for name in ["whole", "resumed"] {
        let page = &read[name]["page"];
        for (tag, values) in read[name]["values"].as_object().unwrap() {
            let place = match tag.as_str() {
                tag if tag.ends_with("/load") => "histograms",
                tag if tag.starts_with("samples/") => "text",
                _ => "scalars",
            };
            for (plugin, tags) in page.as_object().unwrap() {
                let is_there = tags.as_array().unwrap().contains(&json!(tag));
                assert_eq!(is_there, plugin == place, "{name}: {tag} in {plugin}");
            }
            let times: Vec<f64> = values
                .as_array()
                .unwrap()
                .iter()
                .map(|value| value["wall_time"].as_f64().unwrap())
                .collect();
            let is_tick = |time: &f64| *time > START && (4.0 * time).fract() == 0.0;
            assert!(times.iter().all(is_tick), "{name} {tag}: {times:?}");
            assert!(times.is_sorted_by(|a, b| a < b), "{name} {tag}: {times:?}");
        }
    }
    // The first event has the version, the next one the first step; the second process starts at another time.
    let time = |name: &str, i: usize| read[name]["values"]["train/loss"][i]["wall_time"].as_f64();
    assert_eq!(
        (time("whole", 0), time("resumed", 0)),
        (Some(START + 0.5), Some(START + 0.5))
    );
    assert_eq!(time("resumed", 2), Some(START + 250.5));
}
