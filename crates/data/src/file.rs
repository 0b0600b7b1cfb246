//! Bounded reading: whole files, lines, and the JSON in them.
//!
//! Files are untrusted: sizes are bounded before memory is allocated, and text must be UTF-8.

use crate::error::{Error, Place, Result};
use crate::jinja::keep_exact;
use serde_json::Value;
use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead, BufReader, ErrorKind, Read, Seek, SeekFrom};
use std::path::{Path, PathBuf};

/// Maximum length of a row as JSON. A row is one document; the longest known are books.
pub(crate) const MAX_ROW_BYTES: u64 = 16 << 20;

/// Opens a file of data or of a tokenizer.
///
/// # Errors
/// If it cannot be opened, or is what git-lfs puts in place of a large file.
pub(crate) fn open(path: &Path) -> Result<File> {
    const POINTER: &[u8] = b"version https://git-lfs.github.com/spec/";

    let read = |problem| Error::Read {
        path: path.to_path_buf(),
        problem,
    };
    let mut file = File::open(path).map_err(|problem| match broken_link(path, &problem) {
        Some([link, target]) => Error::BrokenLink {
            path: path.to_path_buf(),
            link,
            target,
        },
        None => read(problem),
    })?;
    let mut start = Vec::new();
    file.by_ref()
        .take(POINTER.len() as u64)
        .read_to_end(&mut start)
        .map_err(read)?;
    if start == POINTER {
        return Err(Error::LfsPointer {
            path: path.to_path_buf(),
        });
    }
    file.rewind().map_err(read)?;
    Ok(file)
}

/// [`open`] for a file that may be absent.
///
/// # Errors
/// As there; a link to nothing is not absent.
pub(crate) fn open_optional(path: &Path) -> Result<Option<File>> {
    match open(path) {
        Ok(file) => Ok(Some(file)),
        Err(Error::Read { problem, .. }) if problem.kind() == ErrorKind::NotFound => Ok(None),
        Err(problem) => Err(problem),
    }
}

/// The link that leads to nothing, and where it leads, if that is why nothing was found at a path.
// This is in `checkpoint` too: neither crate knows the other.
fn broken_link(path: &Path, problem: &std::io::Error) -> Option<[PathBuf; 2]> {
    if problem.kind() != ErrorKind::NotFound {
        return None;
    }
    // The first part of the path that is there.
    let link = path
        .ancestors()
        .find(|path| path.symlink_metadata().is_ok())?;
    let target = link.read_link().ok()?;
    (!link.exists()).then(|| [link.to_owned(), target])
}

/// The next byte of a file; none at its end.
pub(crate) fn next_byte(reader: &mut impl Read, path: &Path) -> Result<Option<u8>> {
    let mut byte = [0];
    match reader.read(&mut byte) {
        Ok(0) => Ok(None),
        Ok(_) => Ok(Some(byte[0])),
        Err(problem) => Err(Error::Read {
            path: path.to_path_buf(),
            problem,
        }),
    }
}

/// Unpacked bytes for each byte of a packed file or page. Text is packed to a tenth, rarely to a hundredth.
pub(crate) const UNPACKED_PER_BYTE: u64 = 200;

/// A column of a table whose type has no form in a row, and a word for the type.
#[derive(Clone, Debug, PartialEq, Eq)]
pub(crate) struct UnreadColumn {
    pub(crate) name: String,
    pub(crate) found: String,
}

/// Reads a text file of at most `limit_bytes`; `None` if there is no such file.
pub(crate) fn read_text(path: &Path, limit_bytes: u64) -> Result<Option<String>> {
    let read = |problem| Error::Read {
        path: path.to_path_buf(),
        problem,
    };
    let Some(file) = open_optional(path)? else {
        return Ok(None);
    };
    let mut bytes = Vec::new();
    file.take(limit_bytes + 1)
        .read_to_end(&mut bytes)
        .map_err(read)?;
    if bytes.len() as u64 > limit_bytes {
        return Err(Error::TooLarge {
            path: path.to_path_buf(),
            limit_bytes,
        });
    }
    let text = String::from_utf8(bytes)
        .map_err(|_| Error::malformed(path, "expected UTF-8 text, found other bytes"))?;
    Ok(Some(text))
}

