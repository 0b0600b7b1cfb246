//! Bounded reading: whole files, lines, and the JSON in them.
//!
//! Files are untrusted: sizes are bounded before memory is allocated, and text must be UTF-8.

use crate::error::{Error, Result};
use crate::jinja::keep_exact;
use serde_json::Value;
use std::borrow::Cow;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Seek, SeekFrom};
use std::path::Path;

/// Maximum length of a line of a JSON-lines file. A row is one document; the longest known are books.
const MAX_ROW_BYTES: u64 = 16 << 20;

/// Reads a text file of at most `limit_bytes`; `None` if there is no such file.
pub(crate) fn read_text(path: &Path, limit_bytes: u64) -> Result<Option<String>> {
    let read = |problem| Error::Read {
        path: path.to_path_buf(),
        problem,
    };
    let file = match File::open(path) {
        Ok(file) => file,
        Err(problem) if problem.kind() == std::io::ErrorKind::NotFound => return Ok(None),
        Err(problem) => return Err(read(problem)),
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
        problem: std::io::ErrorKind::NotFound.into(),
    })
}

/// A line of a JSON-lines file that is not blank.
#[derive(Debug)]
pub(crate) struct JsonLine {
    /// Counted from 1.
    pub(crate) number: usize,
    /// The offset of its beginning.
    pub(crate) offset: u64,
    /// The offset of the next line.
    pub(crate) end: u64,
    /// Without white space around it.
    pub(crate) text: String,
}

/// The lines of a JSON-lines file. Blank lines are skipped, and so is a byte-order mark.
pub(crate) struct JsonLines<'a> {
    path: &'a Path,
    reader: BufReader<File>,
    number: usize,
    offset: u64,
}

impl<'a> JsonLines<'a> {
    pub(crate) fn open(path: &'a Path) -> Result<Self> {
        let file = File::open(path).map_err(|problem| Error::Read {
            path: path.to_path_buf(),
            problem,
        })?;
        Ok(Self {
            path,
            reader: BufReader::new(file),
            number: 0,
            offset: 0,
        })
    }

    fn read(&mut self) -> Result<Option<JsonLine>> {
        loop {
            let (number, offset) = (self.number + 1, self.offset);
            let bytes = bounded_line(&mut self.reader, self.path, Some(number))?;
            if bytes.is_empty() {
                return Ok(None);
            }
            self.number = number;
            self.offset += bytes.len() as u64;
            let text =
                text_of(bytes, offset).map_err(|problem: Error| problem.at(self.path, number))?;
            if !text.is_empty() {
                return Ok(Some(JsonLine {
                    number,
                    offset,
                    end: self.offset,
                    text,
                }));
            }
        }
    }
}

impl Iterator for JsonLines<'_> {
    type Item = Result<JsonLine>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
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
fn bounded_line(reader: &mut impl BufRead, path: &Path, number: Option<usize>) -> Result<Vec<u8>> {
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
        return Err(match number {
            Some(number) => problem.at(path, number),
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

    fn lines(bytes: &[u8]) -> Result<Vec<(usize, String)>, String> {
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), bytes).unwrap();
        let name = file.path().display().to_string();
        let lines = JsonLines::open(file.path()).unwrap();
        let line = |line: Result<JsonLine>| line.map(|line| (line.number, line.text));
        let found: Result<_> = lines.map(line).collect();
        found.map_err(|error| error.to_string().replace(&name, "FILE"))
    }

    #[test]
    fn line_numbers_survive_blank_lines_and_windows_endings() {
        let found = lines(b"\xEF\xBB\xBFa\r\n\r\n  \n b\nc").unwrap();
        let expected = [(1, "a"), (4, "b"), (5, "c")].map(|(n, text)| (n, text.to_owned()));
        assert_eq!(found, expected);
    }

    #[test]
    fn a_line_is_found_again_by_its_offset() {
        let mut file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "\u{feff}é\r\n\n  bc \nlast").unwrap();
        let path = file.path().to_path_buf();
        for line in JsonLines::open(&path).unwrap() {
            let line = line.unwrap();
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
}
