//! Patterns of file names: `*`, `?`, `[…]` within a name, and `**` over folders.

use std::path::{Path, PathBuf};

use regex::Regex;

use crate::data_folder::entries;
use crate::{Error, Result};

/// Folders in one another, and files, that a pattern is compared with.
const MOST_DEPTH: usize = 8;
const COMPARED_FILES: usize = 100_000;

/// A pattern of paths.
#[derive(Clone, Debug)]
pub(super) struct Glob {
    /// Without a pattern: the path itself, or the folder that all matches are in.
    fixed: PathBuf,
    /// What the rest of a path is like.
    pattern: Option<Regex>,
}

impl Glob {
    /// # Errors
    /// If it leads out of a folder, or its brackets are no pattern.
    pub(super) fn new(text: &str) -> Result<Self> {
        let text = text.strip_prefix("./").unwrap_or(text);
        let Some(first) = text.find(['*', '?', '[']) else {
            return Ok(Self {
                fixed: text.into(),
                pattern: None,
            });
        };
        let at = text[..first].rfind('/').map_or(0, |at| at + 1);
        let mut pattern = String::from("^");
        let mut rest = text[at..].chars().peekable();
        while let Some(c) = rest.next() {
            match c {
                '*' if rest.next_if_eq(&'*').is_some() => {
                    let is_folder = rest.next_if_eq(&'/').is_some();
                    pattern.push_str(if is_folder { "(?:.*/)?" } else { ".*" });
                }
                '*' => pattern.push_str("[^/]*"),
                '?' => pattern.push_str("[^/]"),
                '[' if rest.next_if_eq(&'!').is_some() => pattern.push_str("[^"),
                // Inside of brackets a range is one.
                '[' | ']' | '-' => pattern.push(c),
                _ => pattern.push_str(&regex::escape(&c.to_string())),
            }
        }
        pattern.push('$');
        let pattern = Regex::new(&pattern)
            .map_err(|_| Error::schema("a pattern of file names", format!("`{text}`")))?;
        Ok(Self {
            fixed: text[..at].into(),
            pattern: Some(pattern),
        })
    }

    /// The files that match in a folder, sorted; none if there is none.
    ///
    /// # Errors
    /// If a folder cannot be read, or there are too many files.
    pub(super) fn files(&self, folder: &Path) -> Result<Option<Vec<PathBuf>>> {
        let place = folder.join(&self.fixed);
        let Some(pattern) = &self.pattern else {
            return Ok(place.is_file().then(|| vec![place]));
        };
        let mut files = Vec::new();
        let place = if place.as_os_str().is_empty() {
            Path::new(".").into()
        } else {
            place
        };
        if place.is_dir() {
            walk(&place, MOST_DEPTH, &mut files)?;
        }
        files.retain(|file: &PathBuf| {
            let rest = file.strip_prefix(&place).unwrap_or(file);
            pattern.is_match(&rest.to_string_lossy())
        });
        Ok((!files.is_empty()).then_some(files))
    }
}

fn walk(folder: &Path, depth: usize, files: &mut Vec<PathBuf>) -> Result<()> {
    for path in entries(folder)? {
        if path.is_dir() && depth > 0 {
            walk(&path, depth - 1, files)?;
        } else if path.is_file() {
            files.push(path);
        }
        if files.len() > COMPARED_FILES {
            let expected = format!("at most {COMPARED_FILES} files");
            return Err(Error::schema(
                expected,
                format!("more in `{}`", folder.display()),
            ));
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn patterns_match_as_file_systems_do() {
        let place = tempfile::tempdir().unwrap();
        for file in [
            "a.jsonl",
            "b.jsonl",
            "x/a.jsonl",
            "x/y/a1.jsonl",
            "x/y/a2.json",
        ] {
            let path = place.path().join(file);
            std::fs::create_dir_all(path.parent().unwrap()).unwrap();
            std::fs::write(path, "").unwrap();
        }
        for (pattern, expected) in [
            ("a.jsonl", &["a.jsonl"][..]),
            ("./a.jsonl", &["a.jsonl"]),
            ("*.jsonl", &["a.jsonl", "b.jsonl"]),
            ("**/a*.jsonl", &["a.jsonl", "x/a.jsonl", "x/y/a1.jsonl"]),
            ("x/**", &["x/a.jsonl", "x/y/a1.jsonl", "x/y/a2.json"]),
            ("x/*/a[0-9].json?", &["x/y/a1.jsonl"]),
            ("[!a].jsonl", &["b.jsonl"]),
            ("x/*.jsonl", &["x/a.jsonl"]),
        ] {
            let found = Glob::new(pattern).unwrap().files(place.path()).unwrap();
            let name = |path: PathBuf| {
                path.strip_prefix(place.path())
                    .unwrap()
                    .display()
                    .to_string()
            };
            let found: Vec<_> = found.unwrap().into_iter().map(name).collect();
            assert_eq!(found, expected, "{pattern}");
        }
        for none in ["c.jsonl", "c*", "x"] {
            assert!(
                Glob::new(none)
                    .unwrap()
                    .files(place.path())
                    .unwrap()
                    .is_none(),
                "{none}"
            );
        }
        assert!(Glob::new("a[").is_err());
    }
}
