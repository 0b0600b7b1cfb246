//! Reads mutated files without libFuzzer: `rounds KIND|all N [FIRST_SEED]`. A line for each kind: files, how many of them were
//! read without an error, panics, files that took too much memory, and the longest time.

use moeforge_fuzz::{names, rounds};

fn main() {
    let words: Vec<String> = std::env::args().skip(1).collect();
    let number = |i: usize| words.get(i).and_then(|word| word.parse::<u64>().ok());
    let (kind, n, first) = (
        words.first(),
        number(1).unwrap_or(1000),
        number(2).unwrap_or(0),
    );
    for name in names() {
        if kind.is_some_and(|kind| kind == name || kind == "all") {
            let found = rounds(name, first..first + n);
            println!(
                "{name}: {n} files, {} valid, panics at {:?}, too large at {:?}, at most {:.3} s (seed {})",
                found.valid,
                found.panics,
                found.large,
                found.longest.0.as_secs_f64(),
                found.longest.1
            );
        }
    }
}
