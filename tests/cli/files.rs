//! Files that are not there, not what they seem, or cannot be written, and numbers that make no sense.

use std::path::Path;
use std::process::Output;

use tempfile::TempDir;

use super::{Broken, command, golden, moeforge, refused};

fn text(path: &Path) -> String {
    path.to_string_lossy().into_owned()
}

fn stderr(output: &Output) -> String {
    String::from_utf8_lossy(&output.stderr).into_owned()
}

/// The start of every generation here.
const GENERATE: [&str; 4] = ["--prompt", "a", "--max-tokens", "1"];

#[cfg(unix)]
#[test]
fn a_link_to_nothing_is_an_error_that_names_both() {
    use std::os::unix::fs::symlink;

    let broken_link = |model: &str, name: &str| {
        let broken = Broken::new(model);
        let path = broken.path(name);
        let _ = std::fs::remove_file(&path);
        symlink("../../blobs/gone", &path).unwrap();
        broken
    };
    for (model, name) in [
        ("deepseek_v3", "config.json"),
        ("deepseek_v3", "generation_config.json"),
        ("deepseek_v3", "tokenizer.json"),
        ("deepseek_v3", "tokenizer_config.json"),
        ("deepseek_v3", "special_tokens_map.json"),
        ("deepseek_v3", "chat_template.jinja"),
        ("deepseek_v3", "model.safetensors.index.json"),
        ("deepseek_v3", "model-00002-of-000003.safetensors"),
        ("qwen2_distill", "model.safetensors"),
    ] {
        let broken = broken_link(model, name);
        let model = text(broken.place.path());
        let found = moeforge(&[&["generate", &model][..], &GENERATE].concat());
        refused(
            &found,
            1,
            &[name, "`../../blobs/gone`, which does not exist"],
        );
    }
    // A merge copies what else is in the folder.
    let broken = broken_link("qwen2_distill", "merges.txt");
    let [model, out] =
        [broken.place.path().to_path_buf(), broken.path("out")].map(|path| text(&path));
    let found = moeforge(&["quantize", &model, "--to", "hf:bf16", "--out", &out]);
    refused(
        &found,
        1,
        &["merges.txt", "`../../blobs/gone`, which does not exist"],
    );
    // A folder that is one, and the rows in it.
    let link = broken.path("model");
    symlink("nowhere", &link).unwrap();
    let found = moeforge(&[&["generate", &text(&link)][..], &GENERATE].concat());
    refused(&found, 1, &["`nowhere`, which does not exist"]);
    symlink("nowhere", broken.path("train.jsonl")).unwrap();
    let found = moeforge(&[
        "data",
        "check",
        &model,
        "--model",
        &text(&golden("qwen2_distill")),
    ]);
    refused(
        &found,
        1,
        &["train.jsonl", "`nowhere`, which does not exist"],
    );
}

#[test]
fn a_pointer_of_git_lfs_is_called_that() {
    let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 16060522904\n";
    for name in ["model.safetensors", "tokenizer.json", "config.json"] {
        let broken = Broken::new("qwen2_distill");
        std::fs::write(broken.path(name), pointer).unwrap();
        let found = moeforge(&[&["generate", &text(broken.place.path())][..], &GENERATE].concat());
        refused(&found, 1, &[name, "git-lfs pointer", "git lfs pull"]);
    }
    let place = tempfile::tempdir().unwrap();
    let at = |name: &str| {
        let path = place.path().join(name);
        std::fs::write(&path, pointer).unwrap();
        text(&path)
    };
    refused(
        &moeforge(&["inspect", &at("m.gguf")]),
        1,
        &["m.gguf", "git-lfs pointer"],
    );
    at("train.jsonl");
    let model = text(&golden("qwen2_distill"));
    let found = moeforge(&["data", "check", &text(place.path()), "--model", &model]);
    refused(&found, 1, &["train.jsonl", "git-lfs pointer"]);
}

/// A cache with one repository, in the folder that its tools would call `hub`.
fn cache(files: &[(&str, &Path)]) -> TempDir {
    let hub = tempfile::tempdir().unwrap();
    let repo = hub.path().join("models--acme--tiny");
    let [blobs, snapshot, refs] =
        ["blobs", "snapshots/0123abcd", "refs"].map(|name| repo.join(name));
    for folder in [&blobs, &snapshot, &refs] {
        std::fs::create_dir_all(folder).unwrap();
    }
    std::fs::write(refs.join("main"), "0123abcd").unwrap();
    for (i, (name, source)) in files.iter().enumerate() {
        let blob = blobs.join(format!("blob{i}"));
        std::fs::copy(source, &blob).unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink(blob, snapshot.join(name)).unwrap();
        #[cfg(not(unix))]
        std::fs::copy(blob, snapshot.join(name)).unwrap();
    }
    hub
}

