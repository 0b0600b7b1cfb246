//! Readers of untrusted files, as libFuzzer's targets call them.

#[path = "../tests/fuzz/kinds.rs"]
mod kinds;
#[path = "../tests/fuzz/memory.rs"]
mod memory;
#[path = "../tests/fuzz/mutation.rs"]
mod mutation;

use std::fs;
use std::ops::Range;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::time::{Duration, Instant};

/// Where files of one kind are put and read.
pub struct Reader(kinds::Place);

impl Reader {
    /// A reader of the kind with that name.
    ///
    /// # Panics
    /// If there is none.
    pub fn new(name: &str) -> Self {
        Self(kinds::Place::new(name))
    }

    /// Reads a file of these bytes.
    ///
    /// # Panics
    /// If that takes more memory than it may, or panics.
    pub fn read(&self, bytes: &[u8]) {
        self.0.put(bytes);
        let (_, peak) = memory::with_peak(|| self.0.read());
        let n = bytes.len();
        assert!(peak <= self.0.bound(n), "reading {n} bytes takes {peak}");
    }
}

/// The names of all kinds.
pub fn names() -> Vec<&'static str> {
    kinds::ALL.iter().map(|kind| kind.0).collect()
}

/// What a number of mutated files did to their reader.
#[derive(Debug, Default)]
pub struct Rounds {
    /// Files that were read without an error.
    pub valid: u64,
    /// Seeds of files at which the reader panicked.
    pub panics: Vec<u64>,
    /// The longest time of a file, and its seed.
    pub longest: (Duration, u64),
    /// Seeds of files whose reading took more memory than it may.
    pub large: Vec<u64>,
}

/// Reads files of a kind that were changed as `tests/fuzz.rs` does it, one for each seed.
///
/// # Panics
/// If there is no such kind.
pub fn rounds(name: &str, seeds: Range<u64>) -> Rounds {
    let place = kinds::Place::new(name);
    let valid = fs::read(place.path()).unwrap();
    let mut rounds = Rounds::default();
    for seed in seeds {
        let bytes = place.mutated(&valid, seed);
        place.put(&bytes);
        let started = Instant::now();
        match catch_unwind(AssertUnwindSafe(|| memory::with_peak(|| place.read()))) {
            Ok((is_valid, peak)) => {
                rounds.valid += u64::from(is_valid);
                if peak > place.bound(bytes.len()) {
                    rounds.large.push(seed);
                }
            }
            Err(_) => rounds.panics.push(seed),
        }
        rounds.longest = rounds.longest.max((started.elapsed(), seed));
    }
    rounds
}

/// Writes a valid file of each kind into a folder of its name.
///
/// # Panics
/// If that fails.
pub fn write_seeds(corpus: &Path) {
    for (name, _) in kinds::ALL {
        fs::create_dir_all(corpus.join(name)).unwrap();
        fs::copy(
            kinds::Place::new(name).path(),
            corpus.join(name).join("valid"),
        )
        .unwrap();
    }
}

/// A target: what libFuzzer calls with one kind of file.
#[macro_export]
macro_rules! target {
    ($name:literal) => {
        static READER: std::sync::LazyLock<$crate::Reader> =
            std::sync::LazyLock::new(|| $crate::Reader::new($name));

        libfuzzer_sys::fuzz_target!(
            // A panic of a library that its caller turns into an error is none.
            init: drop(std::panic::take_hook()),
            |bytes: &[u8]| READER.read(bytes)
        );
    };
}
