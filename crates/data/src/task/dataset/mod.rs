//! The data set of a task: which of its files are which split, on this machine.
//!
//! A data set is a list of files, a folder, or a repository in the Hugging Face cache; nothing is downloaded. In a folder, the
//! splits are those that its card names (`configs` in `README.md`), or else those that files and folders are called after.
//!
//! Source: huggingface/datasets: docs/source/repository_structure.mdx, src/datasets/data_files.py.

mod dataset_card;
mod glob;
mod rows;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use self::dataset_card::{DatasetConfig, configs};
use self::glob::Glob;
use self::rows::read_rows;
use super::definition::DatasetSource;
use super::task_row::TaskRow;
use crate::data_folder::{complete, entries, file_name, shard_of, snapshot, stem_and_type};
use crate::{Error, Result};

/// Names that stand for a format and not for a data set.
const FILE_FORMATS: [&str; 3] = ["json", "csv", "parquet"];
/// Words in names of files, and the split that they say.
const SPLIT_WORDS: [(&str, &[&str]); 3] = [
    ("train", &["train", "training"]),
    ("validation", &["validation", "valid", "dev", "val"]),
    ("test", &["test", "testing", "eval", "evaluation"]),
];
/// What the path of a file in a repository begins with.
const HUB_FILE: &str = "hf://datasets/";

/// The files of a data set by split.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct TaskDataset {
    splits: BTreeMap<String, Vec<PathBuf>>,
    /// Where it was found, for errors.
    place: String,
}

/// Where data sets are looked for.
#[derive(Clone, Copy, Debug)]
struct Places<'a> {
    /// The folder of the task's file.
    task: &'a Path,
    /// The Hugging Face cache.
    hub: Option<&'a Path>,
}

impl TaskDataset {
    /// Looks for the data set of a task: at its path, from the working folder or from that of the task's file, or else in the
    /// Hugging Face cache `hub`.
    ///
    /// # Errors
    /// If it is not there; the message says where it was looked for and how to fetch it. If its splits are not clear.
    pub fn find(source: &DatasetSource, task_file: &Path, hub: Option<&Path>) -> Result<Self> {
        let places = Places {
            task: task_file.parent().unwrap_or(Path::new("")),
            hub,
        };
        let found = match FILE_FORMATS.contains(&source.path.as_str()) {
            true if source.files.is_empty() => Err(Error::schema(
                format!("`data_files` with `dataset_path: {}`", source.path),
                "none",
            )),
            true => Self::of_files(source, |name| places.file(name)),
            false => Self::of_folder(source, places),
        };
        found.map_err(|problem| Error::malformed(task_file, problem.to_string()))
    }

    fn of_files(
        source: &DatasetSource,
        find: impl Fn(&str) -> Result<Vec<PathBuf>>,
    ) -> Result<Self> {
        let splits = source.files.iter().map(|(split, names)| {
            let files: Vec<_> = names.iter().map(|name| find(name)).collect::<Result<_>>()?;
            Ok((split.clone(), files.concat()))
        });
        Ok(Self {
            splits: splits.collect::<Result<_>>()?,
            place: "`data_files`".into(),
        })
    }

    fn of_folder(source: &DatasetSource, places: Places<'_>) -> Result<Self> {
        let folder = snapshot(&places.folder(&source.path)?)?;
        let place = format!("`{}`", folder.display());
        if !source.files.is_empty() {
            let found = Self::of_files(source, |name| {
                Glob::new(name)?
                    .files(&folder)?
                    .ok_or_else(|| Error::schema(format!("a file `{name}` in {place}"), "none"))
            })?;
            return Ok(Self { place, ..found });
        }
        let name = source.name.as_deref();
        let config = DatasetConfig::choose(configs(&folder)?, name)
            .map_err(|problem| Error::malformed(&folder, problem.to_string()))?;
        let splits = match config {
            Some(config) if config.has_files() => config.splits(&folder)?,
            _ => splits_in(&configured(&folder, name)?)?,
        };
        Ok(Self { splits, place })
    }

    /// The files of a split. One that no file is called is that of a file with another word for it, such as `dev` for
    /// `validation`.
    ///
    /// # Errors
    /// If there is none, or several could be meant.
    pub fn files(&self, split: &str) -> Result<&[PathBuf]> {
        if let Some(files) = self.splits.get(split) {
            return Ok(files);
        }
        let same = |name: &&String| split_word(name) == Some(split);
        let others: Vec<&String> = self.splits.keys().filter(same).collect();
        match others.as_slice() {
            [only] => Ok(&self.splits[*only]),
            _ => {
                let names: Vec<String> =
                    self.splits.keys().map(|name| format!("`{name}`")).collect();
                let found = if names.is_empty() {
                    "none".into()
                } else {
                    names.join(", ")
                };
                let expected = format!("a split `{split}` in {}", self.place);
                Err(Error::schema(expected, found))
            }
        }
    }

