//! Which tasks, groups and tags the task files of a folder define.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use super::definition::TaskDefinition;
use super::included::read_merged;
use super::keys::Setting;
use crate::{Error, Result};

/// Folders that have no tasks.
const WITHOUT_TASKS: [&str; 2] = ["__pycache__", ".ipynb_checkpoints"];

/// What a name stands for.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(super) enum Entry {
    Task(PathBuf),
    Group(PathBuf),
    /// A task that is a class of Python.
    Class(PathBuf),
}

impl Entry {
    fn path(&self) -> &Path {
        match self {
            Self::Task(path) | Self::Group(path) | Self::Class(path) => path,
        }
    }
}

/// Tasks, groups and tags by name.
#[derive(Clone, Debug, Default)]
pub struct TaskIndex {
    entries: BTreeMap<String, Entry>,
    /// Names of tasks by tag.
    tags: BTreeMap<String, BTreeSet<String>>,
}

impl TaskIndex {
    /// All that the task files in a folder define, with those in the folders in it.
    ///
    /// # Errors
    /// If a file cannot be read, or a name is defined twice.
    pub fn open(folder: &Path) -> Result<Self> {
        let mut index = Self::default();
        let mut files = Vec::new();
        collect(folder, &mut files)?;
        files.sort();
        for path in files {
            index.add(&path)?;
        }
        Ok(index)
    }

    /// Adds what a file defines; nothing if it is only for others to include.
    fn add(&mut self, path: &Path) -> Result<()> {
        let mut settings = read_merged(path)?;
        let tags = settings.read("tag", Setting::texts)?;
        let class = settings.take("class");
        let (key, make): (&'static str, fn(PathBuf) -> Entry) =
            match (&class, settings.has("group")) {
                (Some(_), _) => ("task", Entry::Class),
                (None, true) => ("group", Entry::Group),
                (None, false) => ("task", Entry::Task),
            };
        let Some(name) = settings.take(key) else {
            return Ok(());
        };
        let text = name.text()?;
        if let Some(other) = self.entries.get(&text) {
            let other = format!("`{text}`, which `{}` defines too", other.path().display());
            return Err(name.error("a name of its own", other));
        }
        if key == "task" {
            for tag in tags.into_iter().flatten() {
                self.tags.entry(tag).or_default().insert(text.clone());
            }
        }
        self.entries.insert(text, make(path.to_path_buf()));
        Ok(())
    }

    /// What a name is defined as.
    pub(super) fn entry(&self, name: &str) -> Option<&Entry> {
        self.entries.get(name)
    }

    /// The names of all tasks, sorted.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        let is_task = |(_, entry): &(&String, &Entry)| !matches!(entry, Entry::Group(_));
        self.entries
            .iter()
            .filter(is_task)
            .map(|(name, _)| name.as_str())
    }

    /// The names of tasks that a name stands for: that of a task, a tag, or a pattern with `*`; none if there is none.
    pub fn named(&self, name: &str) -> Vec<&str> {
        if let Some(tasks) = self.tags.get(name) {
            return tasks.iter().map(String::as_str).collect();
        }
        let mut parts = name.split('*');
        let first = parts.next().unwrap_or_default();
        let parts: Vec<&str> = parts.collect();
        let is_named = |task: &&str| match parts.split_last() {
            None => *task == name,
            Some((last, inner)) => {
                let mut rest = task.strip_prefix(first);
                for part in inner {
                    rest = rest.and_then(|rest| Some(&rest[rest.find(part)? + part.len()..]));
                }
                rest.is_some_and(|rest| rest.ends_with(last))
            }
        };
        self.names().filter(is_named).collect()
    }

    /// The task of a name.
    ///
    /// # Errors
    /// If there is none, or its file is refused.
    pub fn task(&self, name: &str) -> Result<TaskDefinition> {
        match self.entries.get(name) {
            Some(Entry::Task(path)) => TaskDefinition::open(path),
            Some(entry) => Err(Error::malformed(
                entry.path(),
                "expected a task of keys and templates, found a group or a class of Python",
            )),
            None => Err(Error::schema("the name of a task", format!("`{name}`"))),
        }
    }
}

/// The task files in a folder.
fn collect(folder: &Path, files: &mut Vec<PathBuf>) -> Result<()> {
    let failed = |problem| Error::Read {
        path: folder.to_path_buf(),
        problem,
    };
    for entry in std::fs::read_dir(folder).map_err(failed)? {
        let path = entry.map_err(failed)?.path();
        let is_ignored = path
            .file_name()
            .is_some_and(|name| WITHOUT_TASKS.iter().any(|ignored| name == *ignored));
        if path.is_dir() && !is_ignored {
            collect(&path, files)?;
        } else if path
            .extension()
            .is_some_and(|extension| extension == "yaml")
        {
            files.push(path);
        }
    }
    Ok(())
}
