//! Data folders: which files are the training, the validation and the test split.
//!
//! A split is a file (`train.jsonl`), shards (`train-00000-of-00002.parquet`) or a folder (`train/…`) that has one of the
//! split's names. They lie in the folder itself, in its `data`, in a single folder of another name, or in the snapshot of a
//! data set in the Hugging Face cache. Only one of these may have a split: which one was meant is not guessed.

use crate::error::{Error, Result};
use crate::table::file_type;
use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

/// A part of a data set.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum SplitName {
    /// What is learned.
    Train,
    /// What is looked at during training.
    Validation,
    /// What is looked at afterwards.
    Test,
}

impl SplitName {
    /// All of them.
    pub const ALL: [Self; 3] = [Self::Train, Self::Validation, Self::Test];

    /// The names that files and folders of the split have.
    pub fn names(self) -> &'static [&'static str] {
        match self {
            Self::Train => &["train", "training"],
            Self::Validation => &["valid", "validation", "val", "dev", "eval"],
            Self::Test => &["test"],
        }
    }

    /// The split with files of that name.
    fn of(name: &str) -> Option<Self> {
        let mut all = Self::ALL.into_iter();
        all.find(|split| split.names().contains(&name))
    }
}

impl fmt::Display for SplitName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Train => "training",
            Self::Validation => "validation",
            Self::Test => "test",
        })
    }
}

/// The files of a data folder.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub struct DataFolder {
    splits: BTreeMap<SplitName, Vec<PathBuf>>,
    unused: Vec<PathBuf>,
}

/// The types of files with rows, Arrow's to be refused by name.
const ROW_FILES: [&str; 7] = ["jsonl", "ndjson", "json", "csv", "tsv", "parquet", "arrow"];
/// What other programs write next to rows.
const DESCRIPTION_FILES: [&str; 4] = [
    "dataset_info.json",
    "dataset_infos.json",
    "dataset_dict.json",
    "state.json",
];

/// Files that may be a split.
#[derive(Clone, Debug)]
struct SplitCandidate {
    split: SplitName,
    files: Vec<PathBuf>,
}

/// A file, and its numbers if it is a shard.
type Part = (PathBuf, Option<ShardNumber>);

#[derive(Default)]
struct Scan {
    candidates: Vec<SplitCandidate>,
    unused: Vec<PathBuf>,
    /// Folders that may be the configurations of a data set.
    others: Vec<PathBuf>,
}

impl DataFolder {
    /// Looks into a folder. A file in place of one is a training split.
    ///
    /// # Errors
    /// If it cannot be read, a split has two candidates or lacks a shard, or several folders in it have splits.
    pub fn open(path: &Path) -> Result<Self> {
        if path.is_file() {
            return Ok(Self {
                splits: [(SplitName::Train, vec![path.to_path_buf()])].into(),
                unused: Vec::new(),
            });
        }
        let folder = snapshot(path)?;
        let mut scan = Scan::of(&folder)?;
        if scan.candidates.is_empty() {
            scan = scan.single_folder()?;
        }
        let mut splits: BTreeMap<SplitName, Vec<PathBuf>> = BTreeMap::new();
        for candidate in scan.candidates {
            let first = &candidate.files[0];
            if let Some(other) = splits.get(&candidate.split) {
                let name = |file: &Path| {
                    file.strip_prefix(&folder)
                        .unwrap_or(file)
                        .display()
                        .to_string()
                };
                let problem = format!(
                    "expected one {} split, found `{}` and `{}`",
                    candidate.split,
                    name(&other[0]),
                    name(first)
                );
                return Err(Error::malformed(&folder, problem));
            }
            splits.insert(candidate.split, candidate.files);
        }
        Ok(Self {
            splits,
            unused: scan.unused,
        })
    }

    /// The files of a split, in their order; none if it has none.
    pub fn files(&self, split: SplitName) -> &[PathBuf] {
        self.splits.get(&split).map_or(&[], Vec::as_slice)
    }

    /// Files that belong to no split.
    pub fn unused(&self) -> &[PathBuf] {
        &self.unused
    }
}