    /// The rows of a split.
    ///
    /// # Errors
    /// As [`Self::files`]; if a file cannot be read, or there is no row in them.
    pub fn rows(&self, split: &str) -> Result<Vec<TaskRow>> {
        read_rows(self.files(split)?)
    }
}

impl Places<'_> {
    /// What is at a path, from the working folder or from that of the task.
    fn local(self, name: &str) -> Option<PathBuf> {
        let candidates = [PathBuf::from(name), self.task.join(name)];
        candidates.into_iter().find(|path| path.exists())
    }

    fn folder(self, name: &str) -> Result<PathBuf> {
        let found = self.local(name).or_else(|| self.repository(name));
        found.ok_or_else(|| {
            let expected = format!("the data set `{name}` at that path or in {}", self.cache());
            Error::schema(expected, format!("none; {}", fetch(name)))
        })
    }

    /// A repository in the cache.
    fn repository(self, name: &str) -> Option<PathBuf> {
        let is_plain = |part: &str| !part.is_empty() && !part.starts_with('.');
        let parts: Vec<&str> = name.split('/').collect();
        if parts.len() > 2 || !parts.iter().all(|part| is_plain(part)) {
            return None;
        }
        let folder = self.hub?.join(format!("datasets--{}", parts.join("--")));
        folder.is_dir().then_some(folder)
    }

    /// Files of a name of `data_files`.
    fn file(self, name: &str) -> Result<Vec<PathBuf>> {
        if let Some(path) = name.strip_prefix(HUB_FILE) {
            return self.hub_file(path);
        }
        if name.contains("://") {
            let expected = "the path of a file as `data_files`, for nothing is downloaded";
            return Err(Error::schema(expected, format!("`{name}`")));
        }
        let pattern = Glob::new(name)?;
        for folder in [Path::new(""), self.task] {
            if let Some(files) = pattern.files(folder)? {
                return Ok(files);
            }
        }
        let places = format!("the working folder or `{}`", self.task.display());
        Err(Error::schema(
            format!("a file `{name}` in {places}"),
            "none",
        ))
    }

    /// A file of a repository.
    fn hub_file(self, path: &str) -> Result<Vec<PathBuf>> {
        let mut parts = path.splitn(3, '/');
        let [org, name, file] = [(); 3].map(|()| parts.next().unwrap_or_default());
        let name = format!("{org}/{}", name.split('@').next().unwrap_or_default());
        let folder = snapshot(&self.folder(&name)?)?;
        let found = Glob::new(file)?.files(&folder)?;
        found.ok_or_else(|| {
            let expected = format!("a file `{file}` in `{}`", folder.display());
            Error::schema(expected, format!("none; {}", fetch(&name)))
        })
    }

    fn cache(self) -> String {
        match self.hub {
            Some(hub) => format!("the Hugging Face cache `{}`", hub.display()),
            None => "a Hugging Face cache (set `HF_HOME`)".into(),
        }
    }
}

/// How a data set is fetched.
fn fetch(name: &str) -> String {
    format!("fetch it with `hf download {name} --repo-type dataset`")
}

/// The folder of a part of a data set that has no card.
fn configured(folder: &Path, name: Option<&str>) -> Result<PathBuf> {
    let Some(name) = name.filter(|name| *name != "default") else {
        return Ok(folder.to_path_buf());
    };
    let is_plain = Path::new(name)
        .components()
        .all(|part| matches!(part, std::path::Component::Normal(_)));
    let candidates = [folder.join(name), folder.join("data").join(name)];
    let found = candidates
        .into_iter()
        .find(|path| is_plain && path.is_dir());
    found.ok_or_else(|| {
        let expected = format!(
            "a folder or a `configs` entry `{name}` of `{}`",
            folder.display()
        );
        Error::schema(expected, "none")
    })
}

/// The files of a folder by what they are called.
fn splits_in(folder: &Path) -> Result<BTreeMap<String, Vec<PathBuf>>> {
    let mut splits: BTreeMap<String, Vec<PathBuf>> = BTreeMap::new();
    collect(folder, &mut splits)?;
    for files in splits.values() {
        let stems = files.iter().filter_map(|file| stem_and_type(file));
        let shards: Vec<_> = stems.filter_map(|(stem, _)| shard_of(stem)).collect();
        complete(&files[0], &shards)?;
    }
    Ok(splits)
}

