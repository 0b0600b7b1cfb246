//! `moeforge plan`, and what other verbs refuse for want of memory: numbers, machines, bad input.

use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempDir;

use super::{command, golden, moeforge, refused};

/// The configs of the published models.
fn published() -> Vec<PathBuf> {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("crates/cli/src/plan/published");
    let entries = std::fs::read_dir(folder).unwrap();
    let mut configs: Vec<PathBuf> = entries.map(|entry| entry.unwrap().path()).collect();
    configs.sort();
    assert!(configs.len() >= 9);
    configs
}

/// The config of DeepSeek-R1.
fn r1() -> String {
    let mut configs = published().into_iter();
    let found = configs.find(|path| path.ends_with("DeepSeek-R1.json"));
    found.unwrap().to_string_lossy().into_owned()
}

/// A plan as JSON.
fn plan(words: &[&str]) -> Value {
    let output = moeforge(&[&["plan", "--json"], words].concat());
    let stderr = String::from_utf8_lossy(&output.stderr);
    assert!(output.status.success(), "{words:?}: {stderr}");
    serde_json::from_slice(&output.stdout).unwrap()
}

fn own(plan: &Value) -> f64 {
    plan["own_bytes"].as_f64().unwrap()
}

/// A recipe over a golden model with rows of its own.
fn recipe(place: &TempDir, text: &str) -> String {
    std::fs::write(
        place.path().join("train.jsonl"),
        "{\"input_ids\": [1, 2, 3, 4]}\n",
    )
    .unwrap();
    let recipe = place.path().join("recipe.toml");
    let text = format!(
        "[model]\npath = {:?}\n[data]\npath = {:?}\n{text}",
        golden("deepseek_v3"),
        place.path()
    );
    std::fs::write(&recipe, text).unwrap();
    recipe.to_string_lossy().into_owned()
}

#[test]
fn every_published_config_takes_more_for_more() {
    for config in published() {
        let config = config.to_string_lossy().into_owned();
        let of = |context: u64, batch: u64| {
            let (context, batch) = (context.to_string(), batch.to_string());
            own(&plan(&[&config, "--context", &context, "--batch", &batch]))
        };
        let sizes = [
            of(1, 1),
            of(4096, 1),
            of(131_072, 1),
            of(131_072, 8),
            of(1 << 40, 1 << 40),
        ];
        for pair in sizes.windows(2) {
            assert!(
                pair[0] < pair[1] && pair[1].is_finite(),
                "{config}: {sizes:?}"
            );
        }
        let four_bits = own(&plan(&[&config, "--format", "gguf:q4_k_m"]));
        assert!(four_bits < 0.7 * of(4096, 1), "{config}: {four_bits}");
    }
}

#[test]
fn a_recipe_takes_more_for_a_higher_rank_and_longer_rows_and_less_for_each_knob() {
    let place = tempfile::tempdir().unwrap();
    let recipe = recipe(&place, "[train]\nbatch_size = 4\n");
    let of = |words: &[&str]| own(&plan(&[&[recipe.as_str()], words].concat()));
    let ranks = ["2", "8", "32"].map(|rank| of(&["--set", &format!("lora.rank={rank}")]));
    assert!(ranks[0] < ranks[1] && ranks[1] < ranks[2], "{ranks:?}");
    let lengths = ["64", "1024", "65536"].map(|length| of(&["--context", length]));
    assert!(
        lengths[0] < lengths[1] && lengths[1] < lengths[2],
        "{lengths:?}"
    );
    let whole = plan(&[&recipe]);
    let knobs = whole["knobs"].as_array().unwrap();
    assert!(knobs.len() >= 2, "{whole}");
    for knob in knobs {
        // Each does what it says.
        let change: Vec<&str> = knob["change"].as_str().unwrap().split(' ').collect();
        let saved = own(&whole) - of(&change);
        let told = knob["saved_bytes"].as_f64().unwrap();
        assert!((saved - told).abs() < 2.0 && saved > 0.0, "{knob}: {saved}");
    }
}

