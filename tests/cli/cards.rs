//! The `README.md` of what is trained and merged.

use std::path::Path;

use super::{command, golden, moeforge};

fn ran(words: &[&str]) {
    let output = moeforge(words);
    let errors = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {errors}");
}

fn card(folder: &str) -> String {
    std::fs::read_to_string(Path::new(folder).join("README.md")).unwrap()
}

/// The section that begins with a heading, up to the next one.
fn section<'a>(card: &'a str, heading: &str) -> &'a str {
    let start = card.find(&format!("\n## {heading}\n")).unwrap();
    let rest = &card[start + 4..];
    &rest[..rest.find("\n## ").unwrap_or(rest.len())]
}

/// A folder of the Hugging Face cache with a golden model whose card names a license.
fn cached(place: &Path, model: &str) -> String {
    let snapshot = place.join("hub/models--acme--tiny-v2/snapshots/0123abcd");
    std::fs::create_dir_all(&snapshot).unwrap();
    for entry in std::fs::read_dir(golden(model)).unwrap() {
        let path = entry.unwrap().path();
        if path.is_file() {
            std::fs::copy(&path, snapshot.join(path.file_name().unwrap())).unwrap();
        }
    }
    let card = "---\nlicense: mit\nbase_model: other/one\n---\n# The base's own words\n";
    std::fs::write(snapshot.join("README.md"), card).unwrap();
    snapshot.to_string_lossy().into_owned()
}

/// A recipe next to its rows; returns its path.
fn recipe(place: &Path, model: &str) -> String {
    let path = |name: &str| place.join(name).to_string_lossy().into_owned();
    let rows: String = (0..8)
        .map(|i| format!("{{\"prompt\": \"the {i} and\", \"completion\": \" the end\"}}\n"))
        .collect();
    for split in ["train.jsonl", "valid.jsonl"] {
        std::fs::write(path(split), &rows).unwrap();
    }
    let recipe = format!(
        "model.path = {model:?}\ndata.path = {place:?}\nlora.rank = 2\noptimizer.learning_rate = 0.02\n\
         train.steps = 6\ntrain.eval_every = 2\ntrain.save_every = 2\ntrain.keep_best = true\n"
    );
    std::fs::write(path("recipe.toml"), recipe).unwrap();
    path("recipe.toml")
}

/// Trains a golden model of the cache in two runs; returns the base and their folders.
fn trained(place: &Path) -> (String, [String; 2]) {
    let base = cached(place, "qwen2_distill");
    let recipe = recipe(place, &base);
    let runs = ["run", "again"].map(|name| place.join(name).to_string_lossy().into_owned());
    for run in &runs {
        ran(&["train", &recipe, "--out", run]);
    }
    (base, runs)
}

/// Holds the losses of a card to the run's metrics, up to the step that the adapter is of.
fn expect_measured(training: &str, run: &str) {
    let state = std::fs::read(format!("{run}/checkpoint-6/state.json")).unwrap();
    let state: serde_json::Value = serde_json::from_slice(&state).unwrap();
    assert!(training.contains(&format!("`{}`", state["data_hash"].as_str().unwrap())));
    let best = state["best"]["step"].as_u64().unwrap();
    assert!(
        training.contains(&format!("| steps | {best} |")),
        "{training}"
    );
    let metrics = std::fs::read_to_string(format!("{run}/metrics.jsonl")).unwrap();
    let lines = metrics
        .lines()
        .map(|line| serde_json::from_str::<serde_json::Value>(line).unwrap());
    let measured = |step: u64, key: &str| {
        let mut lines = lines
            .clone()
            .filter(|line: &serde_json::Value| line["step"] == step);
        lines.find_map(|line| Some(format!("{:.4}", line[key].as_f64()?)))
    };
    let row = [measured(best, "loss"), measured(best, "valid_loss")].map(Option::unwrap);
    let row = format!("| {best} | {} | {} |", row[0], row[1]);
    assert!(training.contains(&row), "{row}: {training}");
}