fn collect(folder: &Path, splits: &mut BTreeMap<String, Vec<PathBuf>>) -> Result<()> {
    for path in entries(folder)? {
        let name = file_name(&path);
        if path.is_dir() && name == "data" {
            collect(&path, splits)?;
        } else if path.is_dir() {
            // `test/0000.parquet`
            let numbered = entries(&path)?;
            let numbered = numbered.into_iter().filter(|file| {
                let stem = stem_and_type(file).map(|(stem, _)| stem);
                stem.is_some_and(|stem| split_of(stem).is_empty())
            });
            let mut numbered = numbered.peekable();
            if numbered.peek().is_some() {
                splits.entry(name).or_default().extend(numbered);
            }
        } else if let Some((stem, _)) = stem_and_type(&path) {
            splits.entry(split_of(stem).into()).or_default().push(path);
        }
    }
    Ok(())
}

/// The name of a split in that of a file, without the numbers of a shard; empty if there are only numbers.
fn split_of(stem: &str) -> &str {
    let at = stem.find("-of-").and_then(|at| {
        let before = stem[..at].trim_end_matches(|c: char| c.is_ascii_digit());
        (before.len() < at).then_some(before.len())
    });
    match at {
        Some(at) => stem[..at].trim_end_matches(['-', '_', '.']),
        None if stem.bytes().all(|byte| byte.is_ascii_digit()) => "",
        None => stem,
    }
}

