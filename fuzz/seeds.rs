//! Writes a valid file of each kind into `fuzz/corpus`, for libFuzzer to begin with.

use std::path::Path;

fn main() {
    moeforge_fuzz::write_seeds(&Path::new(env!("CARGO_MANIFEST_DIR")).join("corpus"));
}
