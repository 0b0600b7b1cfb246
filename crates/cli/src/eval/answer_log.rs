//! Answers of a model in a file, line by line as they come: what an interrupted evaluation has done is not done again.

use std::collections::HashMap;
use std::fs::{File, OpenOptions, TryLockError};
use std::io::{BufRead, BufReader, Error, Read, Write};
use std::path::{Path, PathBuf};

use ::eval::AnswerStore;
use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use serde_json::Value;

/// The longest line: the scores of a pass, or a text.
const MOST_LINE_BYTES: u64 = 64 << 20;

/// A file of answers, which no other program writes at the time.
pub(super) struct AnswerLog {
    path: PathBuf,
    file: File,
    known: HashMap<String, Value>,
}

/// A line after the first.
#[derive(Debug, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct AnswerLine {
    /// The key of the work.
    work: String,
    answers: Value,
}

/// Opens a file for reading and appending that no other program uses.
pub(super) fn lock_file(path: &Path, cure: &str) -> anyhow::Result<File> {
    let mut options = OpenOptions::new();
    let file = options.read(true).append(true).create(true).open(path);
    let file = file.with_context(|| format!("cannot open `{}`", path.display()))?;
    match file.try_lock() {
        Ok(()) => Ok(file),
        Err(TryLockError::WouldBlock) => bail!(
            "`{}`: expected a file that no other evaluation uses, found one in use; wait for it, or {cure}",
            path.display()
        ),
        Err(TryLockError::Error(problem)) => {
            Err(problem).with_context(|| format!("cannot lock `{}`", path.display()))
        }
    }
}

impl AnswerLog {
    /// The answers of a model. `identity` is all that they depend on but the work itself; it is the first line of the file, which is
    /// called after its hash.
    ///
    /// # Errors
    /// If the file is in use or has something else.
    pub(super) fn open(folder: &Path, identity: &Value) -> anyhow::Result<Self> {
        std::fs::create_dir_all(folder)
            .with_context(|| format!("cannot make `{}`", folder.display()))?;
        let identity = identity.to_string();
        let hash = checkpoint::sha256_of(identity.as_bytes());
        let path = folder.join(format!("{}.jsonl", &hash[..16]));
        let cure = "give another folder as --answers";
        let file = lock_file(&path, cure)?;
        let mut log = Self {
            path,
            file,
            known: HashMap::new(),
        };
        log.read(&identity)
            .with_context(|| format!("`{}`", log.path.display()))?;
        Ok(log)
    }

    /// Reads all lines, and cuts off one that was not written to its end.
    fn read(&mut self, identity: &str) -> anyhow::Result<()> {
        let mut reader = BufReader::new(&self.file);
        let (mut line, mut whole, mut number) = (Vec::new(), 0, 0);
        loop {
            line.clear();
            let n = reader
                .by_ref()
                .take(MOST_LINE_BYTES)
                .read_until(b'\n', &mut line)?;
            if line.last() != Some(&b'\n') {
                let is_end = (n as u64) < MOST_LINE_BYTES;
                if !is_end {
                    bail!(
                        "line {}: expected at most {MOST_LINE_BYTES} bytes",
                        number + 1
                    );
                }
                break;
            }
            (whole, number) = (whole + n as u64, number + 1);
            if number == 1 {
                if line.trim_ascii_end() != identity.as_bytes() {
                    bail!(
                        "expected answers of this model and program, found others; delete the file"
                    );
                }
                continue;
            }
            let read: AnswerLine = serde_json::from_slice(&line).with_context(|| {
                format!("line {number}: expected kept answers; delete the file")
            })?;
            self.known.insert(read.work, read.answers);
        }
        self.file.set_len(whole)?;
        if number == 0 {
            writeln!(self.file, "{identity}")?;
        }
        Ok(())
    }

    /// Pieces of work that are done.
    pub(super) fn n_known(&self) -> usize {
        self.known.len()
    }
}

impl AnswerStore for AnswerLog {
    fn known(&mut self, key: &str) -> Option<Value> {
        self.known.get(key).cloned()
    }

    fn keep(&mut self, key: &str, answers: &Value) -> std::io::Result<()> {
        let line = AnswerLine {
            work: key.to_owned(),
            answers: answers.clone(),
        };
        // A line in one piece.
        let text = format!("{}\n", serde_json::to_string(&line)?);
        let written = self.file.write_all(text.as_bytes());
        written.map_err(|problem| {
            Error::new(
                problem.kind(),
                format!("`{}`: {problem}", self.path.display()),
            )
        })?;
        self.known.insert(line.work, line.answers);
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    #[test]
    fn what_is_kept_is_known_later_but_for_a_torn_line() {
        let place = tempfile::tempdir().unwrap();
        let identity = json!({"model": "m"});
        let open = || AnswerLog::open(place.path(), &identity);
        let path = {
            let mut log = open().unwrap();
            log.keep("a", &json!(["1"])).unwrap();
            log.keep("b", &json!("text\n")).unwrap();
            let problem = open().err().unwrap().to_string();
            let cure = "found one in use; wait for it, or give another folder as --answers";
            assert!(problem.ends_with(cure), "{problem}");
            log.path.clone()
        };
        let mut whole = std::fs::read(&path).unwrap();
        whole.extend(b"{\"work\":\"c\",\"answ");
        std::fs::write(&path, &whole).unwrap();
        let mut log = open().unwrap();
        assert_eq!(log.n_known(), 2);
        assert_eq!(log.known("b"), Some(json!("text\n")));
        assert_eq!(log.known("c"), None);
        log.keep("c", &json!(3)).unwrap();
        drop(log);
        assert_eq!(open().unwrap().known("c"), Some(json!(3)));
        // Another model has another file.
        let other = AnswerLog::open(place.path(), &json!({"model": "n"})).unwrap();
        assert_eq!((other.n_known(), other.path == path), (0, false));
    }

    #[test]
    fn other_files_are_refused() {
        let place = tempfile::tempdir().unwrap();
        let identity = json!({"model": "m"});
        let path = AnswerLog::open(place.path(), &identity).unwrap().path;
        let problem = |text: &str| {
            std::fs::write(&path, text).unwrap();
            let problem = AnswerLog::open(place.path(), &identity).err().unwrap();
            format!("{problem:#}").replace(&path.display().to_string(), "FILE")
        };
        assert_eq!(
            problem("{}\n"),
            "`FILE`: expected answers of this model and program, found others; delete the file"
        );
        let wrong = problem("{\"model\":\"m\"}\n{\"work\":1}\n");
        let expected = "`FILE`: line 2: expected kept answers; delete the file: ";
        assert!(wrong.starts_with(expected), "{wrong}");
    }
}
