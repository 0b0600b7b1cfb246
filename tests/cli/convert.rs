//! Models in other number formats, as folders and as GGUF files, and what survives of an adapter in them.

use tempfile::TempDir;

use super::{golden, moeforge, refused};

/// What a verb prints with `--json`.
fn json(words: &[&str]) -> serde_json::Value {
    let output = moeforge(words);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    serde_json::from_slice(&output.stdout).unwrap()
}

/// A folder with rows to compare models on.
fn with_rows() -> (TempDir, String) {
    let place = tempfile::tempdir().unwrap();
    let rows: String = (0..3)
        .map(|i| format!("{{\"input_ids\": {:?}}}\n", (i..i + 30).collect::<Vec<_>>()))
        .collect();
    std::fs::write(place.path().join("test.jsonl"), rows).unwrap();
    let data = place.path().to_string_lossy().into_owned();
    (place, data)
}

#[test]
fn a_model_is_written_as_a_gguf_with_its_tokenizer() {
    let (place, data) = with_rows();
    let out = place.path().join("out").to_string_lossy().into_owned();
    let model = golden("deepseek_v3").to_string_lossy().into_owned();
    let gguf = place.path().join("m.gguf").to_string_lossy().into_owned();
    let quantize = ["quantize", &model, "--to", "gguf:q4_0", "--out", &gguf];
    let options = ["--mix", "experts=q8_0", "--data", &data, "--json"];
    let report = json(&[&quantize[..], &options].concat());
    assert!(
        report["divergence"]["kl"].as_f64().unwrap() > 1e-6,
        "{report}"
    );
    let inspected = json(&["inspect", &gguf, "--json"]);
    let precision = inspected["precision"].to_string();
    assert!(
        precision.contains("Q4_0") && precision.contains("Q8_0"),
        "{inspected}"
    );
    let prompt = ["--prompt", "Hello", "--max-tokens", "5"];
    let said = |model: &str| moeforge(&[&["generate", model][..], &prompt].concat());
    assert!(said(&gguf).status.success());
    let wrong = ["quantize", &model, "--out", &out, "--to"];
    for (words, expected) in [
        (&["gguf:q9"][..], "gguf:q4_k_m"),
        (&["hf:bf16", "--mix", "experts=q4_k"], "--to gguf:"),
        (&["hf:bf16", "--mtp"], "--to gguf:"),
        (
            &["gguf:q8_0", "--mix", "x=q4_k"],
            "`--mix`: expected PART=TYPE",
        ),
    ] {
        let output = moeforge(&[&wrong[..], words].concat());
        assert!(!output.status.success());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert!(stderr.contains(expected), "{stderr}");
    }
}

#[test]
fn models_are_converted_and_what_survives_of_an_adapter_is_measured() {
    let (place, data) = with_rows();
    let out = place.path().join("fp8").to_string_lossy().into_owned();
    let model = golden("deepseek_v3").to_string_lossy().into_owned();
    let quantize = ["quantize", &model, "--to", "hf:fp8", "--out", &out];
    let report = json(&[&quantize[..], &["--data", &data, "--json"]].concat());
    let divergence = &report["divergence"];
    assert_eq!(divergence["targets"], 3 * 29);
    assert!(divergence["kl"].as_f64().unwrap() > 1e-6, "{report}");
    assert!(
        report["relative_errors"].as_array().unwrap().len() > 100,
        "{report}"
    );
    let inspected = json(&["inspect", &out, "--json"]);
    assert!(
        inspected["precision"].to_string().contains("F8_E4M3"),
        "{inspected}"
    );

    let adapter = format!("{model}/adapter_peft");
    let survival = ["survival", &model, "--adapter", &adapter, "--data", &data];
    let formats = ["--to", "gguf:f16,gguf:q8_0,gguf:q4_0", "--json"];
    let report = json(&[&survival[..], &formats].concat());
    let kept = |i: usize| report["formats"][i]["logits_kept"].as_f64().unwrap();
    assert!(
        kept(0) > kept(1) && kept(1) > kept(2) && kept(0) > 0.99,
        "{report}"
    );
    // One module alone is damaged less than all together.
    let kept_all = kept(2);
    let modules = report["formats"][2]["modules_kept"].as_object().unwrap();
    assert!(
        modules.len() > 10
            && modules
                .values()
                .all(|kept| kept.as_f64().unwrap() > kept_all)
    );
    assert!(
        !modules.keys().any(|path| path.ends_with("mlp.gate")),
        "{report}"
    );
    // FP8 has the name it has elsewhere, and the older one.
    let fp8 = json(
        &[
            &survival[..],
            &["--to", "hf:fp8,fp8", "--module-samples", "0", "--json"],
        ]
        .concat(),
    );
    assert_eq!(fp8["formats"][0], fp8["formats"][1]);
    let wrong = moeforge(&[&survival[..], &["--to", "gguf:q9"]].concat());
    refused(&wrong, 2, &["gguf:q4_0", "gguf:q9"]);
    let wrong = moeforge(&[&survival[..], &["--to", "hf:fp9"]].concat());
    refused(&wrong, 2, &["of gguf:f16", "hf:fp8", "found `hf:fp9`"]);

    let merged = ["old", "new"].map(|name| place.path().join(name).to_string_lossy().into_owned());
    for (out, dtype) in merged.iter().zip(["fp8", "hf:fp8"]) {
        let merge = ["merge", &model, "--adapter", &adapter, "--out", out];
        json(&[&merge[..], &["--dtype", dtype, "--json"]].concat());
    }
    let config = |out: &String| std::fs::read(format!("{out}/config.json")).unwrap();
    assert_eq!(config(&merged[0]), config(&merged[1]));
}