/// A folder that stands for a machine.
fn machine(files: &[(&str, &str)]) -> TempDir {
    let place = tempfile::tempdir().unwrap();
    for (name, text) in files {
        let path = place.path().join(name);
        std::fs::create_dir_all(path.parent().unwrap()).unwrap();
        std::fs::write(path, text).unwrap();
    }
    place
}

/// What `plan` prints for a model in q4_k_m on a machine.
fn on(machine: &TempDir, config: &str, words: &[&str]) -> (Option<i32>, String) {
    let fixed = ["plan", config, "--format", "gguf:q4_k_m"];
    let output = command(&[&fixed, words].concat())
        .env("MOEFORGE_MACHINE", machine.path())
        .output()
        .unwrap();
    let text = [output.stdout, output.stderr].concat();
    (
        output.status.code(),
        String::from_utf8_lossy(&text).into_owned(),
    )
}

#[test]
fn machines_of_all_kinds_are_told_what_fits() {
    let r1 = r1();
    let vm_stat = |pages: u64| {
        format!(
            "Mach Virtual Memory Statistics: (page size of 16384 bytes)\nPages free: {pages}.\nPages inactive: 0.\nPages speculative: 0.\n"
        )
    };
    let sysctl =
        |gib: u64, mib: u64| format!("hw.memsize: {}\niogpu.wired_limit_mb: {mib}\n", gib << 30);

    let mac = machine(&[("vm_stat", &vm_stat(30 << 20)), ("sysctl", &sysctl(512, 0))]);
    let (code, text) = on(&mac, &r1, &["--device", "metal"]);
    assert_eq!(code, Some(0));
    assert!(
        text.contains("fits 384 GiB (what the GPU may hold)"),
        "{text}"
    );
    assert!(
        text.contains("sudo sysctl iogpu.wired_limit_mb=516096"),
        "{text}"
    );
    let raised = machine(&[
        ("vm_stat", &vm_stat(30 << 20)),
        ("sysctl", &sysctl(512, 458_752)),
    ]);
    let (_, text) = on(&raised, &r1, &["--device", "metal"]);
    assert!(
        text.contains("fits 448 GiB (what the GPU may hold)"),
        "{text}"
    );

    let small = machine(&[("vm_stat", &vm_stat(500_000)), ("sysctl", &sysctl(16, 0))]);
    let (code, text) = on(&small, &r1, &[]);
    assert_eq!(code, Some(0));
    assert!(
        text.contains("runs in 7.63 GiB (free memory) with") && text.contains("for each token"),
        "{text}"
    );

    let container = machine(&[
        (
            "proc/meminfo",
            "MemTotal: 24000000 kB\nMemAvailable: 20000000 kB\n",
        ),
        ("proc/self/cgroup", "0::/docker/1f\n"),
        ("sys/fs/cgroup/docker/1f/memory.max", "4294967296\n"),
        ("sys/fs/cgroup/docker/1f/memory.current", "1073741824\n"),
    ]);
    let (_, text) = on(&container, &r1, &[]);
    let in_group = "3.00 GiB (control group /docker/1f)";
    assert!(text.contains(&format!("runs in {in_group}")), "{text}");
    // The keys and values of a prompt's whole context do not fit.
    let (_, text) = on(&container, &r1, &["--context", "131072"]);
    assert!(text.contains(&format!("does not fit {in_group}")), "{text}");
}

#[test]
fn machines_that_do_not_tell_their_memory_ask_for_a_budget() {
    let r1 = published().remove(0).to_string_lossy().into_owned();
    let linux = machine(&[(
        "proc/meminfo",
        "MemTotal: 24000000 kB\nMemAvailable: 20000000 kB\n",
    )]);
    let (code, text) = on(&linux, &r1, &["--device", "vulkan"]);
    assert_eq!(code, Some(2));
    assert!(text.contains("give it with --memory-budget"), "{text}");

    let (code, text) = on(&machine(&[]), &r1, &[]);
    assert_eq!(code, Some(0));
    assert!(
        text.contains("does not say how much memory is free"),
        "{text}"
    );
}

