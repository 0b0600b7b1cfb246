//! Finds a model by a path, or by its name in the local Hugging Face cache. Nothing is ever downloaded.
//!
//! A name is `org/name`, with `@revision` after it for another one than `main`, and `:file` for one of several GGUF files: its
//! path in the repository, or its quantization.
//!
//! Source: huggingface/huggingface_hub: src/huggingface_hub/file_download.py (the layout of the
//! cache).

use std::fs::{self, File};
use std::io::Read;
use std::path::{Path, PathBuf};

use crate::error::shown;
use crate::file::is_present;
use crate::folder::{is_plain_file_name, listed};
use crate::{Error, Result};

/// The folder or file of a model.
///
/// `model` is a path; if there is nothing, it is a name in the cache `hub`. Without a revision that is the snapshot of
/// `refs/main`, or else the only one. The model in a snapshot without weights of its own is its GGUF file.
///
/// # Errors
/// If there is no model at either place; the message names both. If the path is a link to nothing.
pub fn resolve(model: &str, hub: Option<&Path>) -> Result<PathBuf> {
    let path = PathBuf::from(model);
    if is_present(&path)? {
        return Ok(path);
    }
    look_up(model, hub).map_err(|cache| Error::ModelNotFound {
        model: shown(model),
        cache,
    })
}

/// A name in the cache.
#[derive(Clone, Copy)]
struct CacheName<'a> {
    org: &'a str,
    name: &'a str,
    revision: Option<&'a str>,
    file: Option<&'a str>,
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
    repo_and_revision(&repo).filter(|found| found.0 == repo)?;
    let revision = at[2].to_owned();
    Some(Published { repo, revision })
}

/// The `org/name` and the revision in a name, if it could be that of a published model.
pub fn repo_and_revision(name: &str) -> Option<(String, Option<&str>)> {
    let found = split_name(name)?;
    Some((format!("{}/{}", found.org, found.name), found.revision))
}

/// Looks into the cache; an error is the end of the sentence "no such file or folder, …".
fn look_up(model: &str, hub: Option<&Path>) -> Result<PathBuf, String> {
    let Some(found) = split_name(model) else {
        return Err("and not an `org/name` in the Hugging Face cache".to_owned());
    };
    let Some(hub) = hub else {
        return Err("and no Hugging Face cache to look it up in; set `HF_HOME`".to_owned());
    };
    let repo = hub.join(format!("models--{}--{}", found.org, found.name));
    let snapshot = snapshot(&repo, found)?;
    match (found.file, ggufs(&snapshot)) {
        (Some(file), ggufs) => gguf(&snapshot, file, ggufs),
        (None, ggufs) if ggufs.is_empty() || has_weights(&snapshot) => Ok(snapshot),
        (None, ggufs) => match ggufs.as_slice() {
            [only] => Ok(snapshot.join(only)),
            several => Err(format!(
                "and `{}` in the Hugging Face cache has several GGUF files: {}; name one, as in `{model}:{}`",
                repo.display(),
                listed(several.to_vec()),
                several.first().map_or("", String::as_str)
            )),
        },
    }
}

