//! A run directory: the resolved recipe, the metrics, and checkpoints that are whole or absent.
//!
//! A process may be killed at any moment. A checkpoint is written to a temporary sibling and renamed; it is renamed before
//! it is removed. So everything that has the name of a checkpoint is complete, and leftovers of a killed process have names
//! that say so; the next process removes them. A lock, which ends with its process, keeps two runs from one directory.
//!
//! The content of a checkpoint is the business of the caller and of `checkpoint_state.rs`.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use checkpoint::FolderWriter;
use serde::Deserialize;
use serde_json::Value;

use crate::error::io;
use crate::metrics::{METRICS_NAME, Metrics};
use crate::{Error, Recipe, Result};

pub(crate) const RECIPE_NAME: &str = "recipe.toml";
const LOCK_NAME: &str = ".lock";
/// The last file that [`FolderWriter`] writes: the list of all files with their sizes.
const MANIFEST_NAME: &str = "moeforge.manifest.json";

/// A run directory that this process may write to.
#[derive(Debug)]
pub struct RunDir {
    path: PathBuf,
    /// Held until the value is dropped or the process ends.
    _lock: File,
}

impl RunDir {
    /// Starts a run: creates the directory and writes `recipe.toml`.
    ///
    /// # Errors
    /// If `path` is a file or a folder that is not empty, or cannot be written.
    pub fn create(path: &Path, recipe: &Recipe) -> Result<Self> {
        let exists = |found| Error::RunExists {
            path: path.to_owned(),
            found,
        };
        if path.exists() && !path.is_dir() {
            return Err(exists("a file"));
        }
        let is_used = |path| names(path).map(|names| !names.iter().all(|name| is_leftover(name)));
        // Checked before locking, because the lock would put a file into a folder of somebody else.
        if path.exists() && is_used(path)? {
            return Err(exists("a folder that is not empty"));
        }
        fs::create_dir_all(path).map_err(io("create", path))?;
        let run = Self::lock(path)?;
        // Checked again under the lock, because two processes may have come this far.
        if is_used(path)? {
            return Err(exists("a folder that is not empty"));
        }
        run.clear_leftovers()?;
        checkpoint::write_file(&path.join(RECIPE_NAME), recipe.to_toml().as_bytes())?;
        Ok(run)
    }

    /// Opens the directory of a run to continue it, and removes leftovers of a killed process.
    ///
    /// # Errors
    /// If it is not a run directory, another process is using it, or it cannot be written.
    pub fn open(path: &Path) -> Result<Self> {
        if !path.join(RECIPE_NAME).is_file() {
            return Err(Error::NotARun {
                path: path.to_owned(),
            });
        }
        let run = Self::lock(path)?;
        run.clear_leftovers()?;
        Ok(run)
    }

    /// The directory's path.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The resolved recipe that the run was started with.
    ///
    /// # Errors
    /// If it cannot be read, or was changed into something that is refused.
    pub fn recipe(&self) -> Result<Recipe> {
        Recipe::open(&self.path.join(RECIPE_NAME), &[])
    }

    /// Opens `metrics.jsonl` for a run that continues from the checkpoint of `last_step`, or from its beginning if that is
    /// none. Lines that will be written again are cut off.
    ///
    /// # Errors
    /// If the file cannot be written, or a line that should stay is malformed.
    pub fn metrics(&self, last_step: Option<u64>) -> Result<Metrics> {
        Metrics::open(&self.path.join(METRICS_NAME), last_step)
    }

    /// Writes the checkpoint of a step: `fill` writes its files, and then it gets its name. A complete checkpoint of this
    /// step stays as it is, and `fill` is not called.
    ///
    /// # Errors
    /// If `fill` fails, or writing fails; nothing is left behind then.
    pub fn save(
        &self,
        step: u64,
        fill: impl FnOnce(&mut FolderWriter) -> Result<()>,
    ) -> Result<PathBuf> {
        let path = self.checkpoint_path(step);
        if is_complete(&path) {
            return Ok(path);
        }
        // Perhaps an interrupted copy: no run can continue from it.
        if path.exists() {
            self.remove(step)?;
        }
        let mut writer = FolderWriter::create(&path)?;
        fill(&mut writer)?;
        writer.finish()?;
        Ok(path)
    }