#[test]
fn models_are_found_in_the_cache_and_called_by_their_names() {
    let gguf = golden("gguf/llama_f32.gguf");
    let one = cache(&[("tiny-Q8_0.gguf", &gguf)]);
    let two = cache(&[("tiny-Q8_0.gguf", &gguf), ("tiny-F32.gguf", &gguf)]);
    let inspect = |hub: &TempDir, model: &str, variable: &str| {
        let mut command = command(&["inspect", model]);
        for name in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE", "HF_HOME"] {
            command.env_remove(name);
        }
        command.env(variable, hub.path()).output().unwrap()
    };
    for variable in ["HF_HUB_CACHE", "HUGGINGFACE_HUB_CACHE"] {
        let found = inspect(&one, "acme/tiny", variable);
        assert!(found.status.success(), "{}", stderr(&found));
    }
    for name in [
        "acme/tiny:tiny-F32.gguf",
        "acme/tiny:q8_0",
        "acme/tiny@main:F32",
    ] {
        let found = inspect(&two, name, "HF_HUB_CACHE");
        assert!(found.status.success(), "{}", stderr(&found));
    }
    let found = inspect(&two, "acme/tiny", "HF_HUB_CACHE");
    refused(
        &found,
        1,
        &["acme/tiny", "`tiny-F32.gguf`, `tiny-Q8_0.gguf`"],
    );

    // By its path, the file's name counts and not that of what it links to.
    let rows = tempfile::tempdir().unwrap();
    std::fs::write(
        rows.path().join("test.jsonl"),
        "{\"input_ids\": [1, 2, 3, 4]}\n",
    )
    .unwrap();
    let path = one
        .path()
        .join("models--acme--tiny/snapshots/0123abcd/tiny-Q8_0.gguf");
    let found = moeforge(&["eval", &text(&path), "--data", &text(rows.path())]);
    let table = String::from_utf8_lossy(&found.stdout).into_owned();
    assert!(
        table.contains("tiny-Q8_0.gguf") && !table.contains("blob0"),
        "{table}{}",
        stderr(&found)
    );
}

#[cfg(target_os = "linux")]
#[test]
fn a_result_that_cannot_be_written_is_a_failure() {
    let model = text(&golden("qwen2_distill"));
    let place = tempfile::tempdir().unwrap();
    let rows = "{\"input_ids\": [1, 2, 3, 4]}\n";
    for name in ["train.jsonl", "test.jsonl"] {
        std::fs::write(place.path().join(name), rows).unwrap();
    }
    let data = text(place.path());
    let verbs: [&[&str]; 8] = [
        &["inspect", &model],
        &["inspect", &model, "--json"],
        &["data", "check", &data, "--model", &model],
        &["eval", &model, "--data", &data, "--json"],
        &["compare", &model, &model, "--data", &data],
        &["generate", &model, "--prompt", "a", "--max-tokens", "2"],
        &["generate", "--help"],
        &["--version"],
    ];
    for words in verbs {
        let full = std::fs::File::options()
            .write(true)
            .open("/dev/full")
            .unwrap();
        let found = command(words).stdout(full).output().unwrap();
        refused(
            &found,
            1,
            &["cannot write the standard output", "No space left"],
        );

        // Nobody reads the rest.
        let (reader, writer) = std::io::pipe().unwrap();
        drop(reader);
        let found = command(words).stdout(writer).output().unwrap();
        assert_eq!(
            (found.status.code(), stderr(&found).contains("error")),
            (Some(0), false),
            "{words:?}"
        );
    }
}

