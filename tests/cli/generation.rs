//! `moeforge generate`: what it prints.

use serde_json::Value;

use super::{Broken, moeforge, refused};

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
    let expected: Vec<&str> = alone
        .iter()
        .map(|one| one["text"].as_str().unwrap())
        .collect();
    assert_eq!(
        String::from_utf8(lines.stdout).unwrap(),
        expected.join("\n") + "\n"
    );
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
    assert_eq!(stopped["stopped"], "stop_string");

    let logprobs = whole["logprobs"].as_array().unwrap();
    let ids = whole["token_ids"].as_array().unwrap();
    assert_eq!(logprobs.len(), ids.len());
    for (logprobs, id) in logprobs.iter().zip(ids) {
        // The likeliest is taken, as there is nothing that says otherwise.
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