#[test]
fn a_run_and_its_merge_say_what_was_done_and_measured() {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name).to_string_lossy().into_owned();
    let (base, [run, again]) = trained(place.path());
    let adapter = format!("{run}/adapter");
    let text = card(&adapter);
    assert_eq!(text, card(&format!("{again}/adapter")));
    let metadata = "---\nbase_model: acme/tiny-v2\nbase_model_relation: adapter\nlibrary_name: peft\nlicense: mit\n\
                    pipeline_tag: text-generation\ntags:\n- \"base_model:adapter:acme/tiny-v2\"\n- lora\n- sft\n\
                    - moeforge\n---\n\n# LoRA adapter for `acme/tiny-v2`\n";
    assert!(text.starts_with(metadata), "{text}");
    let link = "[`acme/tiny-v2`](https://huggingface.co/acme/tiny-v2) at revision `0123abcd`.";
    assert!(section(&text, "Base").contains(link), "{text}");
    assert!(section(&text, "Adapter").contains("| rank | 2 |"), "{text}");

    let training = section(&text, "Training");
    expect_measured(training, &run);
    let digest = checkpoint::sha256(Path::new(&path("train.jsonl"))).unwrap();
    assert!(
        training.contains(&format!("| `train.jsonl` | `{digest}` |")),
        "{training}"
    );
    assert!(training.contains("\nlearning_rate = 0.02\n"), "{training}");
    assert!(!text.contains(&*place.path().to_string_lossy()), "{text}");

    // A merge says the same of the run, and what it did itself; of an adapter that was moved it knows less.
    let [merged, moved, elsewhere] = ["merged", "moved", "elsewhere"].map(path);
    ran(&["merge", &base, "--adapter", &adapter, "--out", &merged]);
    let text = card(&merged);
    assert_eq!(section(&text, "Training"), training);
    assert!(text.starts_with(
        "---\nbase_model: acme/tiny-v2\nbase_model_relation: finetune\nlibrary_name: transformers\n"
    ));
    assert!(
        section(&text, "Merge").contains("| weight format | every tensor keeps its own; "),
        "{text}"
    );
    assert!(
        !text.contains("own words") && !text.contains("other/one"),
        "{text}"
    );
    std::fs::rename(&adapter, &elsewhere).unwrap();
    ran(&["merge", &base, "--adapter", &elsewhere, "--out", &moved]);
    let text = card(&moved);
    assert!(!text.contains("## Training"), "{text}");
    assert!(
        section(&text, "Adapter").contains("`elsewhere`; SHA-256"),
        "{text}"
    );
}

#[test]
fn a_base_that_was_named_with_its_revision_is_named_as_others_look_it_up() {
    let place = tempfile::tempdir().unwrap();
    let path = |name: &str| place.path().join(name).to_string_lossy().into_owned();
    cached(place.path(), "qwen2_distill");
    let [run, out] = ["run", "merged"].map(path);
    let (name, adapter) = ("acme/tiny-v2@0123abcd", format!("{run}/adapter"));
    let recipe = recipe(place.path(), name);
    let verbs: [&[&str]; 2] = [
        &["train", &recipe, "--out", &run],
        &["merge", name, "--adapter", &adapter, "--out", &out],
    ];
    for words in verbs {
        let output = command(words).env("HF_HUB_CACHE", path("hub")).output();
        let output = output.unwrap();
        let errors = String::from_utf8_lossy(&output.stderr);
        assert!(output.status.success(), "{words:?}: {errors}");
    }
    let config = std::fs::read(format!("{adapter}/adapter_config.json")).unwrap();
    let config: serde_json::Value = serde_json::from_slice(&config).unwrap();
    assert_eq!(config["base_model_name_or_path"], "acme/tiny-v2");
    assert_eq!(config["revision"], "0123abcd");
    for folder in [&adapter, &out] {
        let text = card(folder);
        assert!(text.contains("\nbase_model: acme/tiny-v2\n"), "{text}");
        let link = "[`acme/tiny-v2`](https://huggingface.co/acme/tiny-v2) at revision `0123abcd`.";
        assert!(section(&text, "Base").contains(link), "{text}");
    }
}

#[test]
fn a_base_that_is_no_download_is_not_claimed_to_be_one() {
    let place = tempfile::tempdir().unwrap();
    let out = place.path().join("out`x`").to_string_lossy().into_owned();
    let model = golden("qwen2_distill").to_string_lossy().into_owned();
    let adapter = format!("{model}/adapter_dora");
    ran(&["merge", &model, "--adapter", &adapter, "--out", &out]);
    let text = card(&out);
    assert!(text.starts_with("---\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- moeforge\n---\n\n# `` out`x` ``\n"), "{text}");
    assert!(
        text.contains("`qwen2_distill`, which was not in the Hugging Face cache."),
        "{text}"
    );
    assert!(text.contains("| DoRA | yes |"), "{text}");
    assert!(
        !text.contains("Training") && !text.contains("base_model:"),
        "{text}"
    );
}