    /// The step and folder of the newest complete checkpoint, if there is one.
    ///
    /// # Errors
    /// If the directory cannot be read.
    pub fn latest(&self) -> Result<Option<(u64, PathBuf)>> {
        let latest = self.steps()?.last().copied();
        Ok(latest.map(|step| (step, self.checkpoint_path(step))))
    }

    /// Removes all checkpoints except the newest and those of the steps `protected`, and returns the removed steps. The
    /// newest one stays even if `keep_last` is 0.
    ///
    /// # Errors
    /// If the directory cannot be read or changed.
    pub fn prune(&self, keep_last: usize, protected: &[u64]) -> Result<Vec<u64>> {
        let mut steps = self.steps()?;
        steps.truncate(steps.len().saturating_sub(keep_last.max(1)));
        steps.retain(|step| !protected.contains(step));
        for &step in &steps {
            self.remove(step)?;
        }
        Ok(steps)
    }

    /// Removes the checkpoints after a step, the newest first.
    ///
    /// # Errors
    /// If the directory cannot be read or changed.
    pub(crate) fn remove_after(&self, last: u64) -> Result<()> {
        let steps = self.steps()?;
        for &step in steps.iter().rev().filter(|step| **step > last) {
            self.remove(step)?;
        }
        Ok(())
    }

    /// The steps of all complete checkpoints, in order.
    pub(crate) fn steps(&self) -> Result<Vec<u64>> {
        let mut steps: Vec<u64> = names(&self.path)?
            .iter()
            .filter_map(|name| step_of(name))
            .filter(|&step| is_complete(&self.checkpoint_path(step)))
            .collect();
        steps.sort_unstable();
        Ok(steps)
    }

    /// The path of the checkpoint of a step, whether it exists or not.
    pub(crate) fn checkpoint_path(&self, step: u64) -> PathBuf {
        self.path.join(format!("checkpoint-{step}"))
    }

    /// Renames a checkpoint, then deletes it.
    fn remove(&self, step: u64) -> Result<()> {
        let path = self.checkpoint_path(step);
        let removed = self.path.join(format!(".checkpoint-{step}.removed.tmp"));
        remove_entry(&removed)?;
        fs::rename(&path, &removed).map_err(io("rename", &path))?;
        remove_entry(&removed)
    }

    fn clear_leftovers(&self) -> Result<()> {
        for name in names(&self.path)? {
            if is_leftover(&name) && name != LOCK_NAME {
                remove_entry(&self.path.join(name))?;
            }
        }
        Ok(())
    }

    fn lock(path: &Path) -> Result<Self> {
        let lock_path = path.join(LOCK_NAME);
        let lock = File::create(&lock_path).map_err(io("create", &lock_path))?;
        if let Err(TryLockError::WouldBlock) = lock.try_lock() {
            return Err(Error::RunInUse {
                path: path.to_owned(),
            });
        }
        // Some network file systems have no locks: users of those have to take care themselves.
        Ok(Self {
            path: path.to_owned(),
            _lock: lock,
        })
    }
}

/// The checkpoint of the run directory around an adapter's folder that has the same tensors: itself, or the newest. None for an
/// adapter elsewhere.
pub(crate) fn checkpoint_of(adapter: &Path) -> Option<PathBuf> {
    let adapter = fs::canonicalize(adapter).ok()?;
    let run = adapter.parent()?;
    if !run.join(RECIPE_NAME).is_file() {
        return None;
    }
    let tensors = digest_of_tensors(&adapter)?;
    let mut steps: Vec<u64> = names(run)
        .ok()?
        .iter()
        .filter_map(|name| step_of(name))
        .collect();
    steps.sort_unstable();
    let paths = steps
        .iter()
        .map(|step| run.join(format!("checkpoint-{step}")));
    let is_same = |path: &PathBuf| digest_of_tensors(path).as_ref() == Some(&tensors);
    let mut same = paths.filter(|path| is_same(path) && is_complete(path));
    let last = same.next_back()?;
    Some(same.find(|path| *path == adapter).unwrap_or(last))
}

/// The hash of an adapter's tensors, in its folder's manifest.
fn digest_of_tensors(folder: &Path) -> Option<String> {
    let manifest: Value =
        serde_json::from_slice(&fs::read(folder.join(MANIFEST_NAME)).ok()?).ok()?;
    let digest = &manifest["files"]["adapter_model.safetensors"]["sha256"];
    Some(digest.as_str()?.to_owned())
}

