//! The program as its users see it: answers, refusals, exit codes, and files left behind.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

mod bench;
mod cards;
mod convert;
mod evaluation;
mod files;
mod generation;
mod gguf;
mod gpu;
mod keys;
mod peers;
mod plan;
mod ranks;

mod quickstart;
mod resuming;
mod tensors;
mod training;

use std::path::{Path, PathBuf};
use std::process::{Command, Output, Stdio};

use tempfile::TempDir;

/// Runs the program in the repository's root.
fn moeforge(words: &[&str]) -> Output {
    command(words).output().unwrap()
}

/// Runs the program in a folder.
fn moeforge_in(folder: &Path, words: &[&str]) -> Output {
    command(words).current_dir(folder).output().unwrap()
}

fn command(words: &[&str]) -> Command {
    let mut command = Command::new(env!("CARGO_BIN_EXE_moeforge"));
    command
        .args(words)
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"))
        .stdin(Stdio::null());
    command
}

/// A memory budget that leaves some GiB for the weights of a model: what generating takes besides is planned.
fn budget(model: &str, context: u64, sequences: u64, weights: f64) -> String {
    let numbers = [context, sequences].map(|n| n.to_string());
    let words = [
        "plan",
        model,
        "--json",
        "--context",
        &numbers[0],
        "--batch",
        &numbers[1],
    ];
    let output = moeforge(&words);
    let plan: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
    let own = plan["own"].as_object().unwrap().iter();
    let others = own.filter(|(what, _)| !what.starts_with("weights"));
    let bytes: f64 = others.map(|(_, bytes)| bytes.as_f64().unwrap()).sum();
    format!("{:.9}", bytes / f64::from(1 << 30) + weights)
}

fn golden(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/goldens")
        .join(name)
}

/// A copy of a golden model's own files, to be broken.
struct Broken {
    place: TempDir,
}

impl Broken {
    fn new(name: &str) -> Self {
        let place = tempfile::tempdir().unwrap();
        for entry in std::fs::read_dir(golden(name)).unwrap() {
            let path = entry.unwrap().path();
            if path.is_file()
                && !path
                    .file_name()
                    .unwrap()
                    .to_string_lossy()
                    .starts_with("golden")
            {
                std::fs::copy(&path, place.path().join(path.file_name().unwrap())).unwrap();
            }
        }
        std::fs::write(
            place.path().join("ids.json"),
            "{\"input_ids\": [[5, 6, 7, 8]]}",
        )
        .unwrap();
        Self { place }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.place.path().join(name)
    }

    fn text(&self, name: &str) -> String {
        std::fs::read_to_string(self.path(name)).unwrap()
    }

    fn replace(&self, name: &str, from: &str, to: &str) -> &Self {
        let text = self.text(name);
        assert!(text.contains(from), "{name} has no {from}");
        std::fs::write(self.path(name), text.replace(from, to)).unwrap();
        self
    }

    fn bytes(&self, name: &str, change: impl FnOnce(&mut Vec<u8>)) -> &Self {
        let mut bytes = std::fs::read(self.path(name)).unwrap();
        change(&mut bytes);
        std::fs::write(self.path(name), bytes).unwrap();
        self
    }

    fn logits(&self) -> Output {
        let [model, ids, out] = [
            self.place.path().to_path_buf(),
            self.path("ids.json"),
            self.path("out.safetensors"),
        ]
        .map(|p| p.to_string_lossy().into_owned());
        moeforge(&["logits", &model, "--ids", &ids, "--out", &out])
    }
}

/// A refusal: its exit code, one line on stderr that has all the words, and nothing left behind.
fn refused(output: &Output, code: i32, words: &[&str]) {
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert_eq!(output.status.code(), Some(code), "{stderr}");
    let errors: Vec<&str> = stderr
        .lines()
        .filter(|line| line.starts_with("error: "))
        .collect();
    assert_eq!(errors.len(), 1, "one sentence: {stderr}");
    for word in words {
        assert!(
            errors[0].contains(word),
            "`{word}` is not in: {}",
            errors[0]
        );
    }
    assert!(!stderr.contains("panicked"), "{stderr}");
}

