//! The program on a GPU, or on the software adapter in place of one.

use std::fs;
use std::path::Path;
use std::process::Output;

use serde_json::Value;

use super::{command, golden, moeforge};

/// The device that `MOEFORGE_TEST_DEVICE` names, or the software adapter; none in a build without a GPU.
fn device() -> Option<String> {
    let named = std::env::var("MOEFORGE_TEST_DEVICE").unwrap_or_else(|_| "webgpu:cpu".into());
    (!kernels::device::apis().is_empty()).then_some(named)
}

fn text(output: &[u8]) -> String {
    String::from_utf8_lossy(output).into_owned()
}

fn succeeds(output: Output) -> String {
    assert!(output.status.success(), "{}", text(&output.stderr));
    text(&output.stdout)
}

/// A verb that fails with a code and a sentence that has some words.
fn fails(words: &[&str], code: i32, with: &str) {
    let output = moeforge(words);
    let said = text(&output.stderr);
    assert!(
        output.status.code() == Some(code) && said.contains(with),
        "{words:?}: {said}"
    );
}

const RECIPE: &str = "recipes/smoke/lora.toml";
const BASE: &str = "recipes/quickstart/base";

#[test]
fn devices_that_are_not_there_are_refused_with_those_that_are() {
    for (name, with) in [
        ("tpu", "expected one of cpu"),
        ("cpu:1", "expected one of cpu"),
        ("webgpu:x", "expected a number or `cpu`"),
    ] {
        for verb in ["inspect", "survival"] {
            fails(&[verb, "--device", name, BASE], 2, "unexpected argument");
        }
        fails(
            &[
                "eval",
                BASE,
                "--data",
                "datasets/factbook",
                "--device",
                name,
            ],
            2,
            with,
        );
    }
    let output = command(&["generate", BASE, "--prompt", "a"])
        .env("MOEFORGE_DEVICE", "tpu")
        .output()
        .unwrap();
    assert_eq!(output.status.code(), Some(2));
    assert!(text(&output.stderr).contains("MOEFORGE_DEVICE: expected one of cpu"));
    match device() {
        None => fails(
            &["train", RECIPE, "--device", "gpu"],
            2,
            "--features webgpu",
        ),
        Some(_) => fails(
            &["train", RECIPE, "--device", "webgpu:7"],
            2,
            "hardware adapters were found",
        ),
    }
    let listed = succeeds(moeforge(&["devices"]));
    assert!(listed.starts_with("cpu: "), "{listed}");
}

#[test]
fn verbs_of_the_cpu_alone_say_that_the_variable_does_not_count() {
    let none = ["survival", "none", "--adapter", "none", "--data", "none"];
    for (name, is_noted) in [("gpu", true), ("cpu", false), ("", false)] {
        let output = command(&none)
            .env("MOEFORGE_DEVICE", name)
            .output()
            .unwrap();
        let said = text(&output.stderr);
        let note = "MOEFORGE_DEVICE: `survival` computes on the CPU alone";
        assert_eq!(said.contains(note), is_noted, "{said}");
    }
}

#[test]
fn what_a_gpu_does_not_compute_yet_is_refused_by_name() {
    let Some(device) = device() else { return };
    let train = |setting: &str, with: &str| {
        fails(
            &["train", RECIPE, "--device", &device, "--set", setting],
            1,
            with,
        );
    };
    train(
        "precision.compute=bf16",
        "`precision.compute`: expected f32 on a GPU",
    );
    let f32 = "precision.compute=f32";
    let words = ["train", RECIPE, "--device", &device, "--set", f32, "--set"];
    fails(
        &[&words[..], &["optimizer.moments=bf16"]].concat(),
        1,
        "`optimizer.moments`",
    );
    let merged = [
        &words[..],
        &["lora.quantizer=gguf:q8_0", "--set", "lora.dropout=0"],
    ]
    .concat();
    fails(&merged, 1, "`lora.quantizer`");
    let generate = ["generate", BASE, "--prompt", "a", "--device", &device];
    for (option, value, with) in [
        (
            "--compute",
            "int8",
            "`--compute int8`: expected f32 on a GPU",
        ),
        ("--cache", "f16", "`--cache f16`: expected f32 on a GPU"),
        ("--memory-budget", "1", "`--memory-budget`"),
    ] {
        fails(&[&generate[..], &[option, value]].concat(), 1, with);
    }
}

