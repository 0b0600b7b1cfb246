//! Several adapters over one base: which adapter each prompt uses.

use std::path::{Path, PathBuf};

use anyhow::bail;
use infer::Engine;

use crate::console::Console;
use crate::open::attach;

/// Stands for no adapter.
const NO_ADAPTER: &str = "-";

/// The adapter of all prompts, if there is only one.
pub(super) fn only(paths: &[PathBuf]) -> Option<PathBuf> {
    match paths {
        [path] if path != Path::new(NO_ADAPTER) => Some(path.clone()),
        _ => None,
    }
}

/// Adds several adapters to an engine, each once. Returns the adapter index of every prompt; none for the model alone.
pub(super) fn add(
    paths: &[PathBuf],
    n_prompts: usize,
    engine: &mut Engine,
    console: &Console,
) -> anyhow::Result<Vec<Option<usize>>> {
    if paths.len() < 2 {
        return Ok(vec![None; n_prompts]);
    }
    if paths.len() != n_prompts {
        bail!(
            "--adapter: expected one for all prompts, or one for each of the {n_prompts} (`{NO_ADAPTER}` for none), found {}",
            paths.len()
        );
    }
    let (mut added, mut indices): (Vec<&Path>, Vec<_>) = (Vec::new(), Vec::new());
    for path in paths.iter().map(PathBuf::as_path) {
        let known = added.iter().position(|added| *added == path);
        indices.push(match known {
            _ if path == Path::new(NO_ADAPTER) => None,
            Some(index) => Some(index),
            None => {
                let device = engine.device.clone();
                added.push(path);
                Some(engine.add_adapter(|model| attach(model, path, &device, console))?)
            }
        });
    }
    Ok(indices)
}