impl Scan {
    fn of(folder: &Path) -> Result<Self> {
        let mut scan = Self::default();
        // By name, type and whether they are shards.
        let mut groups: BTreeMap<(&str, String, bool), Vec<Part>> = BTreeMap::new();
        for path in entries(folder)? {
            let name = file_name(&path);
            if path.is_dir() {
                scan.add_folder(path)?;
                continue;
            }
            let Some((stem, kind)) = stem_and_type(&path) else {
                scan.unused.extend((!is_description(&name)).then_some(path));
                continue;
            };
            match parse(stem) {
                Some((split_name, shard)) => {
                    let key = (split_name, kind.to_owned(), shard.is_some());
                    groups.entry(key).or_default().push((path.clone(), shard));
                }
                None => scan.unused.extend((!is_description(&name)).then_some(path)),
            }
        }
        for ((name, ..), files) in groups {
            let shards: Vec<ShardNumber> = files.iter().filter_map(|(_, shard)| *shard).collect();
            complete(&files[0].0, &shards)?;
            if let Some(split) = SplitName::of(name) {
                let files = files.into_iter().map(|(path, _)| path).collect();
                scan.candidates.push(SplitCandidate { split, files });
            }
        }
        Ok(scan)
    }

    fn add_folder(&mut self, path: PathBuf) -> Result<()> {
        let name = file_name(&path);
        if let Some(split) = SplitName::of(&name) {
            let (mut files, mut shards) = (Vec::new(), Vec::new());
            for file in entries(&path)? {
                match stem_and_type(&file) {
                    Some((stem, _)) if !is_description(&file_name(&file)) => {
                        shards.extend(shard_of(stem));
                        files.push(file);
                    }
                    _ => self
                        .unused
                        .extend((!is_description(&file_name(&file))).then_some(file)),
                }
            }
            if let Some(first) = files.first() {
                complete(first, &shards)?;
                self.candidates.push(SplitCandidate { split, files });
            }
        } else if name == "data" {
            let inner = Self::of(&path)?;
            self.candidates.extend(inner.candidates);
            self.unused.extend(inner.unused);
        } else if !name.starts_with('.') {
            self.others.push(path);
        }
        Ok(())
    }

    /// The one folder in this one that has splits, if there is any.
    fn single_folder(self) -> Result<Self> {
        let mut found: Option<(&Path, Self)> = None;
        for path in &self.others {
            let scan = Self::of(path)?;
            if scan.candidates.is_empty() {
                continue;
            }
            if let Some((other, _)) = &found {
                let folder = path.parent().unwrap_or(path);
                let problem = format!(
                    "expected one folder with a training split, found `{}` and `{}`; give one of them",
                    file_name(other),
                    file_name(path)
                );
                return Err(Error::malformed(folder, problem));
            }
            found = Some((path, scan));
        }
        Ok(found.map(|(_, scan)| scan).unwrap_or(self))
    }
}

/// What is in a folder, by name.
pub(crate) fn entries(folder: &Path) -> Result<Vec<PathBuf>> {
    let read = |problem| Error::Read {
        path: folder.to_path_buf(),
        problem,
    };
    let entries = fs::read_dir(folder).map_err(read)?;
    let paths = entries.map(|entry| Ok(entry.map_err(read)?.path()));
    let mut paths = paths.collect::<Result<Vec<_>>>()?;
    paths.sort();
    Ok(paths)
}

pub(crate) fn file_name(path: &Path) -> String {
    path.file_name()
        .unwrap_or_default()
        .to_string_lossy()
        .into_owned()
}

/// Whether a file says something of the data, and is none of it.
fn is_description(name: &str) -> bool {
    let ends = [
        ".md", ".py", ".sh", ".toml", ".yaml", ".yml", ".lock", ".sha256",
    ];
    name.starts_with(['.', '_'])
        || ["README", "LICENSE"]
            .iter()
            .any(|start| name.starts_with(start))
        || DESCRIPTION_FILES.contains(&name)
        || ends.iter().any(|end| name.ends_with(end))
}

/// The name of a file with rows without its types, and these.
pub(crate) fn stem_and_type(path: &Path) -> Option<(&str, &str)> {
    let kind = file_type(path)?;
    if !ROW_FILES.contains(&kind.as_str()) {
        return None;
    }
    let name = path.file_name()?.to_str()?;
    let at = name.to_ascii_lowercase().rfind(&format!(".{kind}"))?;
    name.split_at_checked(at)
}

/// A numbered part of a split, and the number of parts if the name says it.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct ShardNumber {
    number: usize,
    of: Option<usize>,
}