/// The folder of a revision.
fn snapshot(repo: &Path, found: CacheName<'_>) -> Result<PathBuf, String> {
    let CacheName { org, name, .. } = found;
    let snapshots = repo.join("snapshots");
    let revision = found.revision.unwrap_or("main");
    for commit in commit(repo, revision)
        .iter()
        .map(String::as_str)
        .chain([revision])
    {
        let snapshot = snapshots.join(commit);
        if is_plain_file_name(commit) && snapshot.is_dir() {
            return Ok(snapshot);
        }
    }
    if let Some(revision) = found.revision {
        return Err(format!(
            "and no revision `{revision}` in the Hugging Face cache `{}`; download it first, for example with `hf download {org}/{name} --revision {revision}`",
            repo.display()
        ));
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

/// The GGUF file that a name says: its path in the snapshot, or a part of its name, such as `Q4_K_M`.
fn gguf(snapshot: &Path, file: &str, ggufs: Vec<String>) -> Result<PathBuf, String> {
    if ggufs.iter().any(|name| name == file) {
        return Ok(snapshot.join(file));
    }
    let has_tag = |name: &&String| {
        let stem = name.to_ascii_lowercase();
        let mut tags = stem.trim_end_matches(".gguf").split(['-', '.', '/']);
        tags.any(|tag| tag == file.to_ascii_lowercase())
    };
    let fitting: Vec<String> = ggufs.iter().filter(has_tag).cloned().collect();
    let place = snapshot.display();
    match (fitting.as_slice(), ggufs.is_empty()) {
        ([only], _) => Ok(snapshot.join(only)),
        ([], true) => Err(format!(
            "and `{place}` in the Hugging Face cache has no GGUF file"
        )),
        ([], false) => Err(format!(
            "and none of the GGUF files in `{place}` in the Hugging Face cache is `{}`: {}",
            shown(file),
            listed(ggufs)
        )),
        (several, _) => Err(format!(
            "and several GGUF files in `{place}` in the Hugging Face cache are `{}`: {}; give the name of one",
            shown(file),
            listed(several.to_vec())
        )),
    }
}

/// The GGUF models in a snapshot and in the folders of it: paths in the snapshot, sorted. Of a split model, the first part.
fn ggufs(snapshot: &Path) -> Vec<String> {
    /// Repositories have a few dozen at most.
    const MOST_FILES: usize = 10_000;

    let names = |folder: &Path| {
        let entries = fs::read_dir(folder).into_iter().flatten().flatten();
        let names = entries.filter_map(|entry| entry.file_name().into_string().ok());
        names.take(MOST_FILES).collect::<Vec<_>>()
    };
    let mut found = Vec::new();
    for name in names(snapshot) {
        if snapshot.join(&name).is_dir() {
            let inside = names(&snapshot.join(&name)).into_iter();
            found.extend(inside.map(|file| format!("{name}/{file}")));
        } else {
            found.push(name);
        }
    }
    let is_model = |path: &String| {
        let name = path.rsplit('/').next().unwrap_or(path).to_ascii_lowercase();
        // The eyes of a model, and the other parts of a split one.
        name.ends_with(".gguf")
            && !name.starts_with("mmproj")
            && (!name.contains("-of-") || name.contains("-00001-of-"))
    };
    found.retain(is_model);
    found.sort_unstable();
    found.truncate(MOST_FILES);
    found
}

/// Whether a snapshot is a model without its GGUF files.
fn has_weights(snapshot: &Path) -> bool {
    let entries = fs::read_dir(snapshot).into_iter().flatten().flatten();
    let mut names = entries.filter_map(|entry| entry.file_name().into_string().ok());
    names.any(|name| name.ends_with(".safetensors") || name.ends_with(".safetensors.index.json"))
}

/// The parts of a name, if they could be those of a published model.
fn split_name(model: &str) -> Option<CacheName<'_>> {
    let (repo, file) = match model.split_once(':') {
        Some((repo, file)) => (repo, Some(file)),
        None => (model, None),
    };
    let (repo, revision) = match repo.split_once('@') {
        Some((repo, revision)) => (repo, Some(revision)),
        None => (repo, None),
    };
    let (org, name) = repo.split_once('/')?;
    let allowed = |c: char| c.is_ascii_alphanumeric() || matches!(c, '-' | '_' | '.');
    let is_part =
        |part: &str| !part.is_empty() && !part.starts_with('.') && part.chars().all(allowed);
    let is_path = |path: &str| path.split('/').all(is_part);
    let fits = is_part(org)
        && is_part(name)
        && revision.is_none_or(is_path)
        && file.is_none_or(|file| !file.is_empty());
    fits.then_some(CacheName {
        org,
        name,
        revision,
        file,
    })
}

/// The commit that a branch or tag was at when the model was downloaded.
fn commit(repo: &Path, revision: &str) -> Option<String> {
    // A commit is a hash of 40 digits.
    const MAX_REF_BYTES: u64 = 256;

    let path = repo.join("refs").join(revision);
    if !path.is_file() {
        return None;
    }
    let mut text = String::new();
    File::open(path)
        .ok()?
        .take(MAX_REF_BYTES)
        .read_to_string(&mut text)
        .ok()?;
    Some(text.trim().to_owned())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A cache with one model, these snapshots, and a `refs/main`.
    fn cache(snapshots: &[&str], main: Option<&str>) -> (tempfile::TempDir, PathBuf) {
        let home = tempfile::tempdir().unwrap();
        let repo = home.path().join("models--org--name");
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
        let others = ["models--a b--c/snapshots/1", "models--a--b@c/snapshots/1"];
        let [other, revised] = others.map(|name| home.path().join("hub").join(name));
        for path in [&other, &revised] {
            fs::create_dir_all(path).unwrap();
        }
        let absent = Path::new("absent/x");
        for path in [home.path(), &snapshots, &other, &revised, absent] {
            assert_eq!(published(path), None, "{}", path.display());
        }
    }

    #[test]
    fn a_name_has_a_repository_and_perhaps_a_revision() {
        for (name, expected) in [
            ("org/name", Some(None)),
            ("org/name:F16/m.gguf", Some(None)),
            ("org/name@refs/pr/1", Some(Some("refs/pr/1"))),
            ("org/name@v1:Q8_0", Some(Some("v1"))),
            ("name", None),
            ("/org/name", None),
            ("./name", None),
            ("a/b/c", None),
        ] {
            let expected = expected.map(|revision| ("org/name".to_owned(), revision));
            assert_eq!(repo_and_revision(name), expected, "{name}");
        }
    }

    #[test]
    fn a_path_stays_as_it_is() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().to_str().unwrap();
        assert_eq!(resolve(path, None).unwrap(), folder.path());
    }

    #[test]
    fn another_revision_is_found_by_its_name_or_commit() {
        let (hub, folder) = cache(&["a", "b"], Some("a"));
        let refs = hub.path().join("models--org--name/refs/refs/pr");
        fs::create_dir_all(&refs).unwrap();
        fs::write(refs.join("1"), "b").unwrap();
        let found = |name: &str| resolve(name, Some(hub.path()));
        assert_eq!(found("org/name").unwrap(), folder.join("a"));
        assert_eq!(found("org/name@b").unwrap(), folder.join("b"));
        assert_eq!(found("org/name@refs/pr/1").unwrap(), folder.join("b"));
        let problem = found("org/name@v2").unwrap_err().to_string();
        assert!(
            problem.ends_with("with `hf download org/name --revision v2`"),
            "{problem}"
        );
        assert!(found("org/name@../../x").is_err());
    }

    #[test]
    fn the_gguf_of_a_repository_is_found_or_chosen() {
        let check = |files: &[&str], name: &str, expected: Result<&str, &str>| {
            let (hub, folder) = cache(&["a"], Some("a"));
            let snapshot = folder.join("a");
            for file in files {
                let path = snapshot.join(file);
                fs::create_dir_all(path.parent().unwrap()).unwrap();
                fs::write(path, b"").unwrap();
            }
            match (resolve(name, Some(hub.path())), expected) {
                (Ok(found), Ok(expected)) => assert_eq!(found, snapshot.join(expected)),
                (Err(problem), Err(expected)) => {
                    let problem = problem.to_string();
                    assert!(problem.contains(expected), "{problem}");
                }
                (found, _) => panic!("{name}: {found:?}"),
            }
        };
        let one = ["config.json", "m-Q8_0.gguf", "mmproj-m.gguf"];
        check(&one, "org/name", Ok("m-Q8_0.gguf"));
        check(&one, "org/name:m-Q8_0.gguf", Ok("m-Q8_0.gguf"));
        check(&one, "org/name:q8_0", Ok("m-Q8_0.gguf"));
        check(&one, "org/name:Q4_0", Err("is `Q4_0`: `m-Q8_0.gguf`"));
        check(&one, "org/name:../x", Err("is `../x`: `m-Q8_0.gguf`"));
        check(&["model.safetensors", "m.gguf"], "org/name", Ok(""));
        check(&["config.json"], "org/name", Ok(""));
        check(&["config.json"], "org/name:Q4_0", Err("has no GGUF file"));
        let several = [
            "m-Q4_K_M.gguf",
            "m-Q4_K_S.gguf",
            "F16/m-F16-00001-of-00002.gguf",
            "F16/m-F16-00002-of-00002.gguf",
        ];
        check(
            &several,
            "org/name",
            Err(
                "`F16/m-F16-00001-of-00002.gguf`, `m-Q4_K_M.gguf`, `m-Q4_K_S.gguf`; name one, as in `org/name:F16/",
            ),
        );
        check(&several, "org/name:Q4_K_M", Ok("m-Q4_K_M.gguf"));
        check(
            &several,
            "org/name:F16",
            Ok("F16/m-F16-00001-of-00002.gguf"),
        );
        check(
            &["a-Q8_0.gguf", "b-Q8_0.gguf"],
            "org/name:Q8_0",
            Err("several GGUF files"),
        );
    }

    #[cfg(unix)]
    #[test]
    fn a_path_that_is_a_link_to_nothing_is_called_that() {
        let folder = tempfile::tempdir().unwrap();
        let link = folder.path().join("model");
        std::os::unix::fs::symlink("gone", &link).unwrap();
        let problem = resolve(link.to_str().unwrap(), None)
            .unwrap_err()
            .to_string();
        assert!(
            problem.ends_with("is a link to `gone`, which does not exist"),
            "{problem}"
        );
    }
}
