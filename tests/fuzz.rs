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
use mutation::{Dice, mutated, mutated_json};

/// Memory that reading a file may take, however small it is.
const ANY_FILE: usize = 64 << 10;
/// The same where a tokenizer of known patterns is made.
const ANY_TOKENIZER: usize = 4 << 20;
/// The same where regular expressions of the file are compiled.
const ANY_PATTERNS: usize = 64 << 20;
/// Memory for each byte: one of a list in a GGUF becomes a value of 32, in a list that doubles as it grows.
const PER_BYTE: usize = 100;
/// The same for rows. One of 16 MiB, which a few bytes of a table may repeat, takes that as values of JSON.
const ANY_ROWS: usize = 512 << 20;
const ROUNDS: u64 = 2000;
/// Of files that take a while to read.
const SLOW_ROUNDS: u64 = 500;

/// Reads a kind of file, first as it should be, then as many that are not.
fn check(name: &str, rounds: u64, any_file: usize) {
    let place = Place::new(name);
    let valid = fs::read(place.path()).unwrap();
    let files = fs::read_dir(place.path().parent().unwrap()).unwrap();
    let sizes = files.map(|file| file.unwrap().metadata().unwrap().len() as usize);
    let is_json = place
        .path()
        .extension()
        .is_some_and(|ending| ending == "json");
    let beside = sizes.sum::<usize>() - valid.len();
    for round in 0..rounds {
        let bytes = match round {
            0 => valid.clone(),
            _ if is_json && round % 2 == 0 => mutated_json(&valid, &mut Dice::new(round)),
            _ => mutated(&valid, &mut Dice::new(round)),
        };
        place.put(&bytes);
        let read = || with_peak(|| place.read());
        let problem = match catch_unwind(AssertUnwindSafe(read)) {
            Err(_) => "reading it panics".to_owned(),
            Ok((false, _)) if round == 0 => "what should be valid is refused".to_owned(),
            Ok((_, peak)) if peak > any_file + PER_BYTE * (bytes.len() + beside) => {
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
    check("gguf", ROUNDS, ANY_TOKENIZER);
}

#[test]
fn safetensors() {
    check("safetensors", ROUNDS, ANY_FILE);
}

#[test]
fn configs() {
    check("config", ROUNDS, ANY_FILE);
}

#[test]
fn indices() {
    check("index", ROUNDS, ANY_FILE);
}

#[test]
fn tokenizers() {
    check("tokenizer", SLOW_ROUNDS, ANY_PATTERNS);
}

#[test]
fn steps_of_tokenizers() {
    check("tokenizer_steps", SLOW_ROUNDS, ANY_PATTERNS);
}

#[test]
fn tokenizer_configs() {
    check("tokenizer_config", SLOW_ROUNDS, ANY_PATTERNS);
}

#[test]
fn rows() {
    for name in ["json_lines", "json_list", "csv"] {
        check(name, ROUNDS, ANY_FILE);
    }
    for name in ["gzip", "zstd", "parquet", "parquet_delta"] {
        check(name, ROUNDS, ANY_ROWS);
    }
}

#[test]
fn adapters() {
    check("adapter", ROUNDS, ANY_FILE);
    check("adapter_notes", ROUNDS, ANY_FILE);
    check("mlx_adapter", ROUNDS, ANY_FILE);
}