/// A split's name, alone or before the numbers of a shard.
fn parse(stem: &str) -> Option<(&'static str, Option<ShardNumber>)> {
    let mut names = SplitName::ALL
        .into_iter()
        .flat_map(SplitName::names)
        .copied();
    names.find_map(|name| match stem.strip_prefix(name)? {
        "" => Some((name, None)),
        rest => Some((name, Some(shard(rest.strip_prefix(['-', '_', '.'])?)?))),
    })
}

/// The numbers at the end of any name.
pub(crate) fn shard_of(stem: &str) -> Option<ShardNumber> {
    let at = stem.rfind("-of-")?;
    let before = stem[..at].rfind(['-', '_', '.']).map_or(0, |at| at + 1);
    shard(&stem[before..])
}

/// `00000-of-00002`, perhaps with a hash behind, or a number alone.
fn shard(text: &str) -> Option<ShardNumber> {
    let digits = |text: &str| {
        let all = !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        all.then(|| text.parse().ok()).flatten()
    };
    let (number, of) = match text.split_once("-of-") {
        Some((number, rest)) => {
            let of = rest.split_once('-').map_or(rest, |(of, _)| of);
            (number, Some(digits(of)?))
        }
        None => (text, None),
    };
    Some(ShardNumber {
        number: digits(number)?,
        of,
    })
}

/// Refuses shards of which one is missing.
pub(crate) fn complete(first: &Path, shards: &[ShardNumber]) -> Result<()> {
    let totals: BTreeSet<usize> = shards.iter().filter_map(|shard| shard.of).collect();
    let Some(&total) = totals.first() else {
        return Ok(());
    };
    if let Some(other) = totals.iter().nth(1) {
        let problem =
            format!("expected shards of one data set, found those of {total} and of {other}");
        return Err(Error::malformed(first, problem));
    }
    let found: BTreeSet<usize> = shards.iter().map(|shard| shard.number).collect();
    if found.len() != total {
        // More numbers than there are shards: nothing is missing from the beginning.
        let missing = (0..total)
            .find(|number| !found.contains(number))
            .unwrap_or(total);
        let problem = format!(
            "expected {total} shards beside each other, found {} (number {missing} is missing)",
            found.len()
        );
        return Err(Error::malformed(first, problem));
    }
    Ok(())
}