/// [`read_text`] for a file that must exist.
pub(crate) fn require_text(path: &Path, limit_bytes: u64) -> Result<String> {
    read_text(path, limit_bytes)?.ok_or_else(|| Error::Read {
        path: path.to_path_buf(),
        problem: ErrorKind::NotFound.into(),
    })
}

/// A row as JSON text: a line of a JSON-lines file that is not blank, or what a row of another table becomes.
#[derive(Debug)]
pub(crate) struct RowText {
    pub(crate) place: Place,
    /// The offset of its beginning in a file of lines; 0 in others.
    pub(crate) offset: u64,
    /// How many bytes of the file are read.
    pub(crate) end: u64,
    /// Without white space around it.
    pub(crate) text: String,
}

/// The lines of JSON-lines text. Blank lines are skipped, and so is a byte-order mark.
#[derive(Debug)]
pub(crate) struct JsonLines<R> {
    path: PathBuf,
    reader: R,
    number: usize,
    offset: u64,
}

impl<R: BufRead> JsonLines<R> {
    pub(crate) fn new(path: &Path, reader: R) -> Self {
        Self {
            path: path.to_path_buf(),
            reader,
            number: 0,
            offset: 0,
        }
    }

    pub(crate) fn read(&mut self) -> Result<Option<RowText>> {
        loop {
            let (place, offset) = (Place::Line(self.number + 1), self.offset);
            let bytes = bounded_line(&mut self.reader, &self.path, Some(place))?;
            if bytes.is_empty() {
                return Ok(None);
            }
            self.number += 1;
            self.offset += bytes.len() as u64;
            let text =
                text_of(bytes, offset).map_err(|problem: Error| problem.at(&self.path, place))?;
            if !text.is_empty() {
                return Ok(Some(RowText {
                    place,
                    offset,
                    end: self.offset,
                    text,
                }));
            }
        }
    }
}

/// The line that begins at an offset of a file, without white space around it.
pub(crate) fn line_at(file: &mut File, path: &Path, offset: u64) -> Result<String> {
    file.seek(SeekFrom::Start(offset))
        .map_err(|problem| Error::Read {
            path: path.to_path_buf(),
            problem,
        })?;
    text_of(bounded_line(&mut BufReader::new(file), path, None)?, offset)
}

/// The bytes through the next line end; none at the end of the file.
fn bounded_line(reader: &mut impl BufRead, path: &Path, place: Option<Place>) -> Result<Vec<u8>> {
    let mut bytes = Vec::new();
    let mut bounded = reader.take(MAX_ROW_BYTES + 1);
    bounded
        .read_until(b'\n', &mut bytes)
        .map_err(|problem| Error::Read {
            path: path.to_path_buf(),
            problem,
        })?;
    if bytes.len() as u64 > MAX_ROW_BYTES {
        let expected = format!("a line of at most {MAX_ROW_BYTES} bytes");
        let problem = Error::schema(expected, "a longer one");
        return Err(match place {
            Some(place) => problem.at(path, place),
            None => problem,
        });
    }
    Ok(bytes)
}

fn text_of(bytes: Vec<u8>, offset: u64) -> Result<String> {
    let text = String::from_utf8(bytes).map_err(|_| Error::schema("UTF-8 text", "other bytes"))?;
    let text = match offset {
        0 => text.trim_start_matches('\u{feff}'),
        _ => &text,
    };
    Ok(text.trim().to_owned())
}

/// Parses one line, without serde_json's own "line 1": the caller knows the real number. Long numbers keep their digits.
pub(crate) fn parse_line(line: &str) -> Result<Value> {
    let parsed = match keep_exact(line) {
        Cow::Borrowed(_) => serde_json::from_str(line),
        // A problem has its column in the line as it is.
        Cow::Owned(kept) => serde_json::from_str(&kept).or_else(|_| serde_json::from_str(line)),
    };
    parsed.map_err(|problem| {
        let place = format!(" at line {} column {}", problem.line(), problem.column());
        let text = problem.to_string();
        let text = text.strip_suffix(&place).unwrap_or(&text);
        Error::schema(
            "a JSON object",
            format!("malformed JSON at column {}: {text}", problem.column()),
        )
    })
}