/// The split that a word in a name says.
fn split_word(name: &str) -> Option<&'static str> {
    let mut words = name.split(|c: char| !c.is_alphanumeric());
    words.find_map(|word| {
        let known = SPLIT_WORDS.iter().find(|(_, words)| words.contains(&word));
        known.map(|(split, _)| *split)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    fn source(path: &str, name: Option<&str>, files: &[(&str, &str)]) -> DatasetSource {
        let files = files.iter();
        DatasetSource {
            path: path.into(),
            name: name.map(str::to_owned),
            files: files
                .map(|(split, file)| ((*split).to_owned(), vec![(*file).to_owned()]))
                .collect(),
        }
    }

    /// A cache with a data set, whose files have these contents.
    fn cache(files: &[(&str, &str)]) -> tempfile::TempDir {
        let place = tempfile::tempdir().unwrap();
        let repository = place.path().join("datasets--a--b");
        for (file, text) in files {
            let path = repository.join("snapshots/0123").join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, text).unwrap();
        }
        std::fs::create_dir_all(repository.join("refs")).unwrap();
        std::fs::write(repository.join("refs/main"), "0123").unwrap();
        place
    }

    fn find(files: &[(&str, &str)], name: Option<&str>) -> Result<TaskDataset, String> {
        let place = cache(files);
        let found = TaskDataset::find(
            &source("a/b", name, &[]),
            Path::new("x/task.yaml"),
            Some(place.path()),
        );
        found.map_err(|problem| {
            let place = place.path().display().to_string();
            problem.to_string().replace(&place, "HUB")
        })
    }

    fn names(found: &TaskDataset, split: &str) -> Vec<String> {
        let files = found.files(split).unwrap().iter();
        let name = |path: &PathBuf| {
            let path = path.display().to_string();
            path.split("snapshots/0123/").nth(1).unwrap().to_owned()
        };
        files.map(name).collect()
    }

    #[test]
    fn splits_are_found_by_the_names_of_files_and_folders() {
        let row = "{\"a\": 1}\n";
        for (files, name, split, expected) in [
            (
                &["test.jsonl", "README.md"][..],
                None,
                "test",
                &["test.jsonl"][..],
            ),
            (
                &["dev.jsonl", "train.jsonl"],
                None,
                "validation",
                &["dev.jsonl"],
            ),
            (
                &["dev.jsonl", "validation.jsonl"],
                None,
                "validation",
                &["validation.jsonl"],
            ),
            (
                &["data/test_r1-00000-of-00001.jsonl"],
                None,
                "test_r1",
                &["data/test_r1-00000-of-00001.jsonl"],
            ),
            (
                &[
                    "main/test-00000-of-00002.jsonl",
                    "main/test-00001-of-00002.jsonl",
                ],
                Some("main"),
                "test",
                &[
                    "main/test-00000-of-00002.jsonl",
                    "main/test-00001-of-00002.jsonl",
                ],
            ),
            (
                &["x/auxiliary_train/0000.jsonl", "y/test/0000.jsonl"],
                Some("x"),
                "auxiliary_train",
                &["x/auxiliary_train/0000.jsonl"],
            ),
        ] {
            let with_rows: Vec<_> = files
                .iter()
                .map(|file| (*file, if *file == "README.md" { "" } else { row }))
                .collect();
            let found = find(&with_rows, name).unwrap();
            assert_eq!(names(&found, split), expected, "{files:?}");
        }
    }

    #[test]
    fn splits_that_are_not_clear_are_refused() {
        let row = "{\"a\": 1}\n";
        let problem = find(&[("main/test-00000-of-00002.jsonl", row)], Some("main")).unwrap_err();
        assert!(problem.contains("expected 2 shards"), "{problem}");
        let problem = find(&[("test.jsonl", row)], Some("main")).unwrap_err();
        assert_eq!(
            problem,
            "x/task.yaml: expected a folder or a `configs` entry `main` of `HUB/datasets--a--b/snapshots/0123`, found none"
        );
        let found = find(&[("dev.jsonl", row), ("val.jsonl", row)], None).unwrap();
        let problem = found.files("validation").unwrap_err().to_string();
        assert!(problem.ends_with("found `dev`, `val`"), "{problem}");
    }

    #[test]
    fn a_card_says_which_files_a_config_has() {
        let card = "---\nlicense: mit\nconfigs:\n- config_name: main\n  data_files:\n  - split: test\n    path: main/test-*\n- config_name: other\n  default: true\n  data_files:\n  - split: train\n    path: [o/a.jsonl, 'o/b*']\n---\n# Card\n";
        let files = [
            ("README.md", card),
            ("main/test-0.jsonl", "{}"),
            ("o/a.jsonl", "{}"),
            ("o/b1.jsonl", "{}"),
        ];
        assert_eq!(
            names(&find(&files, Some("main")).unwrap(), "test"),
            ["main/test-0.jsonl"]
        );
        assert_eq!(
            names(&find(&files, None).unwrap(), "train"),
            ["o/a.jsonl", "o/b1.jsonl"]
        );
        let problem = find(&files, Some("mian")).unwrap_err();
        assert!(
            problem.ends_with("expected one of the configs main, other, found `mian`"),
            "{problem}"
        );
    }

    #[test]
    fn an_absent_data_set_says_where_it_was_looked_for_and_how_to_fetch_it() {
        let place = tempfile::tempdir().unwrap();
        let task = place.path().join("task.yaml");
        let find = |source: DatasetSource| {
            let hub = place.path().join("hub");
            let problem = TaskDataset::find(&source, &task, Some(&hub)).unwrap_err();
            problem
                .to_string()
                .replace(&place.path().display().to_string(), "DIR")
        };
        assert_eq!(
            find(source("openai/gsm8k", Some("main"), &[])),
            "DIR/task.yaml: expected the data set `openai/gsm8k` at that path or in the Hugging Face cache `DIR/hub`, found none; fetch it with `hf download openai/gsm8k --repo-type dataset`"
        );
        assert_eq!(
            find(source("json", None, &[("test", "rows.jsonl")])),
            "DIR/task.yaml: expected a file `rows.jsonl` in the working folder or `DIR`, found none"
        );
        assert_eq!(
            find(source("json", None, &[("test", "https://a.b/c")])),
            "DIR/task.yaml: expected the path of a file as `data_files`, for nothing is downloaded, found `https://a.b/c`"
        );
        assert_eq!(
            find(source("csv", None, &[])),
            "DIR/task.yaml: expected `data_files` with `dataset_path: csv`, found none"
        );
    }

    #[test]
    fn files_are_found_next_to_the_task_and_in_the_cache() {
        let place = cache(&[("d/x.jsonl", "{\"a\": 1}")]);
        let task = place.path().join("tasks/task.yaml");
        std::fs::create_dir_all(task.parent().unwrap()).unwrap();
        std::fs::write(
            place.path().join("tasks/rows.jsonl"),
            "{\"a\": 2}\n{\"a\": 3}",
        )
        .unwrap();
        for (file, expected) in [
            ("rows.jsonl", 2),
            ("*.jsonl", 2),
            ("hf://datasets/a/b/d/*", 1),
        ] {
            let source = source("json", None, &[("test", file)]);
            let found = TaskDataset::find(&source, &task, Some(place.path())).unwrap();
            assert_eq!(found.rows("test").unwrap().len(), expected, "{file}");
        }
    }
}