/// What does not stay in memory is read from disk: less of it with more memory, and faster from a faster disk.
#[test]
fn models_that_are_too_large_run_from_disk_at_a_speed() {
    let r1 = r1();
    let of = |words: &[&str]| plan(&[&[r1.as_str(), "--format", "gguf:q4_k_m"], words].concat());
    let number = |plan: &Value, key: &str| plan[key].as_f64().unwrap();
    let [small, middle] = ["8", "200"].map(|gib| of(&["--memory-budget", gib]));
    for plan in [&small, &middle] {
        assert_eq!(
            (&plan["fits"], &plan["runs"]),
            (&false.into(), &true.into())
        );
    }
    assert!(number(&small, "disk_bytes") > 1.5 * number(&middle, "disk_bytes"));
    let slow = number(&middle, "disk_seconds");
    let fast = of(&["--memory-budget", "200", "--disk-bandwidth", "6"]);
    assert!((slow / number(&fast, "disk_seconds") - 2.0).abs() < 1e-9);
    let both = of(&["--memory-budget", "200", "--bandwidth", "800"]);
    let memory_alone = of(&["--memory-budget", "500", "--bandwidth", "800"]);
    let seconds = |plan: &Value| 1.0 / number(plan, "tokens_per_second");
    assert_eq!(memory_alone["disk_bytes"], Value::Null);
    assert!(seconds(&both) > slow.max(seconds(&memory_alone)));
    assert!(seconds(&both) < slow + seconds(&memory_alone));
}

/// Frozen weights that do not stay in memory are read in each step; fewer bits are what helps.
#[test]
fn training_from_disk_is_said_with_what_each_step_reads() {
    let place = tempfile::tempdir().unwrap();
    let text = "[train]\nbatch_size = 1\naccumulate = 3\ncheckpointing = \"block\"\n";
    let recipe = recipe(&place, text);
    let words = |gib: f64| {
        let gib = gib.to_string();
        plan(&[&recipe, "--context", "8", "--memory-budget", &gib])
    };
    let roomy = words(64.0);
    assert_eq!(
        (&roomy["fits"], &roomy["disk_bytes"]),
        (&true.into(), &Value::Null)
    );
    let (own, mapped) = (own(&roomy), roomy["mapped_bytes"].as_f64().unwrap());
    let limit = own + 0.5 * mapped;
    let tight = words(limit / f64::from(1 << 30));
    assert_eq!(
        (&tight["fits"], &tight["runs"]),
        (&false.into(), &true.into())
    );
    let read = tight["disk_bytes"].as_f64().unwrap();
    // Twice for each of three micro-batches.
    assert!(
        (read / (6.0 * 0.5 * mapped) - 1.0).abs() < 0.01,
        "{read} {mapped}"
    );
    let first = tight["knobs"][0]["change"].as_str().unwrap();
    assert!(first.starts_with("quantize --to"), "{tight}");
}

#[test]
fn verbs_refuse_what_does_not_fit_and_leave_nothing() {
    let place = tempfile::tempdir().unwrap();
    let recipe = recipe(&place, "[train]\nsteps = 1\n");
    let out = place.path().join("out").to_string_lossy().into_owned();
    let model = golden("deepseek_v3").to_string_lossy().into_owned();
    let adapter = golden("deepseek_v3").join("adapter_peft");
    let adapter = adapter.to_string_lossy().into_owned();
    let ids = place.path().join("ids.json");
    std::fs::write(&ids, "{\"input_ids\": [[5, 6, 7]]}").unwrap();
    let (ids, rows) = (ids.to_string_lossy(), place.path().join("train.jsonl"));
    let rows = rows.to_string_lossy();
    let verbs: [&[&str]; 5] = [
        &["train", &recipe, "--out", &out],
        &["generate", &model, "--ids", &ids],
        &["eval", &model, "--data", &rows],
        &["quantize", &model, "--to", "gguf:q8_0", "--out", &out],
        &["merge", &model, "--adapter", &adapter, "--out", &out],
    ];
    for verb in verbs {
        let output = moeforge(&[verb, &["--memory-budget", "0.001"]].concat());
        let stderr = String::from_utf8_lossy(&output.stderr);
        assert_eq!(output.status.code(), Some(5), "{verb:?}: {stderr}");
        assert!(
            stderr.contains("there are 1 MiB (--memory-budget)"),
            "{stderr}"
        );
        assert!(!Path::new(&out).exists(), "{verb:?}");
    }
}

