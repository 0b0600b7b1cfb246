//! The keys of a task file, over those of the files that it includes.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::keys::{Setting, Settings};
use super::yaml::{Yaml, YamlValue};
use crate::file::require_text;
use crate::{Error, Place, Result};

/// The largest task file. Real ones have some thousand bytes, or with inline examples a hundred thousand.
const MOST_BYTES: u64 = 8 << 20;

/// Files that one task may be made of.
const MOST_FILES: usize = 64;

/// The settings of a file, over those of the files that it includes, each at most once.
///
/// # Errors
/// If a file cannot be read, is no mapping, or is included again.
pub(super) fn read_merged(path: &Path) -> Result<Settings> {
    merged(path, &mut Vec::new())
}

fn merged(path: &Path, read: &mut Vec<PathBuf>) -> Result<Settings> {
    let mut settings = read_alone(path)?;
    let Some(includes) = settings.take("include") else {
        return Ok(settings);
    };
    let real = |path: &Path| std::fs::canonicalize(path).unwrap_or_else(|_| path.to_path_buf());
    read.push(real(path));
    let folder = path.parent().unwrap_or(Path::new(""));
    let mut entries: Vec<(String, Setting)> = Vec::new();
    for name in includes.items()? {
        let included = folder.join(name.text()?);
        if read.contains(&real(&included)) || read.len() >= MOST_FILES {
            let expected = format!("at most {MOST_FILES} files, each once,");
            return Err(name.error(&expected, format!("`{}`", included.display())));
        }
        let mut other = merged(&included, read)?;
        _ = other.take("task_list");
        other
            .rest()
            .into_iter()
            .for_each(|entry| put(&mut entries, entry));
    }
    settings
        .rest()
        .into_iter()
        .for_each(|entry| put(&mut entries, entry));
    Ok(Settings::new(entries))
}

/// The settings of a file, without those of others.
pub(super) fn read_alone(path: &Path) -> Result<Settings> {
    let text = require_text(path, MOST_BYTES)?;
    let yaml = Yaml::parse(&text)
        .map_err(|error| Error::schema("YAML", error.problem).at(path, Place::Line(error.line)))?;
    let YamlValue::Map(entries) = yaml.value else {
        let found = format!("found {}", yaml.kind());
        return Err(Error::malformed(
            path,
            format!("expected a mapping of keys, {found}"),
        ));
    };
    let file: Arc<Path> = path.into();
    let setting = |(key, yaml): (String, Yaml)| (key.clone(), Setting::new(key, yaml, &file));
    Ok(Settings::new(entries.into_iter().map(setting).collect()))
}

fn put(entries: &mut Vec<(String, Setting)>, (key, setting): (String, Setting)) {
    match entries.iter_mut().find(|(known, _)| *known == key) {
        Some((_, old)) => *old = setting,
        None => entries.push((key, setting)),
    }
}
