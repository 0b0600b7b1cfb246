//! The keys of a mapping, taken one by one: what is left at the end is unknown.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::yaml::{Yaml, YamlValue};
use crate::{Error, Place, Result};

/// A value under a key, and the file that it is from.
#[derive(Clone, Debug)]
pub(super) struct Setting {
    /// The keys that lead to it, with points.
    key: String,
    pub(super) yaml: Yaml,
    pub(super) file: Arc<Path>,
}

/// Known keys that an error about an unknown one shows: those most like it.
const SHOWN: usize = 5;

/// The settings of a mapping.
#[derive(Clone, Debug)]
pub(super) struct Settings {
    entries: Vec<(String, Setting)>,
    /// The known names so far.
    known: Vec<&'static str>,
}

impl Setting {
    pub(super) fn new(key: impl Into<String>, yaml: Yaml, file: &Arc<Path>) -> Self {
        Self {
            key: key.into(),
            yaml,
            file: Arc::clone(file),
        }
    }

    /// An error about it.
    pub(super) fn error(&self, expected: &str, found: impl std::fmt::Display) -> Error {
        let problem = Error::schema(format!("{expected} as `{}`", self.key), found.to_string());
        problem.at(&self.file, Place::Line(self.yaml.line))
    }

    /// An error that says what kind of value it is.
    pub(super) fn wrong(&self, expected: &str) -> Error {
        match &self.yaml.value {
            YamlValue::Tagged(tag, text) => {
                let hint = if tag == "function" {
                    ": Python is not run"
                } else {
                    ""
                };
                self.error(expected, format!("`!{tag} {text}`{hint}"))
            }
            YamlValue::Text(text) => self.error(expected, format!("`{}`", short(text))),
            YamlValue::Int(number) => self.error(expected, format!("`{number}`")),
            _ => self.error(expected, self.yaml.kind()),
        }
    }

    /// A value inside of it.
    fn inner(&self, key: String, yaml: &Yaml) -> Self {
        Self::new(key, yaml.clone(), &self.file)
    }

    pub(super) fn text(&self) -> Result<String> {
        match &self.yaml.value {
            YamlValue::Text(text) => Ok(text.clone()),
            _ => Err(self.wrong("a text")),
        }
    }

    /// A text or a number, as Python prints it.
    pub(super) fn scalar(&self) -> Result<String> {
        match &self.yaml.value {
            YamlValue::Text(text) => Ok(text.clone()),
            YamlValue::Int(number) => Ok(number.to_string()),
            YamlValue::Float(number) => Ok(crate::jinja::float_text(*number)),
            _ => Err(self.wrong("a text or a number")),
        }
    }

    /// One of some names.
    pub(super) fn one_of<T: Copy>(&self, known: &[(&str, T)]) -> Result<T> {
        let found = match &self.yaml.value {
            YamlValue::Text(text) => known.iter().find(|(name, _)| name == text),
            _ => None,
        };
        let names: Vec<&str> = known.iter().map(|(name, _)| *name).collect();
        found
            .map(|(_, value)| *value)
            .ok_or_else(|| self.wrong(&format!("one of {}", names.join(", "))))
    }

    pub(super) fn boolean(&self) -> Result<bool> {
        match self.yaml.value {
            YamlValue::Bool(is_true) => Ok(is_true),
            _ => Err(self.wrong("true or false")),
        }
    }

    /// A whole number from 0.
    pub(super) fn count(&self) -> Result<usize> {
        match self.yaml.value {
            YamlValue::Int(number) if number >= 0 => Ok(number as usize),
            _ => Err(self.wrong("a whole number from 0")),
        }
    }

    pub(super) fn integer(&self) -> Result<i64> {
        match self.yaml.value {
            YamlValue::Int(number) => Ok(number),
            _ => Err(self.wrong("a whole number")),
        }
    }