#[test]
fn a_device_that_computes_something_else_is_not_used() {
    let Some(device) = device() else { return };
    let model = golden("deepseek_v3");
    let words = [
        "generate",
        &model.to_string_lossy(),
        "--device",
        &device,
        "--prompt",
        "a",
    ];
    let output = command(&words)
        .env("MOEFORGE_TEST_SPOIL", "attention")
        .output()
        .unwrap();
    let said = text(&output.stderr);
    assert_eq!(output.status.code(), Some(4), "{said}");
    assert!(
        said.contains("attention, value, 1 rows of") && said.contains("--device cpu"),
        "{said}"
    );
}

#[test]
fn a_device_that_fails_ends_the_verb_in_a_sentence() {
    let Some(device) = device() else { return };
    let model = golden("deepseek_v3");
    let model = model.to_string_lossy();
    let output = command(&["generate", &model, "--device", &device, "--prompt", "a"])
        .env("MOEFORGE_TEST_SPOIL", "device")
        .output()
        .unwrap();
    let said = text(&output.stderr);
    let sentence = format!("error: device `{device}` failed: ");
    assert_eq!(output.status.code(), Some(1), "{said}");
    assert!(
        said.contains(&sentence) && !said.contains("panicked"),
        "{said}"
    );
}

/// The losses of a run's lines of metrics.
fn losses(run: &Path) -> Vec<f64> {
    let lines = fs::read_to_string(run.join("metrics.jsonl")).unwrap();
    let lines = lines
        .lines()
        .map(|line| serde_json::from_str::<Value>(line).unwrap());
    let keys = ["loss", "valid_loss", "grad_norm"];
    lines
        .flat_map(|line| keys.map(|key| line[key].as_f64()))
        .flatten()
        .collect()
}

/// Settings of recipes on a device: what it computes, and little of it, which an adapter in software does in seconds.
const LITTLE: [&str; 6] = [
    "--set",
    "precision.compute=f32",
    "--set",
    "data.max_length=32",
    "--set",
    "train.batch_size=1",
];

/// A run of a recipe in f32: its losses, and the bytes of its result.
fn train(recipe: &str, out: &str, device: &str) -> (Vec<f64>, Vec<u8>) {
    let rest = ["--out", out, "--device", device];
    succeeds(moeforge(&[&["train", recipe], &LITTLE[..], &rest].concat()));
    let results = ["adapter/adapter_model", "model/model"];
    let results = results.map(|name| Path::new(out).join(format!("{name}.safetensors")));
    let result = results.iter().find(|file| file.exists()).unwrap();
    (losses(out.as_ref()), fs::read(result).unwrap())
}

/// The losses on the device are those on the CPU.
fn assert_same_losses(there: &[f64], here: &[f64]) {
    assert!(here.len() >= 3 && here.len() == there.len());
    for (there, here) in there.iter().zip(here) {
        assert!((there - here).abs() <= 1e-3 * here.abs(), "{there} {here}");
    }
}

/// A file with a row of plain text, which a tokenizer without a chat template reads too.
fn rows(place: &tempfile::TempDir) -> String {
    let file = place.path().join("rows.jsonl");
    let text = "The area of Chad is 1,284,000 km².";
    fs::write(&file, format!("{{\"text\": {text:?}}}\n")).unwrap();
    file.to_string_lossy().into_owned()
}

/// The loss of a model, maybe with an adapter, on some rows.
fn loss(model: &[&str], data: &str, device: &str) -> f64 {
    let words = ["--baseline", "none", "--data", data];
    let rest = ["--max-length", "32", "--json", "--device", device];
    let report = succeeds(moeforge(&[&["eval"], model, &words, &rest].concat()));
    let report: Value = serde_json::from_str(&report).unwrap();
    report["models"][0]["text"]["loss"]
        .as_f64()
        .unwrap_or_else(|| panic!("{report}"))
}

/// The most likely continuation of a prompt.
fn answer(model: &[&str], device: &str) -> String {
    let words = ["--prompt", "The capital of", "--max-tokens", "24"];
    let rest = [
        "--compute",
        "f32",
        "--cache",
        "f32",
        "--temperature",
        "0",
        "--device",
        device,
    ];
    succeeds(moeforge(&[&["generate"], model, &words, &rest].concat()))
}