#[test]
fn wrong_subjects_and_budgets_are_refused_in_one_sentence() {
    let place = tempfile::tempdir().unwrap();
    let r1 = published()[0].to_string_lossy().into_owned();
    for budget in ["0", "-3", "nan", "1e30", "much"] {
        let budget = format!("--memory-budget={budget}");
        refused(&moeforge(&["plan", &r1, &budget]), 2, &["memory-budget"]);
    }
    let absent = recipe(&place, "");
    let text = std::fs::read_to_string(&absent).unwrap();
    let missing = text.replace("deepseek_v3", "no_such_model");
    std::fs::write(&absent, missing).unwrap();
    refused(&moeforge(&["plan", &absent]), 1, &["no_such_model"]);
    let config = std::fs::read_to_string(&r1).unwrap();
    let broken = place.path().join("config.json");
    std::fs::write(&broken, config.replace("num_attention_heads", "heads")).unwrap();
    let broken = broken.to_string_lossy().into_owned();
    refused(
        &moeforge(&["plan", &broken]),
        1,
        &["config.json", "num_attention_heads"],
    );
    refused(
        &moeforge(&["plan", &r1, "--set", "lora.rank=4"]),
        1,
        &["--set", "recipe"],
    );
}

/// A model that is large enough for its tensors to count, and small enough for a test.
fn middling(place: &TempDir, name: &str) -> String {
    let text = std::fs::read_to_string(golden(name).join("config.json")).unwrap();
    let mut config: Value = serde_json::from_str(&text).unwrap();
    let widths = [
        ("hidden_size", 256),
        ("intermediate_size", 704),
        ("moe_intermediate_size", 128),
        ("vocab_size", 4096),
        ("num_hidden_layers", 4),
    ];
    for (key, width) in widths {
        if !config[key].is_null() {
            config[key] = width.into();
        }
    }
    let file = place.path().join(format!("{name}.json"));
    std::fs::write(&file, config.to_string()).unwrap();
    file.to_string_lossy().into_owned()
}

/// A difference that is no fault of a prediction, in bytes.
const ALLOWED: f64 = 12.0 * (1 << 20) as f64;

/// What is saved and what a step takes, by the allocator's count, for two families, both methods and three precisions.
#[test]
fn steps_take_what_was_predicted() {
    let place = tempfile::tempdir().unwrap();
    let mut words = vec!["bench".to_owned(), "memory".into()];
    words.extend(["deepseek_v3", "qwen2_distill"].map(|name| middling(&place, name)));
    let runs = [
        "train.checkpointing=none",
        "train.checkpointing=block",
        "precision.compute=bf16",
        "precision.compute=fp8,train.checkpointing=block",
        "train.method=full",
        "lora.dropout=0.1",
    ];
    words.extend(
        runs.iter()
            .flat_map(|run| ["--run".into(), (*run).to_owned()]),
    );
    let more = [
        "--batch=8",
        "--seq=256",
        "--training-only",
        "--json",
        "--threads=2",
    ];
    words.extend(more.map(str::to_owned));
    let words: Vec<&str> = words.iter().map(String::as_str).collect();
    let output = moeforge(&words);
    assert!(
        output.status.success(),
        "{}",
        String::from_utf8_lossy(&output.stderr)
    );
    let found: Value = serde_json::from_slice(&output.stdout).unwrap();
    let found = found["runs"].as_array().unwrap();
    assert_eq!(found.len(), 12);
    for run in found {
        for (what, tolerance) in [("saved activations", 0.05), ("a step", 0.1)] {
            let parts = run["parts"].as_array().unwrap();
            let part = parts.iter().find(|part| part["what"] == what).unwrap();
            let bytes = |key: &str| part[key].as_f64().unwrap();
            // Few of the tensors here are larger than what threads keep.
            let difference = (bytes("predicted_bytes") - bytes("measured_bytes")).abs();
            let allowed = f64::max(tolerance * bytes("measured_bytes"), ALLOWED);
            assert!(difference < allowed, "{}: {part}", run["run"]);
        }
    }
}
