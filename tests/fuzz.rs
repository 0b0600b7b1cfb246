//! Files that nobody should trust, some thousands of each kind: no panic, and never much more memory than bytes.
//!
//! What is changed is decided by fixed seeds. `fuzz/` has the same readers for libFuzzer, which finds more and takes longer.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

mod kinds;
mod memory;
mod mutation;

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use kinds::Place;
use memory::with_peak;

const ROUNDS: u64 = 2000;
/// Of files that take a while to read.
const SLOW_ROUNDS: u64 = 500;

/// Reads a kind of file, first as it should be, then as many that are not.
fn check(name: &str, rounds: u64) {
    let place = Place::new(name);
    let valid = fs::read(place.path()).unwrap();
    for round in 0..rounds {
        let bytes = match round {
            0 => valid.clone(),
            _ => place.mutated(&valid, round),
        };
        place.put(&bytes);
        let read = || with_peak(|| place.read());
        let problem = match catch_unwind(AssertUnwindSafe(read)) {
            Err(_) => "reading it panics".to_owned(),
            Ok((false, _)) if round == 0 => "what should be valid is refused".to_owned(),
            Ok((_, peak)) if peak > place.bound(bytes.len()) => {
                format!("reading its {} bytes takes {peak}", bytes.len())
            }
            Ok(_) => continue,
        };
        let kept = Path::new(env!("CARGO_TARGET_TMPDIR")).join(format!("{name}-{round}"));
        fs::write(&kept, &bytes).unwrap();
        panic!(
            "{name}, round {round}: {problem}; it is kept in {}",
            kept.display()
        );
    }
}

#[test]
fn ggufs() {
    check("gguf", ROUNDS);
}

#[test]
fn safetensors() {
    check("safetensors", ROUNDS);
}

#[test]
fn configs() {
    check("config", ROUNDS);
}

#[test]
fn indices() {
    check("index", ROUNDS);
}

#[test]
fn tokenizers() {
    check("tokenizer", SLOW_ROUNDS);
}

#[test]
fn steps_of_tokenizers() {
    check("tokenizer_steps", SLOW_ROUNDS);
}

#[test]
fn tokenizer_configs() {
    check("tokenizer_config", SLOW_ROUNDS);
}

#[test]
fn rows() {
    for name in [
        "json_lines",
        "json_list",
        "csv",
        "gzip",
        "zstd",
        "parquet",
        "parquet_delta",
    ] {
        check(name, ROUNDS);
    }
}

#[test]
fn tasks() {
    check("task", ROUNDS);
    check("dataset_card", ROUNDS);
}

#[test]
fn adapters() {
    check("adapter", ROUNDS);
    check("adapter_notes", ROUNDS);
    check("mlx_adapter", ROUNDS);
}
