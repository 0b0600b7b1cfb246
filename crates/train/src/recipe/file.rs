//! Reads a recipe: TOML, overrides, and the place of each setting for errors.
//!
//! The file becomes a table, overrides replace entries of it, and the whole becomes a [`Recipe`]. The place of every key, a
//! line or an override, is recorded with the table.

use std::collections::{BTreeMap, BTreeSet};
use std::fs::File;
use std::io::Read;
use std::path::{Component, Path, PathBuf};

use toml::de::{DeTable, DeValue};
use toml::{Table, Value};

use super::check::Problem;
use super::keys;
use crate::error::{io, shown};
use crate::{Error, Recipe, Result};

/// Maximum size of a recipe. Real ones have a thousand bytes.
pub(super) const MAX_BYTES: u64 = 1 << 20;

/// The keys that hold paths.
const PATHS: [&str; 5] = [
    "model.path",
    "model.config",
    "model.tokenizer",
    "model.adapter",
    "data.path",
];

/// Keys that hold tables, whose entries may be overridden one by one.
const TABLES: [&str; 3] = ["data.columns", "lora.rank_pattern", "lora.alpha_pattern"];

/// Keys that exclude each other: an override of one removes the other, if only the file has it.
const RIVALS: [(&str, &str); 2] = [
    ("model.path", "model.config"),
    ("train.steps", "train.epochs"),
];

impl Recipe {
    /// Reads a recipe and replaces settings by `overrides`, each `section.key=value`.
    ///
    /// An entry of a table is replaced alone: `data.columns.prompt=question`. The value of an override is TOML, or else a string: `lora.rank=4`, `train.method=full`,
    /// `lora.target=["q_a_proj", "experts"]`. The last override of a key counts. An override of `train.steps` removes
    /// `train.epochs`, one of `model.path` removes `model.config`, and vice versa.
    ///
    /// Relative paths are relative to the current directory, as on the command line, except paths in the file that start
    /// with `./` or `../`: these are relative to the file. The result has no such path, so a saved recipe means the same in
    /// every folder.
    ///
    /// # Errors
    /// If the file cannot be read or is not TOML, or a setting is unknown, of a wrong type, out of range or missing. The
    /// message names file and line, or the override.
    pub fn open(path: &Path, overrides: &[String]) -> Result<Self> {
        let mut draft = Draft::parse(path, &read(path)?)?;
        for assignment in overrides {
            draft.assign(assignment)?;
        }
        draft.finish()
    }
}

fn read(path: &Path) -> Result<String> {
    let file = File::open(path).map_err(io("open", path))?;
    let mut text = String::new();
    // One byte more than allowed shows that there is more.
    file.take(MAX_BYTES + 1)
        .read_to_string(&mut text)
        .map_err(io("read", path))?;
    if text.len() as u64 > MAX_BYTES {
        return Err(Error::TooLong {
            path: path.to_owned(),
            limit_bytes: MAX_BYTES,
        });
    }
    Ok(text)
}

/// A recipe before it has types.
struct Draft {
    path: PathBuf,
    table: Table,
    /// `section.key` to the place where it was written.
    places: BTreeMap<String, String>,
    overridden: BTreeSet<String>,
}

impl Draft {
    fn parse(path: &Path, text: &str) -> Result<Self> {
        // A byte-order mark is not part of the text; the parser agrees, but counts it.
        let text = text.strip_prefix('\u{feff}').unwrap_or(text);
        let place = |offset: usize| {
            let line = text.bytes().take(offset).filter(|&b| b == b'\n').count() + 1;
            format!("{}:{line}", path.display())
        };
        let syntax = |error: toml::de::Error| Error::Syntax {
            place: place(error.span().map_or(0, |span| span.start)),
            problem: shown(error.message()),
        };
        let mut draft = Self {
            path: path.to_owned(),
            table: text.parse().map_err(syntax)?,
            places: BTreeMap::new(),
            overridden: BTreeSet::new(),
        };
        let spans = DeTable::parse(text).map_err(syntax)?;
        for (section, keys) in spans.get_ref() {
            let section_place = place(section.span().start);
            let section = section.get_ref();
            let DeValue::Table(keys) = keys.get_ref() else {
                let value = draft.table.get(&**section);
                return Err(no_section(section_place, section, value));
            };
            keys::check_section(&section_place, section)?;
            for key in keys.keys() {
                let key_place = place(key.span().start);
                keys::check_key(&key_place, section, key.get_ref())?;
                draft
                    .places
                    .insert(format!("{section}.{}", key.get_ref()), key_place);
            }
        }
        draft.resolve_paths()?;
        Ok(draft)
    }

