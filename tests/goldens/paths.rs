//! Where the goldens are. The tests of every crate include this file by its path.

use std::path::{Path, PathBuf};

/// A folder of the goldens, or a file in one: `deepseek_v3`, `gguf/llama_f32.gguf`.
pub(crate) fn path(name: &str) -> PathBuf {
    let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens");
    goldens.join(name)
}