#[test]
fn files_are_not_overwritten() {
    let broken = Broken::new("qwen2_distill");
    let [model, ids, out] = [
        broken.place.path().to_path_buf(),
        broken.path("ids.json"),
        broken.path("mine"),
    ]
    .map(|path| text(&path));
    std::fs::write(&out, "mine").unwrap();
    std::fs::create_dir(broken.path("report")).unwrap();
    std::fs::write(broken.path("report/report.txt"), "mine").unwrap();
    std::fs::write(broken.path("test.jsonl"), "{\"input_ids\": [1, 2, 3, 4]}\n").unwrap();
    let report = text(&broken.path("report"));
    let adapter = text(&golden("qwen2_distill/adapter_rslora"));
    let verbs: [(&[&str], &str); 7] = [
        (&["logits", &model, "--ids", &ids, "--out", &out], &out),
        (
            &["quantize", &model, "--to", "gguf:f32", "--out", &out],
            &out,
        ),
        (
            &["quantize", &model, "--to", "hf:bf16", "--out", &out],
            &out,
        ),
        (
            &["merge", &model, "--adapter", &adapter, "--out", &out],
            &out,
        ),
        (
            &[
                "export-adapter",
                &model,
                "--adapter",
                &adapter,
                "--out",
                &out,
            ],
            &out,
        ),
        (&["find-lr", "recipes/smoke/lora.toml", "--out", &out], &out),
        (
            &["eval", &model, "--data", &model, "--out", &report],
            "report.txt",
        ),
    ];
    for (words, name) in verbs {
        refused(&moeforge(words), 1, &[name, "expected no such file"]);
    }
    assert_eq!(broken.text("mine"), "mine");
    assert_eq!(broken.text("report/report.txt"), "mine");
}

#[test]
fn numbers_that_make_no_sense_are_refused_by_option() {
    let model = text(&golden("qwen2_distill"));
    let generate = ["generate", &model, "--prompt", "a"];
    for (option, value, words) in [
        (
            "--max-tokens",
            "-1",
            &["--max-tokens", "from 0 up", "`-1`"][..],
        ),
        ("--seed", "-1", &["--seed", "from 0 up", "`-1`"]),
        ("--top-k", "-5", &["--top-k", "`-5`"]),
        ("--batch", "-2", &["--batch", "`-2`"]),
        ("--threads", "-1", &["--threads", "`-1`"]),
        (
            "--threads",
            "100000",
            &["--threads", "at most", "found 100000"],
        ),
        ("--memory-budget", "-3", &["--memory-budget", "-3"]),
    ] {
        let found = moeforge(&[&generate[..], &[option, value]].concat());
        refused(&found, 2, words);
    }
    for (option, value, name) in [
        ("--temperature", "-1", "temperature"),
        ("--top-p", "-0.5", "top_p"),
        ("--min-p", "-1", "min_p"),
        ("--repetition-penalty", "-1", "repetition_penalty"),
    ] {
        let found = moeforge(&[&generate[..], &[option, value]].concat());
        refused(&found, 1, &[name, "expected a number", value]);
    }
    let file = golden("qwen2_distill/config.json");
    let found = moeforge(&["data", "check", &text(&file), "--model", &model]);
    refused(&found, 1, &["config.json", "expected a JSON object"]);
}

#[test]
fn ends_of_a_text_survive_a_gguf_and_come_back() {
    let broken = Broken::new("qwen2_distill");
    broken.replace(
        "generation_config.json",
        "\"eos_token_id\": 1",
        "\"eos_token_id\": [1, 102, 103, 104]",
    );
    let [model, gguf, folder] = [
        broken.place.path().to_path_buf(),
        broken.path("m.gguf"),
        broken.path("again"),
    ]
    .map(|path| text(&path));
    let written = moeforge(&["quantize", &model, "--to", "gguf:f32", "--out", &gguf]);
    assert!(written.status.success(), "{}", stderr(&written));
    assert!(
        stderr(&written).contains("a GGUF file has no key: 104 ("),
        "{}",
        stderr(&written)
    );
    let back = moeforge(&["quantize", &gguf, "--to", "hf:f32", "--out", &folder]);
    assert!(back.status.success(), "{}", stderr(&back));
    let config: serde_json::Value =
        serde_json::from_str(&broken.text("again/generation_config.json")).unwrap();
    assert_eq!(config["eos_token_id"], serde_json::json!([1, 102, 103]));
}

#[test]
fn rows_without_an_end_are_warned_of_before_training() {
    let model = text(&golden("qwen2_distill"));
    let place = tempfile::tempdir().unwrap();
    let check = |rows: &str| {
        std::fs::write(place.path().join("train.jsonl"), rows).unwrap();
        let found = moeforge(&["data", "check", &text(place.path()), "--model", &model]);
        assert!(found.status.success(), "{}", stderr(&found));
        stderr(&found).contains("none of 2 samples trains a token that ends a text")
    };
    assert!(check(
        "{\"input_ids\": [5, 6, 7]}\n{\"input_ids\": [8, 9]}\n"
    ));
    assert!(!check(
        "{\"input_ids\": [5, 6, 7]}\n{\"input_ids\": [8, 1]}\n"
    ));
    assert!(!check("{\"text\": \"a\"}\n{\"text\": \"b\"}\n"));
}
