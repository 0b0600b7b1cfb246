//! Where a run began: its paths are found again when it, or what it needs, was moved.

use std::path::{Component, Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::error::io;
use crate::recipe::Recipe;
use crate::{Error, Result};

/// The file in a run directory.
pub(crate) const ORIGIN_NAME: &str = "origin.json";

/// The places that the paths of a run's recipe are relative to.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct RunOrigin {
    /// The folder in which the run was started.
    folder: PathBuf,
    /// The run directory's own path then.
    run: PathBuf,
}

impl RunOrigin {
    /// Of a run that begins in the current directory.
    pub(crate) fn here(run: &Path) -> Result<Self> {
        let absolute = |path: &Path| std::path::absolute(path).map_err(io("find", path));
        let folder = std::env::current_dir().map_err(io("read", Path::new(".")))?;
        Ok(Self {
            folder,
            run: absolute(run)?,
        })
    }

    pub(crate) fn write(&self, run: &Path) -> Result<()> {
        let json = serde_json::to_string_pretty(self).expect("two paths are JSON");
        let path = run.join(ORIGIN_NAME);
        Ok(checkpoint::write_file(
            &path,
            format!("{json}\n").as_bytes(),
        )?)
    }

    /// The origin in a run directory. A run without one is taken to have begun here.
    pub(crate) fn read(run: &Path) -> Result<Self> {
        let path = run.join(ORIGIN_NAME);
        if !path.exists() {
            return Self::here(run);
        }
        let text = std::fs::read(&path).map_err(io("read", &path))?;
        serde_json::from_slice(&text).map_err(|cause| Error::State { path, cause })
    }

    /// The places where a path of the recipe may be, the likeliest first: where it was, where it is if it was moved
    /// together with the run, and where the current directory has it.
    fn places(&self, path: &Path, run: &Path) -> Vec<PathBuf> {
        let first = self.folder.join(path);
        let absolute = std::path::absolute(run).unwrap_or_else(|_| run.to_owned());
        let moved = plain(&absolute.join(relative(&first, &self.run)));
        let mut places = Vec::new();
        for place in [first, moved, path.to_owned()] {
            if !places.contains(&place) {
                places.push(place);
            }
        }
        places
    }

    /// Where a path of the recipe is now.
    fn find(&self, path: &Path, run: &Path) -> Option<PathBuf> {
        self.places(path, run)
            .into_iter()
            .find(|place| place.exists())
    }

    /// A run's recipe with its paths as they are now. `start` is the run's own copy of the adapter that it began with.
    ///
    /// # Errors
    /// If a file or folder is in none of the places where it may be.
    pub(crate) fn locate(
        &self,
        recipe: &Recipe,
        run: &Path,
        start: Option<PathBuf>,
    ) -> Result<Recipe> {
        let mut found = recipe.clone();
        let expect = |key, path: &Path| {
            let lost = || Error::Lost {
                run: run.to_owned(),
                key,
                path: path.to_owned(),
                places: self.places(path, run),
            };
            self.find(path, run).ok_or_else(lost)
        };
        if let Some(path) = &mut found.model.path {
            match self.find(Path::new(&*path), run) {
                Some(place) => *path = place.to_string_lossy().into_owned(),
                // A name in Hugging Face's cache, unless it cannot be one.
                None if checkpoint::repo_and_revision(path).is_some() => {}
                None => _ = expect("model.path", Path::new(&*path))?,
            }
        }
        let optional = [
            ("model.config", &mut found.model.config),
            ("model.tokenizer", &mut found.model.tokenizer),
        ];
        for (key, path) in optional {
            if let Some(path) = path {
                *path = expect(key, path)?;
            }
        }
        if let Some(path) = &mut found.model.adapter {
            *path = match start {
                Some(start) => start,
                None => expect("model.adapter", path)?,
            };
        }
        for path in &mut found.data.path {
            *path = expect("data.path", path)?;
        }
        for path in &mut found.eval.tasks {
            let place = expect("eval.tasks", Path::new(&*path))?;
            *path = place.to_string_lossy().into_owned();
        }
        Ok(found)
    }
}

/// The way from one folder to a path: `..` for each folder that they do not share.
fn relative(path: &Path, from: &Path) -> PathBuf {
    let (path, from) = (plain(path), plain(from));
    let shared = path.components().zip(from.components());
    let shared = shared.take_while(|(a, b)| a == b).count();
    let up = from.components().skip(shared).map(|_| Component::ParentDir);
    up.chain(path.components().skip(shared)).collect()
}

/// A path without `.` and without `..` after a name.
fn plain(path: &Path) -> PathBuf {
    let mut plain = PathBuf::new();
    for component in path.components() {
        let is_named = matches!(plain.components().next_back(), Some(Component::Normal(_)));
        match component {
            Component::CurDir => {}
            Component::ParentDir if is_named => _ = plain.pop(),
            other => plain.push(other),
        }
    }
    plain
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_path_is_looked_for_where_it_was_and_where_it_moved_with_the_run() {
        let origin = RunOrigin {
            folder: "/old/project".into(),
            run: "/old/project/runs/a".into(),
        };
        let places = origin.places(Path::new("data/mine"), Path::new("/new/project/runs/a"));
        let expected = [
            "/old/project/data/mine",
            "/new/project/data/mine",
            "data/mine",
        ];
        assert_eq!(places, expected.map(PathBuf::from));
        let places = origin.places(Path::new("/old/data"), Path::new("/new/x/runs/a"));
        assert_eq!(places, ["/old/data", "/new/data"].map(PathBuf::from));
    }
}
