//! `moeforge bench`: what it measures, and what it refuses.

use std::path::{Path, PathBuf};
use std::process::Output;

use tempfile::TempDir;

use super::{budget, command, golden, moeforge, refused};

/// Times two steps, in a place that is then found as it was.
fn bench_train(place: &TempDir, model: &Path, words: &[&str]) -> Output {
    bench(place, "train", model, words)
}

/// Times something twice, in a place that is then found as it was.
fn bench(place: &TempDir, what: &str, model: &Path, words: &[&str]) -> Output {
    let files = || std::fs::read_dir(place.path()).unwrap().count();
    let before = files();
    let mut command = command(&["bench", what, "--reps", "2"]);
    let command = command.arg(model).args(words).env("TMPDIR", place.path());
    let output = command.output().unwrap();
    assert_eq!(files(), before);
    output
}

/// A folder with nothing but the config of a golden model.
fn bare(place: &TempDir) -> PathBuf {
    let bare = place.path().join("bare");
    std::fs::create_dir(&bare).unwrap();
    let config = golden("deepseek_v3").join("config.json");
    std::fs::copy(config, bare.join("config.json")).unwrap();
    bare
}

#[test]
fn training_is_timed_on_a_checkpoint_and_nothing_is_left() {
    let place = tempfile::tempdir().unwrap();
    let words = ["--batch", "2", "--seq", "16", "--json"];
    let output = bench_train(&place, &golden("deepseek_v3"), &words);
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    assert_eq!(found["weights"], "checkpoint");
    let result = &found["results"][0];
    assert_spread(&result["step_seconds"]);
    assert_speed(result);
    for (key, expected) in [("batch", 2), ("seq", 16), ("experts", 12)] {
        assert_eq!(result[key], expected);
    }
    // The counts of the model crate's tests, with rank 8 and sequences of 16.
    let (weights, factors, scores) = (148_992.0, 4.0 * 10_416.0, 3.0 * 4.0 * 40.0 * 17.0);
    let expected = 4.0 * weights + 6.0 * factors + 3.0 * scores;
    assert_eq!(result["flops_per_token"], expected);
}

/// Speed, memory, and a plausible share of the peak.
fn assert_speed(result: &serde_json::Value) {
    assert_spread(&result["tokens_per_second"]);
    let fraction = result["fraction_of_peak"].as_f64().unwrap();
    assert!(fraction > 0.0 && fraction < 1.5, "{result}");
    if cfg!(target_os = "linux") {
        assert!(result["peak_bytes"].as_u64().unwrap() > 1 << 20, "{result}");
    }
}

fn assert_spread(spread: &serde_json::Value) {
    let number = |which: &str| spread[which].as_f64().unwrap();
    let [min, median, max] = ["min", "median", "max"].map(number);
    assert!(0.0 < min && min <= median && median <= max, "{spread}");
}

#[test]
fn reading_and_writing_are_timed_in_every_combination() {
    let place = tempfile::tempdir().unwrap();
    let model = golden("deepseek_v3");
    let results = |what: &str, words: &[&str]| {
        let output = bench(&place, what, &model, &[words, &["--json"]].concat());
        let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let results = found["results"].as_array().unwrap().clone();
        for result in &results {
            assert_speed(result);
            for key in ["open_seconds", "first_token_seconds"] {
                assert!(result[key].as_f64().unwrap() > 0.0, "{result}");
            }
        }
        results
    };
    // Counts by hand, as in the model crate's tests: the head once for a prompt of 16, and 4 of 12 experts for a token, in
    // the bf16 of the file.
    let read = results("prefill", &["--seq", "16", "--batch", "1,2"]);
    let (weights, head, scores) = (148_992.0, 288.0 * 64.0, 3.0 * 2.0 * 4.0 * 40.0 * 8.5);
    let flops = 2.0 * (weights - head) + scores + 2.0 * head / 16.0;
    for (result, batch) in read.iter().zip([1, 2]) {
        assert_eq!(result["flops_per_token"], flops);
        assert_eq!(
            (&result["batch"], &result["seq"]),
            (&batch.into(), &16.into())
        );
    }
    // Rows of 40 numbers; two blocks hold one.
    for (form, row) in [("f32", 160.0), ("f16", 80.0), ("q8_0", 68.0)] {
        let words = ["--seq", "3,5", "--tokens", "4", "--cache", form];
        for (result, seen) in results("decode", &words).iter().zip([5.5, 7.5]) {
            let bytes = result["bytes_per_token"].as_f64().unwrap();
            let cache = seen * 3.0 * row;
            assert!(
                (bytes - cache - 2.0 * (weights + 64.0)).abs() < 100.0,
                "{form}: {result}"
            );
        }
    }

    let words = ["--tokens", "3", "--batch", "2"];
    let table = bench(&place, "decode", &bare(&place), &words);
    let text = String::from_utf8(table.stdout).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 4, "{text}");
    assert!(lines[0].contains("random f32 weights (seed 0)"), "{text}");
    assert!(lines[2].contains("of peak GB/s"), "{text}");
    assert!(lines[3].contains(" % of "), "{text}");

    let long = bench(&place, "decode", &model, &["--seq", "1,5000"]);
    refused(&long, 1, &["--seq 5000", "positions", "5065"]);
}