#[test]
#[expect(clippy::too_many_lines, reason = "a table")]
fn broken_checkpoints_are_refused_in_one_sentence() {
    const SECOND: &str = "model-00002-of-000003.safetensors";
    type Break = fn(&Broken);
    let cases: [(&str, Break, &[&str]); 8] = [
        (
            "deepseek_v3",
            |b| std::fs::remove_file(b.path(SECOND)).unwrap(),
            &[SECOND],
        ),
        (
            "deepseek_v3",
            |b| _ = b.bytes(SECOND, |bytes| bytes.truncate(90_000)),
            &[SECOND],
        ),
        (
            "deepseek_v3",
            |b| {
                _ = b.bytes(SECOND, |bytes| {
                    bytes[..8].copy_from_slice(&u64::MAX.to_le_bytes())
                })
            },
            &[SECOND, "header"],
        ),
        (
            "deepseek_v3",
            |b| {
                _ = b.replace(
                    "model.safetensors.index.json",
                    SECOND,
                    "model-9.safetensors",
                )
            },
            &["model-9.safetensors"],
        ),
        (
            "deepseek_v3",
            |b| {
                _ = b.replace(
                    "config.json",
                    "\"kv_lora_rank\": 32",
                    "\"kv_lora_rank\": 31",
                )
            },
            &["kv_a", "expected", "[39, 64]"],
        ),
        (
            "deepseek_v3",
            |b| {
                _ = b.replace(
                    "config.json",
                    "\"model_type\": \"deepseek_v3\"",
                    "\"model_type\": \"gpt9\"",
                )
            },
            &["config.json", "model_type", "gpt9"],
        ),
        (
            "deepseek_v3",
            |b| {
                _ = b.replace(
                    "config.json",
                    "\"topk_group\": 2",
                    "\"topk_group\": \"two\"",
                )
            },
            &["config.json", "topk_group", "two"],
        ),
        ("deepseek_v3_fp8", nan_scale, &["weight_scale_inv", "NaN"]),
    ];
    for (name, breaking, words) in cases {
        let broken = Broken::new(name);
        breaking(&broken);
        refused(&broken.logits(), 1, words);
        assert!(!broken.path("out.safetensors").exists());
    }
}

/// Makes the first block scale of the second shard NaN.
fn nan_scale(broken: &Broken) {
    broken.bytes("model-00002-of-000002.safetensors", |bytes| {
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap()) as usize;
        let json: serde_json::Value = serde_json::from_slice(&bytes[8..8 + header]).unwrap();
        let at = json["model.layers.0.mlp.down_proj.weight_scale_inv"]["data_offsets"][0]
            .as_u64()
            .unwrap() as usize;
        bytes[8 + header + at..][..4].copy_from_slice(&f32::NAN.to_le_bytes());
    });
}

#[test]
fn misaligned_tensors_work() {
    let (plain, shifted) = (
        Broken::new("deepseek_v2_lite"),
        Broken::new("deepseek_v2_lite"),
    );
    shifted.bytes("model.safetensors", |bytes| {
        let header = u64::from_le_bytes(bytes[..8].try_into().unwrap());
        bytes[..8].copy_from_slice(&(header + 1).to_le_bytes());
        bytes.insert(8 + header as usize, b' ');
    });
    for broken in [&plain, &shifted] {
        assert!(broken.logits().status.success());
    }
    assert_eq!(
        std::fs::read(plain.path("out.safetensors")).unwrap(),
        std::fs::read(shifted.path("out.safetensors")).unwrap()
    );
}

#[test]
fn wrong_inputs_are_refused_in_one_sentence() {
    let broken = Broken::new("deepseek_v3");
    std::fs::write(
        broken.path("ids.json"),
        "{\"input_ids\": [[1, 2, 3], [4, 5]]}",
    )
    .unwrap();
    refused(&broken.logits(), 1, &["ids.json", "row"]);
    std::fs::write(broken.path("ids.json"), "{\"input_ids\": [[1, 288]]}").unwrap();
    refused(&broken.logits(), 1, &["288"]);

    let [model, adapter] = [
        golden("deepseek_v3"),
        golden("deepseek_v2_lite/adapter_classic"),
    ]
    .map(|p| p.to_string_lossy().into_owned());
    let out = broken.path("merged").to_string_lossy().into_owned();
    refused(
        &moeforge(&["merge", &model, "--adapter", &adapter, "--out", &out]),
        1,
        &["expected", "found"],
    );
    assert!(!broken.path("merged").exists());
}