/// The kind of a value, for the "found" half of a message.
pub(crate) fn describe(value: &Value) -> String {
    match value {
        Value::Null => "null".to_owned(),
        Value::Bool(_) => "a boolean".to_owned(),
        Value::Number(number) => number.to_string(),
        Value::String(_) => "a string".to_owned(),
        Value::Array(_) => "a list".to_owned(),
        Value::Object(_) => "an object".to_owned(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn lines(bytes: &[u8]) -> Result<Vec<(Place, String)>, String> {
        let mut lines = JsonLines::new(Path::new("FILE"), bytes);
        let line = |line: Result<RowText>| line.map(|line| (line.place, line.text));
        let found: Result<_> = std::iter::from_fn(|| lines.read().transpose())
            .map(line)
            .collect();
        found.map_err(|error| error.to_string())
    }

    #[test]
    fn line_numbers_survive_blank_lines_and_windows_endings() {
        let found = lines(b"\xEF\xBB\xBFa\r\n\r\n  \n b\nc").unwrap();
        let expected =
            [(1, "a"), (4, "b"), (5, "c")].map(|(n, text)| (Place::Line(n), text.to_owned()));
        assert_eq!(found, expected);
    }

    #[test]
    fn a_line_is_found_again_by_its_offset() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "\u{feff}é\r\n\n  bc \nlast").unwrap();
        let path = file.path().to_path_buf();
        let mut lines = JsonLines::new(&path, BufReader::new(File::open(&path).unwrap()));
        while let Some(line) = lines.read().unwrap() {
            assert_eq!(
                line_at(file.as_file_mut(), &path, line.offset).unwrap(),
                line.text
            );
        }
    }

    #[test]
    fn broken_bytes_name_their_line() {
        let found = lines(b"{}\n\xFF\xFE\n").unwrap_err();
        assert_eq!(found, "FILE:2: expected UTF-8 text, found other bytes");
    }

    #[test]
    fn an_endless_line_is_refused_before_it_fills_memory() {
        let found = lines(&vec![b'x'; MAX_ROW_BYTES as usize + 1]).unwrap_err();
        assert_eq!(
            found,
            "FILE:1: expected a line of at most 16777216 bytes, found a longer one"
        );
    }

    #[test]
    fn json_errors_name_the_column() {
        let found = parse_line("{\"text\": }").unwrap_err().to_string();
        assert_eq!(
            found,
            "expected a JSON object, found malformed JSON at column 10: expected value"
        );
    }

    #[test]
    fn a_file_over_its_limit_is_refused() {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "12345").unwrap();
        assert_eq!(require_text(file.path(), 5).unwrap(), "12345");
        assert!(matches!(
            require_text(file.path(), 4),
            Err(Error::TooLarge { limit_bytes: 4, .. })
        ));
    }

    #[cfg(unix)]
    #[test]
    fn a_link_to_nothing_is_not_an_absent_file() {
        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        std::os::unix::fs::symlink("gone", at("broken")).unwrap();
        assert_eq!(read_text(&at("none"), 9).unwrap(), None);
        for name in ["broken", "broken/inside"] {
            let problem = read_text(&at(name), 9).unwrap_err().to_string();
            assert!(
                problem.ends_with("broken` is a link to `gone`, which does not exist"),
                "{problem}"
            );
        }
    }

    #[test]
    fn a_pointer_of_git_lfs_is_called_that() {
        let file = tempfile::NamedTempFile::new().unwrap();
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n";
        std::fs::write(file.path(), pointer).unwrap();
        for problem in [
            read_text(file.path(), 1 << 10).map(drop).unwrap_err(),
            open(file.path()).map(drop).unwrap_err(),
        ] {
            assert!(
                problem.to_string().contains(": this is a git-lfs pointer"),
                "{problem}"
            );
        }
    }
}
