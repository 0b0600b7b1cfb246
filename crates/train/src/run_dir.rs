//! A run directory: the resolved recipe, the metrics, and checkpoints that are whole or absent.
//!
//! A process may be killed at any moment. A checkpoint is written to a temporary sibling and renamed; it is renamed before
//! it is removed. So everything that has the name of a checkpoint is complete, and leftovers of a killed process have names
//! that say so; the next process removes them. A lock, which ends with its process, keeps two runs from one directory.
//!
//! The content of a checkpoint is the business of the caller and of `checkpoint_state.rs`.

use std::fs::{self, File, TryLockError};
use std::path::{Path, PathBuf};

use checkpoint::{Adapter, FolderWriter};
use serde::Deserialize;
use serde_json::Value;

use crate::error::io;
use crate::metrics::{LastLine, METRICS_NAME, Metrics};
use crate::origin::RunOrigin;
use crate::{Error, Recipe, Result};

pub(crate) const RECIPE_NAME: &str = "recipe.toml";
const LOCK_NAME: &str = ".lock";
/// The end of the name of a checkpoint that is about to replace another.
const REPLACEMENT_END: &str = ".new";
/// The copy of the adapter that the run began with: the run needs it when it is resumed, wherever the original is.
const START_NAME: &str = "start";
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
    /// Starts a run: creates the directory and writes `recipe.toml`, where it began, and a copy of the adapter that it
    /// begins with.
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
        RunOrigin::here(path)?.write(path)?;
        if let Some(adapter) = &recipe.model.adapter {
            let mut writer = FolderWriter::create(&path.join(START_NAME))?;
            Adapter::copy_into(adapter, &mut writer)?;
            writer.finish()?;
        }
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

    /// The run's recipe with some settings replaced, as [`Recipe::open`] does. A path among them that exists is made
    /// absolute, so that it means the same in every folder.
    ///
    /// # Errors
    /// If a setting is refused, or may not change during a run.
    pub fn changed_recipe(&self, overrides: &[String]) -> Result<Recipe> {
        let mut recipe = Recipe::open(&self.path.join(RECIPE_NAME), overrides)?;
        let before = self.recipe()?;
        let changes = recipe.refused_changes(&before);
        if !changes.is_empty() {
            return Err(Error::OtherSettings {
                path: self.path.clone(),
                changes,
            });
        }
        recipe.make_absolute(&before)?;
        Ok(recipe)
    }

    /// Replaces the run's recipe, so that whoever resumes it goes on with this one.
    ///
    /// # Errors
    /// If it cannot be written.
    pub fn replace_recipe(&self, recipe: &Recipe) -> Result<()> {
        let path = self.path.join(RECIPE_NAME);
        Ok(checkpoint::write_file(&path, recipe.to_toml().as_bytes())?)
    }

    /// The recipe of this run with its paths as they are now, if the run or what it needs was moved.
    ///
    /// # Errors
    /// If a file or folder is nowhere; the message lists the places.
    pub fn locate(&self, recipe: &Recipe) -> Result<Recipe> {
        let start = Some(self.path.join(START_NAME)).filter(|start| start.exists());
        RunOrigin::read(&self.path)?.locate(recipe, &self.path, start)
    }

    /// Opens `metrics.jsonl` for a run that continues from the checkpoint of `last_step`, or from its beginning if that is
    /// none. Lines that will be written again are cut off.
    ///
    /// # Errors
    /// If the file cannot be written, or a line that should stay is malformed.
    pub fn metrics(&self, last_step: Option<u64>) -> Result<Metrics> {
        let last = last_step.map(LastLine::of_step);
        Metrics::open(&self.path.join(METRICS_NAME), last)
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

    /// Writes a checkpoint in the place of one of the same step. If the process is killed meanwhile, one of the two stays.
    ///
    /// # Errors
    /// As [`RunDir::save`].
    pub(crate) fn replace(
        &self,
        step: u64,
        fill: impl FnOnce(&mut FolderWriter) -> Result<()>,
    ) -> Result<()> {
        let replacement = self.replacement_path(step);
        remove_entry(&replacement)?;
        let mut writer = FolderWriter::create(&replacement)?;
        fill(&mut writer)?;
        writer.finish()?;
        self.remove(step)?;
        let path = self.checkpoint_path(step);
        fs::rename(&replacement, &path).map_err(io("rename", &replacement))
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

    /// The name of a checkpoint that is about to replace one.
    fn replacement_path(&self, step: u64) -> PathBuf {
        self.path
            .join(format!("checkpoint-{step}{REPLACEMENT_END}"))
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
        self.finish_replacing()?;
        for name in names(&self.path)? {
            if is_leftover(&name) && name != LOCK_NAME {
                remove_entry(&self.path.join(name))?;
            }
        }
        Ok(())
    }

    /// Names the checkpoints whose predecessors a killed process had removed already.
    fn finish_replacing(&self) -> Result<()> {
        for name in names(&self.path)? {
            let Some(step) = replaced_step(&name) else {
                continue;
            };
            let (replacement, path) = (self.replacement_path(step), self.checkpoint_path(step));
            if !path.exists() && is_complete(&replacement) {
                fs::rename(&replacement, &path).map_err(io("rename", &replacement))?;
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

/// Whether a name is that of a killed process's leftovers: the lock, a file that was being written or removed, or a
/// checkpoint that was to replace another.
fn is_leftover(name: &str) -> bool {
    const STARTS: [&str; 9] = [
        ".checkpoint-",
        ".origin.json.",
        ".start.",
        ".recipe.toml.",
        ".precision.txt.",
        ".gradients.json.",
        ".report.html.",
        ".adapter.",
        ".model.",
    ];
    let is_ours = STARTS.iter().any(|start| name.starts_with(start));
    name == LOCK_NAME || is_ours && name.ends_with(".tmp") || replaced_step(name).is_some()
}

/// The step of a checkpoint that is about to replace another, from its name.
fn replaced_step(name: &str) -> Option<u64> {
    step_of(name.strip_suffix(REPLACEMENT_END)?)
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
        assert_eq!(
            sorted_names(folder.path()),
            [".lock", "origin.json", "recipe.toml"]
        );

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
        assert_eq!(
            sorted_names(folder.path()),
            [".lock", "origin.json", "recipe.toml"]
        );
        run.save(5, fill).unwrap();
        run.save(5, |_| panic!("not called")).unwrap();
    }

    #[test]
    fn a_replaced_checkpoint_is_the_old_one_or_the_new_one_wherever_the_process_is_killed() {
        let folder = tempfile::tempdir().unwrap();
        let run = RunDir::create(folder.path(), &recipe()).unwrap();
        let content = |run: &RunDir| fs::read(run.checkpoint_path(3).join("x")).unwrap();
        let new = |writer: &mut FolderWriter| Ok(writer.write_bytes("x", b"new")?);
        run.save(3, fill).unwrap();
        run.replace(3, new).unwrap();
        assert_eq!(content(&run), b"new");
        assert_eq!(run.steps().unwrap(), [3]);

        // Killed before the old one was removed, and after that.
        let replacement = run.replacement_path(3);
        copy(&run.checkpoint_path(3), &replacement);
        run.remove(3).unwrap();
        run.save(3, fill).unwrap();
        drop(run);
        let run = RunDir::open(folder.path()).unwrap();
        assert_eq!(content(&run), b"0123456789");
        assert!(!replacement.exists());
        let mut writer = FolderWriter::create(&replacement).unwrap();
        new(&mut writer).unwrap();
        writer.finish().unwrap();
        run.remove(3).unwrap();
        drop(run);
        let run = RunDir::open(folder.path()).unwrap();
        assert_eq!(content(&run), b"new");
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
        let expected = [".lock", "checkpoint-20", "origin.json", "recipe.toml"];
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
        let expected = [
            ".lock",
            ".notes.tmp",
            "checkpoint-1",
            "origin.json",
            "recipe.toml",
        ];
        assert_eq!(sorted_names(folder.path()), expected);
        assert_eq!(run.latest().unwrap(), Some((1, run.checkpoint_path(1))));
    }
}
