//! Finds a model by a path, or by `org/name` in the local Hugging Face cache. Nothing is ever downloaded.
//!
//! Source: huggingface/huggingface_hub: src/huggingface_hub/file_download.py (the layout of the
//! cache).

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::shown;
use crate::folder::is_plain_file_name;
use crate::{Error, Result};

/// The folder or file of a model.
///
/// `model` is a path; if that does not exist, it is a name `org/name` in the cache below `hf_home`, which means the snapshot of
/// `refs/main`, or else the only one.
///
/// # Errors
/// If there is no model at either place. The message names both.
pub fn resolve(model: &str, hf_home: Option<&Path>) -> Result<PathBuf> {
    let path = PathBuf::from(model);
    if path.exists() {
        return Ok(path);
    }
    look_up(model, hf_home).map_err(|cache| Error::ModelNotFound {
        model: shown(model),
        cache,
    })
}

/// A model on the Hub.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct Published {
    /// `org/name`.
    pub(crate) repo: String,
    /// The commit that was downloaded.
    pub(crate) revision: String,
}

/// The published model that a folder or file of the cache is a copy of; none for any other path.
pub(crate) fn published(path: &Path) -> Option<Published> {
    // A file in a snapshot is a link, and leads out of it; its folder is not.
    let folder = if path.is_dir() { path } else { path.parent()? };
    let whole = fs::canonicalize(folder).ok()?;
    let parts: Vec<&str> = whole.iter().filter_map(|part| part.to_str()).collect();
    let at = parts
        .windows(3)
        .rev()
        .find(|parts| parts[1] == "snapshots")?;
    let repo = at[0].strip_prefix("models--")?.replacen("--", "/", 1);
    split_name(&repo)?;
    let revision = at[2].to_owned();
    Some(Published { repo, revision })
}

/// Looks into the cache; an error is the end of the sentence "no such file or folder, …".
fn look_up(model: &str, hf_home: Option<&Path>) -> Result<PathBuf, String> {
    let Some((org, name)) = split_name(model) else {
        return Err("and not an `org/name` in the Hugging Face cache".to_owned());
    };
    let Some(hf_home) = hf_home else {
        return Err("and no Hugging Face cache to look it up in; set `HF_HOME`".to_owned());
    };
    let repo = hf_home.join("hub").join(format!("models--{org}--{name}"));
    let snapshots = repo.join("snapshots");

    if let Some(revision) = main_revision(&repo) {
        let snapshot = snapshots.join(revision);
        if snapshot.is_dir() {
            return Ok(snapshot);
        }
    }
    let entries = fs::read_dir(&snapshots).into_iter().flatten().flatten();
    let mut found: Vec<PathBuf> = entries
        .map(|entry| entry.path())
        .filter(|path| path.is_dir())
        .collect();
    match (found.pop(), found.len()) {
        (Some(snapshot), 0) => Ok(snapshot),
        (Some(_), n_others) => Err(format!(
            "and `{}` has {} snapshots without a `refs/main` that names one; give the path of one",
            snapshots.display(),
            n_others + 1
        )),
        (None, _) => Err(format!(
            "and no snapshot in the Hugging Face cache `{}`; download it first, for example with `hf download {org}/{name}`",
            repo.display()
        )),
    }
}

/// The parts of `org/name`, if both could be those of a published model.
fn split_name(model: &str) -> Option<(&str, &str)> {
    let (org, name) = model.split_once('/')?;
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let is_part =
        |part: &str| !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed);
    (is_part(org) && is_part(name)).then_some((org, name))
}

/// The revision that the branch `main` was at when the model was downloaded.
fn main_revision(repo: &Path) -> Option<String> {
    // A revision is a hash of 40 digits.
    const MAX_REF_BYTES: u64 = 256;

    let path = repo.join("refs/main");
    if !path.is_file() {
        return None;
    }
    let mut text = String::new();
    File::open(path)
        .ok()?
        .take(MAX_REF_BYTES)
        .read_to_string(&mut text)
        .ok()?;
    let revision = text.trim();
    is_plain_file_name(revision).then(|| revision.to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cache with one model, these snapshots, and a `refs/main`.
    fn cache(snapshots: &[&str], main: Option<&str>) -> (tempfile::TempDir, PathBuf) {
        let home = tempfile::tempdir().unwrap();
        let repo = home.path().join("hub/models--org--name");
        for snapshot in snapshots {
            fs::create_dir_all(repo.join("snapshots").join(snapshot)).unwrap();
        }
        if let Some(main) = main {
            fs::create_dir_all(repo.join("refs")).unwrap();
            fs::write(repo.join("refs/main"), main).unwrap();
        }
        (home, repo.join("snapshots"))
    }

    #[test]
    fn the_snapshot_of_main_or_the_only_one_is_found() {
        let check = |snapshots: &[&str], main: Option<&str>, expected: &str| {
            let (home, folder) = cache(snapshots, main);
            let found = resolve("org/name", Some(home.path())).unwrap();
            assert_eq!(found, folder.join(expected));
        };
        check(&["a"], None, "a");
        check(&["a", "b"], Some("b\n"), "b");
        check(&["a"], Some("gone"), "a");
        check(&["a"], Some("../../../.."), "a");
    }

    #[test]
    fn a_model_that_is_nowhere_gives_both_places_and_a_cure() {
        let check = |model: &str, snapshots: &[&str], expected: &str| {
            let (home, _) = cache(snapshots, None);
            let error = resolve(model, Some(home.path())).unwrap_err().to_string();
            assert!(
                error.starts_with(&format!("model `{model}`: no such file or folder, ")),
                "{error}"
            );
            assert!(error.contains(expected), "{error}");
        };
        check(
            "org/name",
            &["a", "b"],
            "has 2 snapshots without a `refs/main`",
        );
        check(
            "org/name",
            &[],
            "models--org--name`; download it first, for example with `hf download org/name`",
        );
        check(
            "org/other",
            &["a"],
            "models--org--other`; download it first",
        );
        for no_name in [
            "name",
            "a/b/c",
            "../x",
            "org/..",
            "/absent",
            "org/",
            "o rg/name",
        ] {
            check(no_name, &["a"], "not an `org/name`");
        }
        let error = resolve("org/name", None).unwrap_err().to_string();
        assert!(error.ends_with("set `HF_HOME`"), "{error}");
    }

    #[test]
    fn what_lies_in_a_snapshot_is_published_and_nothing_else() {
        let (home, snapshots) = cache(&["0a1b"], None);
        let file = snapshots.join("0a1b/model.gguf");
        fs::write(home.path().join("blob"), b"").unwrap();
        #[cfg(unix)]
        std::os::unix::fs::symlink(home.path().join("blob"), &file).unwrap();
        #[cfg(not(unix))]
        fs::write(&file, b"").unwrap();
        let expected = Published {
            repo: "org/name".into(),
            revision: "0a1b".into(),
        };
        for path in [&snapshots.join("0a1b"), &file] {
            assert_eq!(
                published(path),
                Some(expected.clone()),
                "{}",
                path.display()
            );
        }
        let other = home.path().join("hub/models--a b--c/snapshots/1");
        fs::create_dir_all(&other).unwrap();
        for path in [home.path(), &snapshots, &other, Path::new("absent/x")] {
            assert_eq!(published(path), None, "{}", path.display());
        }
    }

    #[test]
    fn a_path_stays_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        assert_eq!(resolve(path, None).unwrap(), folder.path());
    }
}