    /// Makes the file's paths relative to the current directory.
    fn resolve_paths(&mut self) -> Result<()> {
        let folder = self.path.parent().unwrap_or(Path::new("")).to_owned();
        for (section, keys) in &mut self.table {
            let Value::Table(keys) = keys else { continue };
            for (key, value) in keys {
                let key = format!("{section}.{key}");
                if PATHS.contains(&key.as_str()) {
                    let place = self.places.get(&key).cloned().unwrap_or_default();
                    resolve(value, &folder).map_err(|problem| problem.at(place, &key))?;
                }
            }
        }
        Ok(())
    }

    /// Replaces a setting.
    fn assign(&mut self, assignment: &str) -> Result<()> {
        let malformed = || Error::Override {
            found: shown(assignment),
        };
        let (name, value) = assignment.split_once('=').ok_or_else(malformed)?;
        let name = name.trim();
        let (section, key) = name.split_once('.').ok_or_else(malformed)?;
        let place = format!("--set {}", shown(assignment));
        for table in TABLES {
            let entry = name
                .strip_prefix(table)
                .and_then(|rest| rest.strip_prefix('.'));
            if let Some(entry) = entry {
                self.assign_entry(table, entry, parse_value(value.trim()));
                self.places.insert(table.to_owned(), place);
                return Ok(());
            }
        }
        keys::check_key(&place, section, key)?;
        let mut value = parse_value(value.trim());
        if PATHS.contains(&name) {
            resolve(&mut value, Path::new(""))
                .map_err(|problem| problem.at(place.clone(), name))?;
        }

        for (one, other) in RIVALS {
            let rival = match name {
                _ if name == one => other,
                _ if name == other => one,
                _ => continue,
            };
            if !self.overridden.contains(rival) {
                self.remove(rival);
            }
        }
        let section = self
            .table
            .entry(section)
            .or_insert_with(|| Value::Table(Table::new()));
        // Every other value was refused when the file was read.
        if let Value::Table(keys) = section {
            keys.insert(key.to_owned(), value);
        }
        self.overridden.insert(name.to_owned());
        self.places.insert(name.to_owned(), place);
        Ok(())
    }

    /// Replaces an entry of a table.
    fn assign_entry(&mut self, table: &str, entry: &str, value: Value) {
        let mut inner = &mut self.table;
        for name in table.split('.') {
            let found = inner
                .entry(name)
                .or_insert_with(|| Value::Table(Table::new()));
            // What is no table is refused with its type.
            let Value::Table(found) = found else { return };
            inner = found;
        }
        inner.insert(entry.to_owned(), value);
    }

    fn remove(&mut self, name: &str) {
        let keys = name.split_once('.').and_then(|(section, key)| {
            let keys = self.table.get_mut(section)?.as_table_mut()?;
            Some((keys, key))
        });
        if let Some((keys, key)) = keys {
            keys.remove(key);
        }
    }

    fn finish(self) -> Result<Recipe> {
        let mut recipe: Recipe = match self.table.clone().try_into() {
            Ok(recipe) => recipe,
            Err(error) => return Err(self.wrong_type(&error)),
        };
        recipe.resolve();
        recipe.check().map_err(|problem| self.locate(problem))?;
        Ok(recipe)
    }

    /// Finds the setting that made the whole fail, by trying each alone: all others have defaults.
    fn wrong_type(&self, whole: &toml::de::Error) -> Error {
        for (section, keys) in &self.table {
            for (key, value) in keys.as_table().into_iter().flatten() {
                let alone = Table::from_iter([(key.clone(), value.clone())]);
                let alone = Table::from_iter([(section.clone(), Value::Table(alone))]);
                if let Err(error) = alone.try_into::<Recipe>() {
                    return self.locate(Problem {
                        key: format!("{section}.{key}"),
                        expected: expected(error.message()),
                        found: String::new(), // the value as written
                    });
                }
            }
        }
        Error::Syntax {
            place: self.path.display().to_string(),
            problem: shown(whole.message()),
        }
    }

