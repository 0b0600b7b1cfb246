//! What a model's files say is obeyed, refused or named.

use super::{Broken, golden, moeforge, refused};

fn errors(words: &[&str]) -> String {
    let output = moeforge(words);
    let errors = String::from_utf8_lossy(&output.stderr).into_owned();
    assert!(output.status.success(), "{words:?}: {errors}");
    errors
}

#[test]
fn unknown_keys_of_a_config_are_named_once_and_with_verbose_their_values_too() {
    let broken = Broken::new("qwen2_distill");
    broken.replace(
        "config.json",
        "\"rope_theta\": 10000",
        "\"novelty\": [1, 2], \"rope_scaling\": {\"type\": \"default\", \"surprise\": 3}, \"rope_theta\": 10000",
    );
    let model = broken.path("").to_string_lossy().into_owned();
    let line = "config.json: keys that are not used: novelty, rope_scaling.surprise";
    for verb in [
        &["inspect", &model][..],
        &["generate", &model, "--prompt", "a", "--max-tokens", "1"],
    ] {
        let found = errors(verb);
        assert_eq!(found.matches(line).count(), 1, "{found}");
        assert!(!found.contains("novelty = "), "{found}");
    }
    let found = errors(&["inspect", &model, "-v"]);
    assert!(found.contains("novelty = [1,2]"), "{found}");
    assert!(found.contains("rope_scaling.surprise = 3"), "{found}");
    let plain = golden("qwen2_distill").to_string_lossy().into_owned();
    assert!(!errors(&["inspect", &plain]).contains("not used"));
}

#[test]
fn a_gguf_with_an_unknown_pre_tokenizer_is_read_by_ids_and_mended_by_name() {
    let broken = Broken::new("qwen2_distill");
    let path = |name: &str| broken.path(name).to_string_lossy().into_owned();
    std::fs::copy(golden("gguf/llama_f32.gguf"), path("m.gguf")).unwrap();
    broken.bytes("m.gguf", |bytes| {
        let pre = b"deepseek-v3";
        let at = bytes.windows(pre.len()).position(|part| part == pre);
        bytes[at.unwrap()..][..pre.len()].copy_from_slice(b"deepseek-v9");
    });
    let whole = golden("gguf/llama_f32.gguf").to_string_lossy().into_owned();
    let logits = |model: &str, out: &str| {
        errors(&[
            "logits",
            model,
            "--ids",
            &path("ids.json"),
            "--out",
            &path(out),
        ])
    };
    let said = logits(&path("m.gguf"), "out.safetensors");
    assert!(said.contains("deepseek-v9"), "{said}");
    logits(&whole, "whole.safetensors");
    let bytes = |name: &str| std::fs::read(path(name)).unwrap();
    assert_eq!(bytes("out.safetensors"), bytes("whole.safetensors"));

    let generate = |model: &str| {
        moeforge(&[
            "generate",
            model,
            "--prompt",
            "the 3 and",
            "--max-tokens",
            "4",
        ])
    };
    refused(
        &generate(&path("m.gguf")),
        1,
        &["tokenizer.ggml.pre", "deepseek-v9"],
    );
    let quantize = ["quantize", &path("m.gguf"), "--to", "gguf:f32", "--pre"];
    let mended = path("mended.gguf");
    errors(&[&quantize[..], &["deepseek-v3", "--out", &mended]].concat());
    assert_eq!(generate(&mended).stdout, generate(&whole).stdout);
}

#[test]
fn the_types_of_a_gguf_are_counted_and_replaced_ones_are_said() {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name).to_string_lossy().into_owned();
    let model = golden("deepseek_v3").to_string_lossy().into_owned();
    let quantize = ["quantize", &model, "--to", "gguf:q4_k_m", "--json", "--out"];
    let output = moeforge(&[&quantize[..], &[&path("m.gguf")]].concat());
    assert!(output.status.success());
    let report: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let types = report["types"].as_array().unwrap();
    assert!(!types.is_empty(), "{report}");
    let replaced = report["replaced_types"].as_array().unwrap();
    assert!(
        replaced.iter().any(|of| of[0] == "q4_k"),
        "rows of 64 are no blocks of 256: {report}"
    );
    // No matrix has the type of the name, so the header says another.
    let gguf = checkpoint::Folder::open(&place.path().join("m.gguf")).unwrap();
    let metadata = gguf.metadata().unwrap();
    assert_ne!(metadata["general.file_type"], 15);
    assert!(
        metadata["general.size_label"]
            .as_str()
            .unwrap()
            .starts_with("12x")
    );
}
