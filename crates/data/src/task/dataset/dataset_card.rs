//! The configs that the card of a data set names: its parts, and the files of their splits.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use super::glob::Glob;
use crate::file::require_text;
use crate::task::yaml::{Yaml, YamlValue};
use crate::{Error, Place, Result};

/// The largest card.
const MOST_BYTES: u64 = 8 << 20;

/// A part of a data set.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct DatasetConfig {
    name: String,
    is_default: bool,
    /// Patterns of files by split.
    files: Vec<(String, Vec<String>)>,
    /// The folder that files are looked for in.
    folder: Option<String>,
}

/// The configs of a data set; none without a card that names some.
///
/// # Errors
/// If the card is malformed.
pub(super) fn configs(folder: &Path) -> Result<Vec<DatasetConfig>> {
    let card = folder.join("README.md");
    if !card.is_file() {
        return Ok(Vec::new());
    }
    let text = require_text(&card, MOST_BYTES)?;
    let text = text.replace("\r\n", "\n");
    let front = text.strip_prefix("---\n").and_then(|rest| {
        let end = if rest.starts_with("---") {
            Some(0)
        } else {
            rest.find("\n---")
        };
        end.map(|end| &rest[..end])
    });
    let Some(front) = front else {
        return Ok(Vec::new());
    };
    // One line is above.
    let at = |line: usize, problem: Error| problem.at(&card, Place::Line(line + 1));
    let yaml =
        Yaml::parse(front).map_err(|error| at(error.line, Error::schema("YAML", error.problem)))?;
    let Some(listed) = entry(&yaml, "configs") else {
        return Ok(Vec::new());
    };
    let wrong = |of: &Yaml| {
        let expected = "`configs` with `config_name` and `data_files`";
        at(of.line, Error::schema(expected, of.kind()))
    };
    let YamlValue::List(items) = &listed.value else {
        return Err(wrong(listed));
    };
    let read = |item: &Yaml| DatasetConfig::read(item).ok_or_else(|| wrong(item));
    items.iter().map(read).collect()
}

fn entry<'a>(of: &'a Yaml, key: &str) -> Option<&'a Yaml> {
    let YamlValue::Map(entries) = &of.value else {
        return None;
    };
    let found = entries.iter().find(|(name, _)| name == key);
    found.map(|(_, value)| value)
}

fn text(of: &Yaml) -> Option<String> {
    match &of.value {
        YamlValue::Text(text) => Some(text.clone()),
        // Names such as `2024` or `no`.
        YamlValue::Int(number) => Some(number.to_string()),
        _ => None,
    }
}

/// A text, or a list of them.
fn texts(of: &Yaml) -> Option<Vec<String>> {
    match &of.value {
        YamlValue::List(items) => items.iter().map(text).collect(),
        _ => Some(vec![text(of)?]),
    }
}

impl DatasetConfig {
    fn read(of: &Yaml) -> Option<Self> {
        let files = match entry(of, "data_files") {
            None => Vec::new(),
            Some(files) => Self::files_of(files)?,
        };
        Some(Self {
            name: text(entry(of, "config_name")?)?,
            is_default: entry(of, "default").is_some_and(|of| of.value == YamlValue::Bool(true)),
            files,
            folder: entry(of, "data_dir").and_then(text),
        })
    }

    /// A pattern or several, all of them training rows, or those of each split.
    fn files_of(of: &Yaml) -> Option<Vec<(String, Vec<String>)>> {
        if let Some(patterns) = texts(of) {
            return Some(vec![("train".into(), patterns)]);
        }
        let YamlValue::List(items) = &of.value else {
            return None;
        };
        let of_split = |item: &Yaml| {
            let split = text(entry(item, "split")?)?;
            Some((split, texts(entry(item, "path")?)?))
        };
        items.iter().map(of_split).collect()
    }

    /// The config of a name, or else the default one; none if there are none.
    ///
    /// # Errors
    /// If there is none of that name, or no default among several.
    pub(super) fn choose(configs: Vec<Self>, name: Option<&str>) -> Result<Option<Self>> {
        let names: Vec<String> = configs.iter().map(|config| config.name.clone()).collect();
        let n = configs.len();
        let is_chosen = |config: &Self| match name {
            Some(name) => config.name == name,
            None => n == 1 || config.is_default || config.name == "default",
        };
        match configs.into_iter().find(is_chosen) {
            None if n > 0 => {
                let found = name.map_or("no `dataset_name`".into(), |name| format!("`{name}`"));
                let expected = format!("one of the configs {}", names.join(", "));
                Err(Error::schema(expected, found))
            }
            found => Ok(found),
        }
    }

    /// Whether it says which files it has.
    pub(super) fn has_files(&self) -> bool {
        !self.files.is_empty()
    }

    /// Its files.
    ///
    /// # Errors
    /// If a pattern matches none.
    pub(super) fn splits(&self, folder: &Path) -> Result<BTreeMap<String, Vec<PathBuf>>> {
        let folder = match &self.folder {
            Some(inner) => folder.join(inner),
            None => folder.to_path_buf(),
        };
        let splits = self.files.iter().map(|(split, patterns)| {
            let mut files = Vec::new();
            for pattern in patterns {
                let found = Glob::new(pattern)?.files(&folder)?;
                files.extend(found.ok_or_else(|| {
                    let expected = format!("files `{pattern}` in `{}`", folder.display());
                    Error::schema(expected, "none")
                })?);
            }
            Ok((split.clone(), files))
        });
        splits.collect()
    }
}