/// The names in a folder. A name that is not UTF-8 is not ours, and has replacement characters.
fn names(path: &Path) -> Result<Vec<String>> {
    let entries = fs::read_dir(path).map_err(io("read", path))?;
    let names = entries.map(|entry| {
        let entry = entry.map_err(io("read", path))?;
        Ok(entry.file_name().to_string_lossy().into_owned())
    });
    names.collect()
}

/// Whether a name is that of a killed process's leftovers: the lock, or a file that was being written or removed.
fn is_leftover(name: &str) -> bool {
    const STARTS: [&str; 7] = [
        ".checkpoint-",
        ".recipe.toml.",
        ".precision.txt.",
        ".gradients.json.",
        ".report.html.",
        ".adapter.",
        ".model.",
    ];
    let is_ours = STARTS.iter().any(|start| name.starts_with(start));
    name == LOCK_NAME || is_ours && name.ends_with(".tmp")
}

/// The step in a checkpoint's name, without sign or leading zeros; none if it is another name.
fn step_of(name: &str) -> Option<u64> {
    let step: u64 = name.strip_prefix("checkpoint-")?.parse().ok()?;
    (name == format!("checkpoint-{step}")).then_some(step)
}

/// Whether a checkpoint has every file of its manifest, in its full size.
///
/// The program itself leaves no incomplete checkpoint, but a copy may be incomplete, and a loss of power may have let a
/// removal begin before its renaming.
fn is_complete(path: &Path) -> bool {
    #[derive(Deserialize)]
    struct CheckpointManifest {
        files: serde_json::Map<String, Value>,
    }

    let Ok(text) = fs::read(path.join(MANIFEST_NAME)) else {
        return false;
    };
    let Ok(manifest) = serde_json::from_slice::<CheckpointManifest>(&text) else {
        return false;
    };
    manifest.files.iter().all(|(name, file)| {
        let n_bytes = fs::metadata(path.join(name)).map(|metadata| metadata.len());
        n_bytes.ok() == file["bytes"].as_u64()
    })
}