#[test]
fn what_a_budget_for_memory_costs_is_timed() {
    let place = tempfile::tempdir().unwrap();
    let model = golden("gguf/deepseek_v3_q8_0.gguf");
    let path = model.to_string_lossy();
    for (what, options, context) in [
        ("decode", &["--tokens", "8", "--seq", "16"][..], 25),
        ("prefill", &["--seq", "16"], 17),
    ] {
        let budget = budget(&path, context, 1, 0.00025);
        let words = ["--memory-budget", &budget, "--prefetch-experts", "4"];
        let words = [&words[..], options, &["--json"]].concat();
        let output = bench(&place, what, &model, &words);
        let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let result = &found["results"][0];
        assert_speed(result);
        let count = |key: &str| result["expert_cache"][key].as_u64().unwrap();
        // Of two runs: all tokens that each reads, in both mixture layers, take experts.
        assert!(count("hits") > 0 && count("misses") > 0, "{what} {result}");
        assert!(
            count("prefetched") > 0 && count("held_bytes") > 0,
            "{what} {result}"
        );
    }
    let budget = budget(&path, 25, 1, 0.00025);
    let words = ["--memory-budget", &budget, "--prefetch-experts", "4"];
    let short = ["--tokens", "8", "--seq", "16"];
    let table = bench(
        &place,
        "decode",
        &model,
        &[&words[..], &short, &["--batch", "1,1"]].concat(),
    );
    let text = String::from_utf8(table.stdout).unwrap();
    assert!(text.contains("expert cache hits"), "{text}");
    assert_eq!(
        text.lines().filter(|line| line.ends_with('%')).count(),
        2,
        "{text}"
    );

    let random = bench(&place, "decode", &bare(&place), &words);
    refused(&random, 1, &["--memory-budget", "weights are in a file"]);
}

#[test]
fn training_is_timed_with_random_weights_in_every_combination() {
    let place = tempfile::tempdir().unwrap();
    let bare = bare(&place);
    let words = ["--batch", "1", "--seq", "8", "--experts", "8,12", "--json"];
    let output = bench_train(&place, &bare, &words);
    let found: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let results = found["results"].as_array().unwrap();
    let of = |key: &str| {
        let of = |result: &serde_json::Value| result[key].as_u64().unwrap();
        results.iter().map(of).collect::<Vec<_>>()
    };
    assert_eq!(found["weights"], "random");
    assert_eq!(of("experts"), [8, 12]);
    assert!(of("parameters")[0] < of("parameters")[1], "{found}");

    let words = ["--batch", "1", "--seq", "8", "--set", "lora.rank=2"];
    let table = bench_train(&place, &bare.join("config.json"), &words);
    let text = String::from_utf8(table.stdout).unwrap();
    let lines: Vec<&str> = text.lines().collect();
    assert_eq!(lines.len(), 4, "{text}");
    assert!(lines[0].contains("random f32 weights (seed 0)"), "{text}");
    assert!(lines[0].contains("(lora.rank=2)"), "{text}");
    let has = |line: &str, words: [&str; 2]| words.iter().all(|word| line.contains(word));
    assert!(has(lines[2], ["tokens/s", "of peak"]), "{text}");
    assert!(has(lines[3], [" to ", " % of "]), "{text}");
}

#[test]
fn what_cannot_be_timed_is_said_in_one_sentence() {
    let place = tempfile::tempdir().unwrap();
    let bare = bare(&place);
    let cases: [(&[&str], i32, &[&str]); 5] = [
        (
            &["--experts", "12,10"],
            1,
            &["--experts 10", "n_group", "divisor of the 10"],
        ),
        (
            &["--set", "train.batch_size=3"],
            2,
            &["train.batch_size", "--batch"],
        ),
        (&["--set", "lora.rnk=3"], 2, &["lora.rnk", "rank"]),
        (&["--set", "train.loss=dpo"], 2, &["train.loss", "pairs"]),
        (
            &["--seq", "8,16", "--set", "lora.target=\"nothing\""],
            1,
            &["nothing", "q_b_proj"],
        ),
    ];
    for (words, code, expected) in cases {
        refused(&bench_train(&place, &bare, words), code, expected);
    }
    let own = bench_train(&place, &golden("deepseek_v3"), &["--experts", "12"]);
    refused(&own, 1, &["--experts", "without weights"]);
    for words in [
        ["--seq", "0"],
        ["--seq", "8,0"],
        ["--batch", "0"],
        ["--reps", "0"],
    ] {
        let output = moeforge(&[&["bench", "train", "recipes/bench/moe"][..], &words].concat());
        refused(&output, 2, &[words[0], "0 is not in"]);
    }
    let file = bare.join("config.json");
    let text = std::fs::read_to_string(&file).unwrap();
    std::fs::write(&file, text.replace("deepseek_v3", "gpt2")).unwrap();
    let unknown = bench_train(&place, &bare, &[]);
    refused(&unknown, 1, &["config.json", "model_type", "gpt2"]);
}
