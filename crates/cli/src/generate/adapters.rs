//! Adapters beside one another over one base: which prompt is continued with which.

use std::path::{Path, PathBuf};

use anyhow::bail;
use infer::Engine;

use crate::console::Console;
use crate::open::attach;

/// What stands for no adapter.
const NONE: &str = "-";

/// The adapter that all prompts are continued with, if there is but one.
pub(super) fn only(paths: &[PathBuf]) -> Option<PathBuf> {
    match paths {
        [path] if path != Path::new(NONE) => Some(path.clone()),
        _ => None,
    }
}

/// Has an engine hold several adapters, each once, and says for every prompt by number which it is continued with; none for
/// the model as it is.
pub(super) fn hold(
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
            "--adapter: expected one for all prompts, or one for each of the {n_prompts} (`{NONE}` for none), found {}",
            paths.len()
        );
    }
    let (mut held, mut numbers): (Vec<&Path>, Vec<_>) = (Vec::new(), Vec::new());
    for path in paths.iter().map(PathBuf::as_path) {
        let known = held.iter().position(|held| *held == path);
        numbers.push(match known {
            _ if path == Path::new(NONE) => None,
            Some(number) => Some(number),
            None => {
                let device = engine.device.clone();
                held.push(path);
                Some(engine.adapt(|model| attach(model, path, &device, console))?)
            }
        });
    }
    Ok(numbers)
}