/// Deletes a file or folder if it exists. Links are not followed.
fn remove_entry(path: &Path) -> Result<()> {
    let Ok(metadata) = fs::symlink_metadata(path) else {
        return Ok(());
    };
    let removed = if metadata.is_dir() {
        fs::remove_dir_all(path)
    } else {
        fs::remove_file(path)
    };
    removed.map_err(io("remove", path))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn recipe() -> Recipe {
        let mut recipe = Recipe::default();
        recipe.model.path = Some("m".to_owned());
        recipe.data.path = vec!["d".into()];
        recipe.train.steps = Some(3);
        recipe.resolve();
        recipe
    }

    fn fill(writer: &mut FolderWriter) -> Result<()> {
        Ok(writer.write_bytes("x", b"0123456789")?)
    }

    fn sorted_names(path: &Path) -> Vec<String> {
        let mut names = names(path).unwrap();
        names.sort();
        names
    }

    #[test]
    fn a_run_is_created_once_and_opened_with_its_recipe() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("runs/a");
        let error = RunDir::open(&path).unwrap_err().to_string();
        let expected = "expected a run directory with `recipe.toml`, found none";
        assert!(error.ends_with(expected), "{error}");

        let run = RunDir::create(&path, &recipe()).unwrap();
        assert_eq!(run.latest().unwrap(), None);
        let error = RunDir::open(&path).unwrap_err().to_string();
        assert!(
            error.ends_with("another process is using this run directory"),
            "{error}"
        );
        drop(run);
        let error = RunDir::create(&path, &recipe()).unwrap_err().to_string();
        let expected = "expected no such file or an empty folder, found a folder that is not \
                        empty; to continue a run, use `--resume`";
        assert!(error.ends_with(expected), "{error}");
        let error = RunDir::create(&path.join("recipe.toml"), &recipe()).unwrap_err();
        assert!(matches!(
            error,
            Error::RunExists {
                found: "a file",
                ..
            }
        ));
        assert_eq!(RunDir::open(&path).unwrap().recipe().unwrap(), recipe());
    }

    #[test]
    fn a_run_killed_before_its_recipe_can_be_created_again_and_a_foreign_folder_is_left_alone() {
        let folder = tempfile::tempdir().unwrap();
        fs::write(folder.path().join(".lock"), b"").unwrap();
        fs::write(folder.path().join(".recipe.toml.12-0.tmp"), b"half").unwrap();
        drop(RunDir::create(folder.path(), &recipe()).unwrap());
        assert_eq!(sorted_names(folder.path()), [".lock", "recipe.toml"]);

        let foreign = tempfile::tempdir().unwrap();
        fs::write(foreign.path().join("mine"), b"").unwrap();
        RunDir::create(foreign.path(), &recipe()).unwrap_err();
        assert_eq!(sorted_names(foreign.path()), ["mine"]);
    }

    #[test]
    fn the_latest_checkpoint_is_the_newest_complete_one() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(folder.path(), &recipe()).unwrap();
        for step in [9, 10, 100] {
            run.save(step, fill).unwrap();
        }
        // Not ours, cut short, without a file, without a manifest, not a folder.
        for name in ["checkpoint-0200", "checkpoint-+200", "checkpoint-x"] {
            copy(&run.checkpoint_path(9), &folder.path().join(name));
        }
        for step in [201, 202, 203] {
            copy(&run.checkpoint_path(9), &run.checkpoint_path(step));
        }
        fs::write(run.checkpoint_path(201).join("x"), b"012345678").unwrap();
        fs::remove_file(run.checkpoint_path(202).join("x")).unwrap();
        fs::remove_file(run.checkpoint_path(203).join(MANIFEST_NAME)).unwrap();
        fs::write(run.checkpoint_path(204), b"").unwrap();
        assert_eq!(run.latest().unwrap(), Some((100, run.checkpoint_path(100))));

        // An incomplete one makes room for the one that is written when its step comes.
        run.save(202, fill).unwrap();
        assert_eq!(run.latest().unwrap(), Some((202, run.checkpoint_path(202))));
    }

    fn copy(from: &Path, to: &Path) {
        fs::create_dir(to).unwrap();
        for name in names(from).unwrap() {
            fs::copy(from.join(&name), to.join(&name)).unwrap();
        }
    }

    #[test]
    fn a_failed_checkpoint_leaves_nothing_and_a_complete_one_is_not_written_twice() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(folder.path(), &recipe()).unwrap();
        let error = run.save(5, |writer| {
            fill(writer)?;
            Err(Error::RunInUse {
                path: PathBuf::new(),
            })
        });
        assert!(matches!(error, Err(Error::RunInUse { .. })));
        assert_eq!(sorted_names(folder.path()), [".lock", "recipe.toml"]);
        run.save(5, fill).unwrap();
        run.save(5, |_| panic!("not called")).unwrap();
    }

    #[test]
    fn pruning_keeps_the_newest_and_always_one() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(folder.path(), &recipe()).unwrap();
        for step in [1, 5, 10, 20] {
            run.save(step, fill).unwrap();
        }
        assert_eq!(run.prune(4, &[]).unwrap(), [0; 0]);
        assert_eq!(run.prune(2, &[5, 7]).unwrap(), [1]);
        assert_eq!(run.prune(2, &[]).unwrap(), [5]);
        assert_eq!(run.prune(0, &[]).unwrap(), [10]);
        let expected = [".lock", "checkpoint-20", "recipe.toml"];
        assert_eq!(sorted_names(folder.path()), expected);
    }

    #[test]
    fn what_a_killed_process_left_is_cleared_away_and_nothing_else() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(folder.path(), &recipe()).unwrap();
        run.save(1, fill).unwrap();
        drop(run);
        for name in [".checkpoint-2.123-7.tmp", ".checkpoint-0.removed.tmp"] {
            copy(
                &folder.path().join("checkpoint-1"),
                &folder.path().join(name),
            );
        }
        fs::write(folder.path().join(".notes.tmp"), b"mine").unwrap();
        let run = RunDir::open(folder.path()).unwrap();
        let expected = [".lock", ".notes.tmp", "checkpoint-1", "recipe.toml"];
        assert_eq!(sorted_names(folder.path()), expected);
        assert_eq!(run.latest().unwrap(), Some((1, run.checkpoint_path(1))));
    }
}
