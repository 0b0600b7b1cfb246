//! A GGUF file as the model of every verb.

use super::{golden, moeforge, refused};

fn text(words: &[&str]) -> String {
    let output = moeforge(words);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {errors}");
    String::from_utf8(output.stdout).unwrap()
}

#[test]
fn an_adapter_is_trained_on_a_gguf_and_merged_into_a_folder_that_writes_the_same() {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name).to_string_lossy().into_owned();
    let model = golden("gguf/llama_q4_1.gguf");
    let rows: String = (0..8)
        .map(|i| format!("{{\"prompt\": \"the {i} and\", \"completion\": \" the end\"}}\n"))
        .collect();
    std::fs::write(path("train.jsonl"), rows).unwrap();
    let recipe = format!(
        "[model]\npath = {model:?}\n[data]\npath = {:?}\n[lora]\nrank = 2\n[optimizer]\nlearning_rate = 0.02\n\
         [train]\nsteps = 4\n",
        place.path()
    );
    std::fs::write(path("recipe.toml"), recipe).unwrap();
    let model = model.to_string_lossy().into_owned();
    let checked = text(&["data", "check", &path(""), "--model", &model]);
    assert!(checked.contains("« the end"), "{checked}");
    let run = path("run");
    text(&["train", &path("recipe.toml"), "--out", &run]);

    let (adapter, merged) = (format!("{run}/adapter"), path("merged"));
    let adapted = ["--adapter", &adapter];
    let merge = ["merge", &model, "--dtype", "f32", "--out", &merged];
    text(&[&merge[..], &adapted].concat());
    let prompt = [
        "--prompt",
        "the 3 and",
        "--max-tokens",
        "12",
        "--temperature",
        "0",
    ];
    let plain = text(&[&["generate", &model][..], &prompt].concat());
    let beside = text(&[&["generate", &model][..], &adapted, &prompt].concat());
    let folded = text(&[&["generate", &merged][..], &prompt].concat());
    assert_eq!(beside, folded);
    assert_ne!(beside, plain);
    let inspected = text(&["inspect", &merged]);
    assert!(
        inspected.contains("F32") && !inspected.contains("Q4_1"),
        "{inspected}"
    );
}

#[test]
fn a_gguf_with_an_mtp_layer_gives_the_same_text_speculatively() {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name).to_string_lossy().into_owned();
    let model = golden("deepseek_v3").to_string_lossy().into_owned();
    let [with, without] = [path("with.gguf"), path("without.gguf")];
    let quantize = ["quantize", &model, "--to", "gguf:q8_0", "--out"];
    text(&[&quantize[..], &[&with, "--mtp"]].concat());
    text(&[&quantize[..], &[&without]].concat());
    let generate = ["--prompt", "the 3 and", "--max-tokens", "12"];
    let generate = |file: &str, more: &[&str]| {
        let words = [&["generate", file], &generate[..], more].concat();
        moeforge(&words)
    };
    let plain = generate(&with, &[]);
    assert!(plain.status.success() && !plain.stdout.is_empty());
    let speculative = generate(&with, &["--speculative"]);
    assert_eq!(speculative.stdout, plain.stdout);
    assert!(String::from_utf8_lossy(&speculative.stderr).contains("drafts accepted"));
    assert_eq!(generate(&without, &[]).stdout, plain.stdout);
    let expected = ["--speculative", "num_nextn_predict_layers"];
    refused(&generate(&without, &["--speculative"]), 1, &expected);
}

#[test]
fn files_that_are_no_models_are_refused_in_one_sentence() {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name).to_string_lossy().into_owned();
    let whole = std::fs::read(golden("gguf/qwen2_q5_0.gguf")).unwrap();
    std::fs::write(path("short.gguf"), &whole[..whole.len() / 2]).unwrap();
    std::fs::write(path("text.gguf"), "no model").unwrap();
    std::fs::write(path("model.bin"), &whole).unwrap();
    for (name, expected) in [
        ("short.gguf", "as its header says, found"),
        ("text.gguf", "begins with `GGUF`"),
        ("model.bin", "or a `.gguf` file, found another file"),
    ] {
        for verb in [&["inspect"][..], &["generate", "--prompt", "a"]] {
            let file = path(name);
            let words = [verb, &[file.as_str()]].concat();
            refused(&moeforge(&words), 1, &[name, expected]);
        }
    }
}
