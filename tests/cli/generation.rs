//! `moeforge generate`, `chat` and `compare`: what they print, and that they say the same of the same model.

use std::io::{BufRead, BufReader, Read, Write};
use std::process::{Command, Output, Stdio};

use serde_json::Value;

use super::{Broken, budget, command, golden, moeforge, refused};

/// A model of words, with a tokenizer and a chat template.
const MODEL: &str = "recipes/quickstart/base";

fn json(words: &[&str]) -> Value {
    let output = moeforge(words);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {errors}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn generate(words: &[&str]) -> Value {
    let all = ["generate", MODEL, "--json", "--max-tokens", "12"];
    json(&[&all[..], words].concat())
}

#[test]
fn several_prompts_give_what_each_gives_alone() {
    let sampled = ["--temperature", "0.7", "--top-k", "40", "--min-p", "0.01"];
    let prompts = ["The capital of", "In 1990", "A"];
    let alone = prompts.map(|prompt| generate(&[&sampled[..], &["--prompt", prompt]].concat()));
    let together = prompts.map(|prompt| ["--prompt", prompt]).concat();
    for batch in ["8", "2"] {
        let together = generate(&[&sampled[..], &together, &["--batch", batch]].concat());
        for (found, alone) in together.as_array().unwrap().iter().zip(&alone) {
            assert_eq!(found["token_ids"], alone["token_ids"]);
            assert_eq!(found["text"], alone["text"]);
        }
    }
    let lines = moeforge(
        &[
            &["generate", MODEL, "--max-tokens", "12"][..],
            &sampled,
            &together,
        ]
        .concat(),
    );
    let labeled = (1..).zip(prompts.iter().zip(&alone));
    let expected: Vec<String> = labeled
        .map(|(number, (prompt, one))| {
            let text = one["text"].as_str().unwrap();
            format!("[{number}/3] {prompt}\n{text}\n")
        })
        .collect();
    assert_eq!(
        String::from_utf8(lines.stdout).unwrap(),
        expected.join("\n")
    );
}

#[test]
fn old_spellings_of_options_are_accepted_and_not_shown() {
    for (verb, old) in [
        ("eval", &["--batch-size"][..]),
        ("experts", &["--batch-size", "--share", "--by", "gates"]),
        ("merge", &["  - bf16"]),
        ("generate", &["--read-ahead"]),
    ] {
        let help = String::from_utf8(moeforge(&[verb, "--help"]).stdout).unwrap();
        for old in old {
            assert!(!help.contains(&format!("{old} ")), "{verb} {old}: {help}");
        }
    }
    let place = tempfile::tempdir().unwrap();
    let row = format!("{{\"input_ids\": {:?}}}\n", (0..30).collect::<Vec<_>>());
    for file in ["train.jsonl", "test.jsonl"] {
        std::fs::write(place.path().join(file), &row).unwrap();
    }
    let data = place.path().to_string_lossy().into_owned();
    let model = golden("deepseek_v3").to_string_lossy().into_owned();
    let loss = |option: &str| {
        let words = ["eval", &model, "--data", &data, option, "2", "--json"];
        json(&words)["models"][0]["text"]["loss"].take()
    };
    assert_eq!(loss("--batch"), loss("--batch-size"));
    let experts = |words: &[&str]| {
        let all = ["experts", &model, "--data", &data, "--json"];
        json(&[&all[..], words].concat())
    };
    let new = experts(&["--min-load", "0.3", "--load", "gate-weights"]);
    assert_eq!(new, experts(&["--share", "0.3", "--by", "gates"]));
    assert_eq!(new["min_load"], 0.3);
}

#[test]
fn the_cache_has_the_requested_data_type() {
    let prompt = ["--prompt", "The capital of France is", "--logprobs", "0"];
    let logprob = |form: &str| {
        let found = generate(&[&prompt[..], &["--cache", form]].concat());
        found["logprobs"][0]["logprob"].as_f64().unwrap()
    };
    let exact = logprob("f32");
    for form in ["f16", "bf16", "q8_0"] {
        let difference = (logprob(form) - exact).abs();
        assert!(
            difference > 0.0 && difference < 0.05,
            "{form}: {difference}"
        );
    }
    let words = ["generate", MODEL, "--prompt", "a", "--cache", "q4_0"];
    refused(&moeforge(&words), 2, &["--cache", "q4_0"]);
    let bytes = json(&["inspect", MODEL, "--json"])["cache_bytes_per_token"].take();
    // 4 layers of 64 + 16 numbers.
    let expected = serde_json::json!({"f32": 1280, "f16": 640, "bf16": 640, "q8_0": 408});
    assert_eq!(bytes, expected);
}

#[test]
fn text_ends_before_a_stop_string_and_tokens_say_how_probable_they_were() {
    let prompt = ["--prompt", "The capital of"];
    let whole = generate(&[&prompt[..], &["--logprobs", "2"]].concat());
    let text = whole["text"].as_str().unwrap();
    // Three letters from the middle of the text, at their first place.
    let stop: String = text
        .chars()
        .skip(text.chars().count() / 2)
        .take(3)
        .collect();
    let stopped = generate(&[&prompt[..], &["--stop", "never", "--stop", &stop]].concat());
    let expected = &text[..text.find(&stop).unwrap()];
    assert_eq!(stopped["text"], expected, "{text}");
    assert_eq!(stopped["finish_reason"], "stop");
    assert_eq!(stopped["stop_string"], stop);
    assert_eq!(whole["finish_reason"], "length");
    assert_eq!(whole["stop_string"], Value::Null);

    let logprobs = whole["logprobs"].as_array().unwrap();
    let ids = whole["token_ids"].as_array().unwrap();
    assert_eq!(logprobs.len(), ids.len());
    for (logprobs, id) in logprobs.iter().zip(ids) {
        // Sampling is greedy by default.
        assert_eq!((&logprobs["id"], &logprobs["top"][0]["id"]), (id, id));
        assert_eq!(logprobs["logprob"], logprobs["top"][0]["logprob"]);
        let [first, second] = [0, 1].map(|n| logprobs["top"][n]["logprob"].as_f64().unwrap());
        assert!(0.0 > first && first >= second, "{logprobs}");
        assert!(first.exp() + second.exp() <= 1.0 + 1e-6, "{logprobs}");
    }
    let words = ["generate", MODEL, "--prompt", "a", "--stop", ""];
    refused(&moeforge(&words), 1, &["stop strings", "empty"]);
    let words = ["generate", MODEL, "--prompt", "a", "--top-p", "0"];
    refused(&moeforge(&words), 1, &["top_p", "found 0"]);
    let silent = Broken::new("deepseek_v3");
    std::fs::remove_file(silent.path("tokenizer.json")).unwrap();
    let [model, ids] =
        ["", "ids.json"].map(|name| silent.path(name).to_string_lossy().into_owned());
    let words = ["generate", &model, "--ids", &ids, "--stop", "x"];
    refused(&moeforge(&words), 1, &["--stop", "tokenizer"]);
}

/// A conversation of some lines.
fn chat(lines: &str, words: &[&str]) -> Output {
    let mut child = command(&[&["chat", MODEL, "--verbose"], words].concat())
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let mut stdin = child.stdin.take().unwrap();
    stdin.write_all(lines.as_bytes()).unwrap();
    drop(stdin);
    child.wait_with_output().unwrap()
}

/// How many tokens every answer read.
fn read(output: &Output) -> Vec<usize> {
    let stderr = String::from_utf8_lossy(&output.stderr);
    let lines = stderr.lines().filter(|line| line.contains(" tokens read"));
    let counts = lines.map(|line| line.split(' ').next().unwrap().parse().unwrap());
    counts.collect()
}

#[test]
fn a_conversation_reads_only_what_is_new() {
    let words = [
        "--max-tokens",
        "12",
        "--system",
        "Facts about the countries of the world.",
    ];
    let lines = "What is the capital of France?\n\nAnd of Spain?\n/clear\nWhat is the capital of France?\n/quit\nNo\n";
    let output = chat(lines, &words);
    assert!(output.status.success());
    let text = String::from_utf8(output.stdout.clone()).unwrap();
    let answers: Vec<&str> = text.lines().collect();
    assert_eq!(answers.len(), 3, "{text}");
    assert_eq!(answers[0], answers[2]);
    let read = read(&output);
    assert_eq!(read.len(), 3);
    assert_eq!(read[0], read[2]);
    // The question, the mark of the answer before it and the marks around it; not the 12 tokens of the answer, nor what the
    // model was told.
    assert!(read[1] < read[0] && read[1] < 12, "{read:?}");
    let whole = generate(&["--chat", "--prompt", "What is the capital of France?"]);
    let plain = chat("What is the capital of France?\n", &["--max-tokens", "12"]);
    assert_eq!(
        String::from_utf8(plain.stdout).unwrap().trim_end(),
        whole["text"]
    );
}

#[test]
fn a_conversation_that_is_full_says_so() {
    let long = "word ".repeat(1200);
    let output = chat("Hello\n", &["--system", &long]);
    refused(&output, 1, &["1024 positions", "/clear"]);
    assert!(output.stdout.is_empty());
    let output = chat("Hello\nAgain\n", &["--ignore-eos"]);
    refused(
        &output,
        1,
        &["the answer ends here", "1024 positions", "/clear"],
    );
    assert!(!output.stdout.is_empty());
}

#[cfg(unix)]
#[test]
fn ctrl_c_stops_the_answer_and_not_the_conversation() {
    let words = [
        "chat",
        MODEL,
        "--verbose",
        "--ignore-eos",
        "--max-tokens",
        "400",
    ];
    let mut child = command(&words)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    let (mut stdin, mut stdout) = (child.stdin.take().unwrap(), child.stdout.take().unwrap());
    let mut stderr = BufReader::new(child.stderr.take().unwrap()).lines();
    let mut ended = || {
        let mut lines = stderr.by_ref().map(Result::unwrap);
        lines.find(|line| line.contains("stopped")).unwrap()
    };
    stdin.write_all(b"Tell me of France.\n").unwrap();
    // The answer has begun once there is a byte of it.
    stdout.read_exact(&mut [0; 4]).unwrap();
    let sent = ["-s", "INT", &child.id().to_string()];
    assert!(Command::new("kill").args(sent).status().unwrap().success());
    let first = ended();
    assert!(first.contains("stopped early"), "{first}");
    stdin.write_all(b"And of Spain.\n").unwrap();
    drop(stdin);
    let second = ended();
    assert!(second.contains("400 written"), "{second}");
    std::io::copy(&mut stdout, &mut std::io::sink()).unwrap();
    assert!(child.wait().unwrap().success());
}

#[test]
fn models_are_compared_by_what_they_predict_and_choose() {
    let place = tempfile::tempdir().unwrap();
    let rows: String = (0..3)
        .map(|i| format!("{{\"input_ids\": {:?}}}\n", (i..i + 30).collect::<Vec<_>>()))
        .collect();
    std::fs::write(place.path().join("test.jsonl"), rows).unwrap();
    let data = place.path().to_string_lossy().into_owned();
    let model = |name: &str| golden(name).to_string_lossy().into_owned();
    let (base, adapter) = (model("deepseek_v3"), model("deepseek_v3/adapter_peft"));
    let compare = |words: &[&str]| {
        let all = ["compare", &base, &base, "--data", &data, "--json"];
        json(&[&all[..], words].concat())["divergence"].take()
    };
    let same = compare(&[]);
    assert_eq!(
        (&same["targets"], &same["top1_agreement"]),
        (&87.into(), &1.0.into())
    );
    assert!(same["kl"].as_f64().unwrap().abs() < 1e-9, "{same}");
    let other = compare(&["--adapter", &adapter]);
    assert!(other["kl"].as_f64().unwrap() > 1e-3, "{other}");
    for (found, changes) in [(&same, false), (&other, true)] {
        let routing = found["routing"].as_array().unwrap();
        let layers: Vec<_> = routing
            .iter()
            .map(|layer| layer["layer"].as_u64())
            .collect();
        assert_eq!(layers, [Some(1), Some(2)]);
        for layer in routing {
            assert_eq!(layer["choices"], 3 * 30 * 4);
            let changed = layer["changed"].as_f64().unwrap();
            assert!((changed > 0.0) == changes && changed < 1.0, "{found}");
        }
    }
    let words = ["compare", &base, &model("qwen2_distill"), "--data", &data];
    refused(&moeforge(&words), 1, &["vocabulary", "288", "320"]);
    let table = moeforge(&["compare", &base, &base, "--data", &data]);
    let text = String::from_utf8(table.stdout).unwrap();
    assert!(text.contains("layer  routing changed"), "{text}");
}

#[test]
fn speculative_decoding_reports_acceptance_and_changes_no_token() {
    let model = golden("deepseek_v3").to_string_lossy().into_owned();
    let place = Broken::new("deepseek_v3");
    let ids = place.path("ids.json").to_string_lossy().into_owned();
    let words = ["generate", &model, "--ids", &ids, "--ignore-eos", "--json"];
    let words = [&words[..], &["--max-tokens", "20", "--logprobs", "1"]].concat();
    let plain = json(&words);
    let found = json(&[&words[..], &["--speculative"]].concat());
    for key in ["token_ids", "text", "logprobs", "finish_reason"] {
        assert_eq!(found[key], plain[key], "{key}");
    }
    let count = |found: &Value, key: &str| found[key].as_u64().unwrap();
    assert_eq!(count(&plain, "drafted"), 0);
    let [drafted, accepted] = ["drafted", "accepted"].map(|key| count(&found, key));
    // All but the first token, and the last if it needs no draft.
    assert!(
        drafted + accepted == 18 || drafted + accepted == 19,
        "{drafted} {accepted}"
    );

    let words = ["bench", "decode", &model, "--tokens", "6", "--reps", "1"];
    let found = json(&[&words[..], &["--speculative", "--json"]].concat());
    let share = found["results"][0]["acceptance_rate"].as_f64().unwrap();
    assert!((0.0..=1.0).contains(&share), "{found}");

    // The base of the quickstart has no such layer.
    let words = ["generate", MODEL, "--prompt", "a", "--speculative"];
    refused(
        &moeforge(&words),
        1,
        &[
            "--speculative",
            "num_nextn_predict_layers",
            "the text is the same",
        ],
    );
}

#[test]
fn every_prompt_may_have_an_adapter_of_its_own() {
    let model = golden("deepseek_v3");
    let adapter = |name: &str| model.join(name).to_string_lossy().into_owned();
    let adapters = [
        adapter("adapter_classic"),
        "-".into(),
        adapter("adapter_dora"),
    ];
    let place = Broken::new("deepseek_v3");
    let write = |name: &str, rows: &str| {
        let path = place.path(name);
        std::fs::write(&path, format!("{{\"input_ids\": [{rows}]}}")).unwrap();
        path.to_string_lossy().into_owned()
    };
    let all = write("all.json", "[5, 6, 7], [8, 9, 4], [5, 6, 7]");
    let model = model.to_string_lossy().into_owned();
    let run = |ids: &str, adapters: &[String]| {
        let words = [
            "generate",
            &model,
            "--ids",
            ids,
            "--json",
            "--max-tokens",
            "8",
        ];
        let mut words = words.to_vec();
        for adapter in adapters {
            words.extend(["--adapter", adapter]);
        }
        moeforge(&words)
    };
    let ids = |output: &Output| -> Value { serde_json::from_slice(&output.stdout).unwrap() };
    let found = ids(&run(&all, &adapters));
    for (i, row) in ["[5, 6, 7]", "[8, 9, 4]", "[5, 6, 7]"].iter().enumerate() {
        let alone = ids(&run(&write("one.json", row), &adapters[i..=i]));
        assert_eq!(found[i]["token_ids"], alone["token_ids"], "{i}");
    }
    assert_ne!(found[0]["token_ids"], found[2]["token_ids"]);
    refused(
        &run(&all, &adapters[..2]),
        1,
        &["--adapter", "each of the 3", "found 2"],
    );
}

#[test]
fn a_budget_for_memory_changes_where_experts_are_and_no_token() {
    let model = golden("gguf/deepseek_v3_q8_0.gguf");
    let model = model.to_string_lossy().into_owned();
    let place = Broken::new("deepseek_v3");
    let ids = place.path("ids.json").to_string_lossy().into_owned();
    let words = ["generate", &model, "--ids", &ids, "--ignore-eos", "--json"];
    let words = [&words[..], &["--max-tokens", "20", "--logprobs", "1"]].concat();
    let plain = json(&words);
    assert!(plain.get("expert_cache").is_none());
    // Room for all, for most experts, for few, and for less than what every token needs.
    let counts = [1.0, 0.00027, 0.00018, 0.00001].map(|weights| {
        let budget = budget(&model, 24, 1, weights);
        let found = json(&[&words[..], &["--memory-budget", &budget]].concat());
        assert_eq!(found["token_ids"], plain["token_ids"], "{budget}");
        assert_eq!(found["logprobs"], plain["logprobs"], "{budget}");
        let cache = found.get("expert_cache")?;
        ["hits", "misses", "held_bytes"]
            .map(|key| cache[key].as_u64())
            .into_iter()
            .collect()
    });
    let [None, Some(most), Some(few), None] = counts else {
        panic!("{counts:?}");
    };
    let (most, few): (Vec<u64>, Vec<u64>) = (most, few);
    assert!(most[0] > few[0] && most[1] < few[1], "{most:?} {few:?}");
    assert_eq!(most[0] + most[1], few[0] + few[1]);
    assert!(few[2] > 0 && few[2] < most[2], "{most:?} {few:?}");

    for budget in ["0", "-1", "much", "nan", "inf"] {
        let budget = format!("--memory-budget={budget}");
        let words = ["generate", &model, "--ids", &ids, &budget];
        refused(
            &moeforge(&words),
            2,
            &["--memory-budget", "expected a number"],
        );
    }
}

#[test]
fn prefetched_experts_change_no_token() {
    let place = Broken::new("deepseek_v3");
    let ids = place.path("ids.json").to_string_lossy().into_owned();
    for (model, weights, compute) in [
        ("gguf/deepseek_v3_q8_0.gguf", 0.00025, "int8"),
        ("gguf/deepseek_v3_q8_0.gguf", 0.00025, "f32"),
        ("deepseek_v3", 0.0004, "int8"),
        ("deepseek_v3_fp8", 0.0006, "f32"),
        ("deepseek_v2_lite", 0.0004, "int8"),
    ] {
        let model = golden(model).to_string_lossy().into_owned();
        let words = ["generate", &model, "--ids", &ids, "--ignore-eos", "--json"];
        let words = [&words[..], &["--max-tokens", "20", "--logprobs", "1"]].concat();
        let words = [&words[..], &["--compute", compute]].concat();
        let plain = json(&words);
        let budget = budget(&model, 24, 1, weights);
        let counts = ["0", "1", "99"].map(|ahead| {
            let options = ["--memory-budget", &budget, "--prefetch-experts", ahead];
            let found = json(&[&words[..], &options].concat());
            for key in ["token_ids", "logprobs"] {
                assert_eq!(found[key], plain[key], "{model} {compute} {ahead}");
            }
            let count = |key: &str| found["expert_cache"][key].as_u64();
            [
                "hits",
                "misses",
                "prefetched",
                "wasted_prefetches",
                "wasted_bytes",
            ]
            .map(|key| count(key).unwrap())
        });
        for [hits, misses, prefetched, wasted_prefetches, wasted_bytes] in counts {
            assert_eq!([hits, misses], counts[0][..2], "{model} {compute}");
            assert!(hits > 0 && prefetched <= misses, "{model} {counts:?}");
            assert_eq!(
                wasted_prefetches > 0,
                wasted_bytes > 0,
                "{model} {counts:?}"
            );
        }
        let prefetched = counts.map(|counts| counts[2]);
        assert_eq!(prefetched[0] + counts[0][3], 0, "{model} {counts:?}");
        assert!(
            0 < prefetched[1] && prefetched[1] <= prefetched[2],
            "{model} {counts:?}"
        );
    }
}