    fn locate(&self, problem: Problem) -> Error {
        // The place of a pattern in a table is that of the table.
        let mut parts = problem.key.splitn(3, '.');
        let (section, key) = (parts.next().unwrap_or(""), parts.next().unwrap_or(""));
        let place = match self.places.get(&format!("{section}.{key}")) {
            Some(place) => place.clone(),
            None => self.path.display().to_string(),
        };
        // The value as it was written, if it was written.
        let written = self.table.get(section).and_then(|keys| keys.get(key));
        let written = written.filter(|_| parts.next().is_none());
        Error::Setting {
            place,
            key: shown(&problem.key),
            expected: problem.expected,
            found: written.map_or(problem.found, |value| shown(&value.to_string())),
        }
    }
}

/// The error for a value outside of a section.
fn no_section(place: String, name: &str, value: Option<&Value>) -> Error {
    if !keys::is_section(name) {
        return keys::outside(&place, name);
    }
    Error::Setting {
        place,
        key: name.to_owned(),
        expected: format!("a section `[{name}]`"),
        found: value.map_or_else(String::new, |value| shown(&value.to_string())),
    }
}

/// Reads the value of an override.
fn parse_value(text: &str) -> Value {
    let as_string = || Value::String(text.to_owned());
    let Ok(mut table) = format!("value = {text}").parse::<Table>() else {
        return as_string();
    };
    match table.remove("value") {
        // No setting is a date, but a folder may be named after one. And a line break could start a second setting.
        Some(Value::Datetime(_)) | None => as_string(),
        Some(_) if !table.is_empty() => as_string(),
        Some(value) => value,
    }
}

/// Why a path was refused.
enum PathProblem {
    NotUtf8,
    NoCurrentDirectory(std::io::Error),
}

impl PathProblem {
    fn at(self, place: String, key: &str) -> Error {
        let found = match self {
            Self::NotUtf8 => "a folder with another name".to_owned(),
            Self::NoCurrentDirectory(cause) => {
                return io("read", Path::new("."))(cause);
            }
        };
        Error::Setting {
            place,
            key: key.to_owned(),
            expected: "a path that is UTF-8 together with the recipe's folder".to_owned(),
            found,
        }
    }
}

/// Makes the paths of a value that start with `./` or `../` relative to the current directory
/// instead of `folder`. Values of wrong types stay, to be refused with the others.
fn resolve(value: &mut Value, folder: &Path) -> Result<(), PathProblem> {
    match value {
        Value::Array(values) => values
            .iter_mut()
            .try_for_each(|value| resolve(value, folder)),
        Value::String(text) => {
            *text = resolve_path(text, folder)?;
            Ok(())
        }
        _ => Ok(()),
    }
}

fn resolve_path(text: &str, folder: &Path) -> Result<String, PathProblem> {
    let starts_with_dots = |path: &Path| {
        let first = path.components().next();
        matches!(first, Some(Component::CurDir | Component::ParentDir))
    };
    if !starts_with_dots(Path::new(text)) {
        return Ok(text.to_owned());
    }
    let joined = folder.join(text);
    let mut path: PathBuf = joined
        .components()
        .filter(|&component| component != Component::CurDir)
        .collect();
    // A path that still starts with dots would mean another place when it is read from the run directory.
    if path.as_os_str().is_empty() || starts_with_dots(&path) {
        path = std::env::current_dir()
            .map_err(PathProblem::NoCurrentDirectory)?
            .join(path);
    }
    path.into_os_string()
        .into_string()
        .map_err(|_| PathProblem::NotUtf8)
}

/// The expected values in plain words, from the message of a deserializer.
fn expected(message: &str) -> String {
    // The message about an entry of a table continues with its place.
    let first_line = message.lines().next().unwrap_or_default();
    let tail = first_line.rsplit_once("expected ").map(|(_, tail)| tail);
    let words = match tail {
        Some("usize" | "u64") => "a non-negative whole number",
        Some("f64") => "a number",
        Some("a boolean") => "`true` or `false`",
        Some("path string") => "a path",
        Some("an object" | "a map") => "a table",
        Some("a sequence") => "a list",
        Some("an array of length 2" | "fewer elements in array") => "a list of 2 numbers",
        Some("string only") => "a string",
        Some(words) => words,
        None => first_line,
    };
    words.to_owned()
}