    pub(super) fn number(&self) -> Result<f64> {
        match self.yaml.value {
            YamlValue::Int(number) => Ok(number as f64),
            YamlValue::Float(number) => Ok(number),
            _ => Err(self.wrong("a number")),
        }
    }

    pub(super) fn list(&self) -> Result<Vec<Self>> {
        match &self.yaml.value {
            YamlValue::List(items) => {
                let items = items.iter().enumerate();
                let inner = |(at, item)| self.inner(format!("{}[{at}]", self.key), item);
                Ok(items.map(inner).collect())
            }
            _ => Err(self.wrong("a list")),
        }
    }

    /// A list, or the only item of one.
    pub(super) fn items(&self) -> Result<Vec<Self>> {
        match &self.yaml.value {
            YamlValue::List(_) => self.list(),
            _ => Ok(vec![self.clone()]),
        }
    }

    /// Texts, or one.
    pub(super) fn texts(&self) -> Result<Vec<String>> {
        self.items()?.iter().map(Self::text).collect()
    }

    pub(super) fn map(&self) -> Result<Settings> {
        let YamlValue::Map(entries) = &self.yaml.value else {
            return Err(self.wrong("a mapping"));
        };
        let entries = entries.iter().map(|(key, yaml)| {
            let path = format!("{}.{key}", self.key);
            (key.clone(), self.inner(path, yaml))
        });
        Ok(Settings {
            entries: entries.collect(),
            known: Vec::new(),
        })
    }
}

impl Settings {
    pub(super) fn new(entries: Vec<(String, Setting)>) -> Self {
        Self {
            entries,
            known: Vec::new(),
        }
    }

    /// A value, unless it is absent or null.
    pub(super) fn take(&mut self, key: &'static str) -> Option<Setting> {
        self.known.push(key);
        let at = self.entries.iter().position(|(known, _)| known == key)?;
        let (_, setting) = self.entries.remove(at);
        (setting.yaml.value != YamlValue::Null).then_some(setting)
    }

    /// What a value means, unless it is absent or null.
    pub(super) fn read<T>(
        &mut self,
        key: &'static str,
        read: impl FnOnce(&Setting) -> Result<T>,
    ) -> Result<Option<T>> {
        self.take(key).as_ref().map(read).transpose()
    }

    /// The files that values are from, each once.
    pub(super) fn files(&self) -> Vec<PathBuf> {
        let files = self
            .entries
            .iter()
            .map(|(_, value)| value.file.to_path_buf());
        let files: BTreeSet<PathBuf> = files.collect();
        files.into_iter().collect()
    }

    pub(super) fn has(&self, key: &str) -> bool {
        self.entries.iter().any(|(known, _)| known == key)
    }

    /// The values that are left, by their keys.
    pub(super) fn rest(self) -> Vec<(String, Setting)> {
        self.entries
    }

    /// # Errors
    /// If a value is left: its key is unknown.
    pub(super) fn finish(self) -> Result<()> {
        let Some((_, unknown)) = self.entries.first() else {
            return Ok(());
        };
        let last = unknown.key.rsplit('.').next().unwrap_or_default();
        let mut known = self.known;
        known.sort_by(|a, b| {
            let likeness = |key: &str| strsim::jaro_winkler(key, last);
            likeness(b).total_cmp(&likeness(a))
        });
        let known: Vec<String> = known
            .iter()
            .take(SHOWN)
            .map(|key| format!("`{key}`"))
            .collect();
        let expected = format!("a known key, such as {}", known.join(", "));
        let problem = Error::schema(expected, format!("`{}`", unknown.key));
        Err(problem.at(&unknown.file, Place::Line(unknown.yaml.line)))
    }
}

/// The beginning of a text, on one line.
fn short(text: &str) -> String {
    let line: String = text.chars().take(60).collect();
    let line = line.replace('\n', "\\n");
    if text.chars().nth(60).is_some() {
        return format!("{line}…");
    }
    line
}
