//! Files that a result depends on, by their hashes.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::Context;
use checkpoint::Folder;
use serde::{Deserialize, Serialize};

use crate::console::Console;

/// A file at a path, and what it has.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(super) struct HashedFile {
    pub(super) path: PathBuf,
    pub(super) bytes: u64,
    /// In hexadecimal.
    pub(super) sha256: String,
}

/// Hashes files, each once.
pub(super) struct FileHasher<'a> {
    console: &'a Console,
    known: BTreeMap<PathBuf, HashedFile>,
}

impl<'a> FileHasher<'a> {
    pub(super) fn new(console: &'a Console) -> Self {
        Self {
            console,
            known: BTreeMap::new(),
        }
    }

    /// Files and their hashes, in the same order.
    pub(super) fn hash(&mut self, paths: &[PathBuf]) -> anyhow::Result<Vec<HashedFile>> {
        let new = paths.iter().filter(|path| !self.known.contains_key(*path));
        let new: Vec<(&PathBuf, u64)> = new
            .map(|path| {
                let size = std::fs::metadata(path);
                let size = size.with_context(|| format!("cannot read `{}`", path.display()))?;
                Ok((path, size.len()))
            })
            .collect::<anyhow::Result<_>>()?;
        let megabytes = |bytes: u64| bytes.div_ceil(1 << 20);
        let total = new.iter().map(|(_, bytes)| bytes).sum();
        let mut progress = self.console.progress(megabytes(total), "MiB hashed");
        let mut done = 0;
        for (path, bytes) in new {
            let file = HashedFile {
                path: path.clone(),
                bytes,
                sha256: checkpoint::sha256(path)?,
            };
            self.known.insert(path.clone(), file);
            done += bytes;
            progress.update(megabytes(done), "");
        }
        progress.finish();
        let hashed = paths.iter().filter_map(|path| self.known.get(path));
        Ok(hashed.cloned().collect())
    }
}

/// The files of a model: its weights, and the settings and templates next to them.
pub(super) fn model_files(folder: &Folder) -> anyhow::Result<Vec<PathBuf>> {
    let mut files = folder.weight_files();
    files.extend(settings_files(folder.path())?);
    files.sort();
    files.dedup();
    Ok(files)
}

/// The settings and templates in a model's folder; none if it is a file.
pub(super) fn settings_files(model: &Path) -> anyhow::Result<Vec<PathBuf>> {
    let is_read = |path: &PathBuf| {
        let extension = path.extension().and_then(|extension| extension.to_str());
        path.is_file() && matches!(extension, Some("json" | "jinja"))
    };
    let mut files = Vec::new();
    for place in [model.to_owned(), model.join("additional_chat_templates")] {
        if place.is_dir() {
            let entries = std::fs::read_dir(&place);
            let entries = entries.with_context(|| format!("cannot read `{}`", place.display()))?;
            let paths = entries.map(|entry| entry.map(|entry| entry.path()));
            let paths = paths.collect::<std::io::Result<Vec<_>>>()?;
            files.extend(paths.into_iter().filter(is_read));
        }
    }
    Ok(files)
}

/// This program.
pub(super) fn program() -> anyhow::Result<HashedFile> {
    let path = std::env::current_exe().context("cannot find this program's file")?;
    Ok(HashedFile {
        bytes: std::fs::metadata(&path)?.len(),
        sha256: checkpoint::sha256(&path)?,
        path,
    })
}

/// What is wrong with a file in a folder, if it is not as stated.
pub(super) fn problem(
    stated: &HashedFile,
    place: &Path,
    hasher: &mut FileHasher<'_>,
) -> Option<String> {
    let path = place.join(&stated.path);
    let name = stated.path.display();
    if !path.is_file() {
        return Some(format!("{name}: expected a file, found none"));
    }
    match hasher.hash(&[path]).as_deref() {
        Ok([file]) if file.sha256 == stated.sha256 => None,
        Ok([file]) => Some(format!(
            "{name}: expected SHA-256 {}, found {}",
            stated.sha256, file.sha256
        )),
        Ok(_) => Some(format!("{name}: not read")),
        Err(problem) => Some(format!("{problem:#}")),
    }
}
