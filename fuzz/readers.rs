//! Readers of untrusted files, as libFuzzer's targets call them.

#[path = "../tests/fuzz/kinds.rs"]
mod kinds;

use std::fs;
use std::path::Path;

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
    pub fn read(&self, bytes: &[u8]) {
        self.0.put(bytes);
        let _ = self.0.read();
    }
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