/// The files of a data set in the Hugging Face cache, if the folder is one there; otherwise the folder itself.
pub(crate) fn snapshot(folder: &Path) -> Result<PathBuf> {
    let snapshots = folder.join("snapshots");
    if !snapshots.is_dir() {
        return Ok(folder.to_path_buf());
    }
    let main = fs::read_to_string(folder.join("refs/main"));
    if let Ok(commit) = &main
        && commit
            .trim()
            .bytes()
            .all(|byte| byte.is_ascii_alphanumeric())
        && snapshots.join(commit.trim()).is_dir()
    {
        return Ok(snapshots.join(commit.trim()));
    }
    match entries(&snapshots)?.as_slice() {
        [only] => Ok(only.clone()),
        all => {
            let found = all.len();
            Err(Error::malformed(
                &snapshots,
                format!("expected one snapshot, found {found}; give one of them"),
            ))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The files of the splits of a folder with these files, and those of none.
    fn open(files: &[&str], at: &str) -> Result<Vec<Vec<String>>, String> {
        let place = tempfile::tempdir().unwrap();
        for file in files {
            let path = place.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "abc").unwrap();
        }
        let root = place.path().join(at);
        let folder = DataFolder::open(&root).map_err(|problem| {
            problem
                .to_string()
                .replace(&place.path().display().to_string(), "DIR")
        })?;
        let names = |files: &[PathBuf]| {
            let name = |file: &PathBuf| {
                file.strip_prefix(place.path())
                    .unwrap()
                    .display()
                    .to_string()
            };
            files.iter().map(name).collect::<Vec<_>>()
        };
        let splits = SplitName::ALL.map(|split| names(folder.files(split)));
        Ok(splits.into_iter().chain([names(folder.unused())]).collect())
    }

    fn check(files: &[&str], expected: [&[&str]; 4]) {
        let expected = expected.map(|files| {
            files
                .iter()
                .map(|file| (*file).to_owned())
                .collect::<Vec<_>>()
        });
        assert_eq!(open(files, "").unwrap(), expected, "{files:?}");
    }

    #[test]
    fn splits_are_known_by_their_names() {
        check(
            &["train.jsonl", "valid.jsonl", "test.jsonl"],
            [&["train.jsonl"], &["valid.jsonl"], &["test.jsonl"], &[]],
        );
        for name in [
            "validation.csv",
            "val.json.gz",
            "dev.parquet",
            "eval.ndjson",
            "valid.TSV",
        ] {
            check(
                &["train.jsonl", name],
                [&["train.jsonl"], &[name], &[], &[]],
            );
        }
        check(
            &["training.json", "README.md", "dataset_info.json"],
            [&["training.json"], &[], &[], &[]],
        );
        check(
            &[
                "Train.jsonl",
                "train.txt",
                "trainer.jsonl",
                "train_sft.jsonl",
                "x.csv",
            ],
            [
                &[],
                &[],
                &[],
                &[
                    "Train.jsonl",
                    "train.txt",
                    "train_sft.jsonl",
                    "trainer.jsonl",
                    "x.csv",
                ],
            ],
        );
    }

    #[test]
    fn shards_and_folders_are_splits() {
        let (a, b) = (
            "data/train-00000-of-00002.parquet",
            "data/train-00001-of-00002.parquet",
        );
        let valid = "data/validation-00000-of-00001-0123456789abcdef.parquet";
        check(&[b, a, valid, "README.md"], [&[a, b], &[valid], &[], &[]]);
        check(
            &["train-0.jsonl", "train_1.jsonl"],
            [&["train-0.jsonl", "train_1.jsonl"], &[], &[], &[]],
        );
        let converted = [
            "default/train/0000.parquet",
            "default/train/0001.parquet",
            "default/test/0000.parquet",
        ];
        check(&converted, [&converted[..2], &[], &converted[2..], &[]]);
        check(
            &["train/a.jsonl", "train/notes.txt"],
            [&["train/a.jsonl"], &[], &[], &["train/notes.txt"]],
        );
        let saved = [
            "train/data-00000-of-00001.arrow",
            "train/state.json",
            "dataset_dict.json",
        ];
        check(&saved, [&saved[..1], &[], &[], &[]]);
    }

    #[test]
    fn what_could_be_two_things_is_refused() {
        let refused = |files: &[&str], expected: &str| {
            let problem = open(files, "").unwrap_err();
            assert!(problem.contains(expected), "{problem}");
        };
        refused(
            &["val.jsonl", "validation.jsonl"],
            "expected one validation split, found `val.jsonl` and `validation.jsonl`",
        );
        refused(
            &["train.jsonl", "train.csv"],
            "found `train.csv` and `train.jsonl`",
        );
        refused(
            &["train.jsonl", "train-0.jsonl"],
            "found `train.jsonl` and `train-0.jsonl`",
        );
        refused(
            &["train.jsonl", "data/train.jsonl"],
            "expected one training split, found ",
        );
        refused(
            &["main/train.jsonl", "socratic/train.jsonl"],
            "found `main` and `socratic`; give one of them",
        );
        refused(
            &["train-00001-of-00002.parquet"],
            "expected 2 shards beside each other, found 1 (number 0 is missing)",
        );
        refused(
            &[
                "train/x-00000-of-00003.parquet",
                "train/x-00002-of-00003.parquet",
            ],
            "expected 3 shards beside each other, found 2 (number 1 is missing)",
        );
        refused(
            &["train-0-of-2.csv", "train-0-of-1.csv"],
            "those of 1 and of 2",
        );
    }

    #[test]
    fn the_cache_of_the_hub_has_its_snapshot() {
        let place = "datasets--a--b";
        let file = format!("{place}/snapshots/abc/data/train.parquet");
        let main = format!("{place}/refs/main");
        assert_eq!(open(&[&file, &main], place).unwrap()[0], [file.as_str()]);
        let other = format!("{place}/snapshots/def/train.parquet");
        assert_eq!(
            open(&[&file, &main, &other], place).unwrap()[0],
            [file.as_str()]
        );
        let problem = open(&[&file, &other], place).unwrap_err();
        assert!(
            problem.ends_with("snapshots: expected one snapshot, found 2; give one of them"),
            "{problem}"
        );
        assert_eq!(open(&[&file], &file).unwrap()[0], [file.as_str()]);
        assert!(
            open(&[], "nowhere")
                .unwrap_err()
                .starts_with("DIR/nowhere: cannot read: ")
        );
    }
}