/// Training, evaluation, merging and generation, on the device and on the CPU; and training once more on the device.
#[test]
fn the_main_job_on_a_gpu_is_that_on_the_cpu() {
    let Some(device) = device() else { return };
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name).to_string_lossy().into_owned();
    let (there, adapter) = train(RECIPE, &at("gpu"), &device);
    let (here, _) = train(RECIPE, &at("cpu"), "cpu");
    assert_same_losses(&there, &here);
    assert_eq!(train(RECIPE, &at("again"), &device), (there, adapter));
    let named = fs::read_to_string(place.path().join("gpu/device.txt")).unwrap();
    assert!(
        named.contains(&format!("device: {device}\nadapter: ")),
        "{named}"
    );

    let (adapter, merged) = (at("gpu/adapter"), at("merged"));
    let (adapted, rows) = ([BASE, "--adapter", &adapter], rows(&place));
    let (there, here) = (loss(&adapted, &rows, &device), loss(&adapted, &rows, "cpu"));
    assert!((there - here).abs() <= 1e-4 * here, "{there} {here}");
    succeeds(moeforge(&[
        "merge",
        BASE,
        "--adapter",
        &adapter,
        "--out",
        &merged,
    ]));
    assert_eq!(answer(&[&merged], &device), answer(&[&merged], "cpu"));
}

/// The recipes that train all weights, and over weights in FP8; then the result on both.
#[test]
fn other_recipes_on_a_gpu_are_those_on_the_cpu() {
    let Some(device) = device() else { return };
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| place.path().join(name).to_string_lossy().into_owned();
    let fp8 = golden("deepseek_v3_fp8").to_string_lossy().into_owned();
    let (model, adapter) = (at("full/model"), at("fp8/adapter"));
    let rows = rows(&place);
    for (name, result) in [
        ("full", vec![&*model]),
        ("fp8", vec![&fp8, "--adapter", &adapter]),
    ] {
        let recipe = format!("recipes/smoke/{name}.toml");
        let (there, _) = train(&recipe, &at(name), &device);
        let (here, _) = train(&recipe, &at("cpu"), "cpu");
        assert_same_losses(&there, &here);
        let (there, here) = (loss(&result, &rows, &device), loss(&result, &rows, "cpu"));
        assert!(
            (there - here).abs() <= 1e-4 * here,
            "{name}: {there} {here}"
        );
        assert_eq!(answer(&result, &device), answer(&result, "cpu"), "{name}");
        fs::remove_dir_all(at("cpu")).unwrap();
    }
}

/// Benchmarks say what they ran on, what share of it they reached, and its memory.
#[test]
fn benchmarks_of_a_gpu_name_it() {
    let Some(device) = device() else { return };
    let model = golden("deepseek_v3");
    let model = model.to_string_lossy();
    for (what, words) in [
        ("train", ["--batch", "1", "--seq", "8"]),
        ("prefill", ["--batch", "1", "--seq", "8"]),
        ("decode", ["--batch", "1", "--tokens", "2"]),
    ] {
        let of = [
            "bench", what, &model, "--reps", "1", "--json", "--device", &device,
        ];
        let report = succeeds(moeforge(&[&of[..], &words].concat()));
        let report: Value = serde_json::from_str(&report).unwrap();
        assert_eq!(report["device"], device);
        assert!(report["adapter"].is_string(), "{report}");
        let result = &report["results"][0];
        assert!(result["device_bytes"].as_u64() > Some(1 << 16), "{report}");
        assert!(result["fraction_of_peak"].as_f64() > Some(0.0), "{report}");
    }
}

#[test]
fn a_killed_run_on_a_gpu_resumes_to_the_same_bits() {
    let Some(device) = device() else { return };
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("check").to_string_lossy().into_owned();
    let rest = [
        "--set",
        "train.save_every=1",
        "--kills",
        "1",
        "--out",
        &out,
        "--device",
        &device,
        "--json",
    ];
    let words = [&["resume-check", RECIPE], &LITTLE[..], &rest].concat();
    let report: Value = serde_json::from_str(&succeeds(moeforge(&words))).unwrap();
    assert_eq!(report["equal"], true, "{report}");
}
