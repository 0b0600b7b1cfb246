//! The elements of a JSON list, one after another: `[{…}, …]`, or `{"data": [{…}, …]}`.

use crate::error::{Error, Place, Result};
use crate::file::{MAX_ROW_BYTES, RowText, next_byte};
use std::io::BufRead;
use std::path::{Path, PathBuf};

/// How a file with a list begins.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Beginning {
    /// Bytes up to the first element.
    bytes: usize,
    /// Whether the list is the value of `data` in an object.
    is_in_object: bool,
}

/// The beginning of a file with a list, if it has one.
pub(super) fn beginning(head: &[u8]) -> Option<Beginning> {
    let text = head.strip_prefix(b"\xEF\xBB\xBF").unwrap_or(head);
    let bytes_before = |rest: &[u8]| head.len() - rest.len();
    if let Some(rest) = after(text, b"[") {
        return Some(Beginning {
            bytes: bytes_before(rest),
            is_in_object: false,
        });
    }
    let rest = after(after(after(after(text, b"{")?, b"\"data\"")?, b":")?, b"[")?;
    // A row of a JSON-lines file may have such a key, but its list has no rows.
    after(rest, b"{")?;
    Some(Beginning {
        bytes: bytes_before(rest),
        is_in_object: true,
    })
}

/// The text after white space and a token.
fn after<'a>(text: &'a [u8], token: &[u8]) -> Option<&'a [u8]> {
    text.trim_ascii_start().strip_prefix(token)
}

/// A list, open at an element.
#[derive(Debug)]
pub(super) struct JsonList<R> {
    path: PathBuf,
    reader: R,
    is_in_object: bool,
    /// Number of elements read.
    number: usize,
    is_over: bool,
}

impl<R: BufRead> JsonList<R> {
    pub(super) fn new(path: &Path, mut reader: R, beginning: Beginning) -> Result<Self> {
        let mut skipped = vec![0; beginning.bytes];
        reader
            .read_exact(&mut skipped)
            .map_err(|problem| Error::Read {
                path: path.to_path_buf(),
                problem,
            })?;
        Ok(Self {
            path: path.to_path_buf(),
            reader,
            is_in_object: beginning.is_in_object,
            number: 0,
            is_over: false,
        })
    }

    pub(super) fn read(&mut self) -> Result<Option<RowText>> {
        if self.is_over {
            return Ok(None);
        }
        let (mut element, end) = self.element()?;
        let text = element.trim_ascii().len();
        match end {
            b',' if text == 0 => return Err(self.expected("an element before `,`", "none")),
            b']' if text == 0 && self.number > 0 => {
                return Err(self.expected("an element after `,`", "none"));
            }
            b']' => self.end()?,
            _ => {}
        }
        if text == 0 {
            return Ok(None);
        }
        self.number += 1;
        let place = Place::Row(self.number);
        element.truncate(element.trim_ascii_end().len());
        let text = String::from_utf8(element)
            .map_err(|_| Error::schema("UTF-8 text", "other bytes").at(&self.path, place))?;
        Ok(Some(RowText {
            place,
            offset: 0,
            end: 0,
            text: text.trim_start().to_owned(),
        }))
    }

    /// The bytes up to the comma or bracket that ends an element, and that byte.
    fn element(&mut self) -> Result<(Vec<u8>, u8)> {
        let (mut bytes, mut depth, mut in_string, mut escaped) = (Vec::new(), 0_u64, false, false);
        loop {
            let Some(byte) = self.byte()? else {
                return Err(self.expected("a list that ends with `]`", "the end of the file"));
            };
            match byte {
                _ if escaped => escaped = false,
                b'\\' if in_string => escaped = true,
                b'"' => in_string = !in_string,
                _ if in_string => {}
                b',' | b']' if depth == 0 => return Ok((bytes, byte)),
                b'{' | b'[' => depth += 1,
                b'}' | b']' => depth = depth.saturating_sub(1),
                _ => {}
            }
            bytes.push(byte);
            if bytes.len() as u64 > MAX_ROW_BYTES {
                let expected = format!("an element of at most {MAX_ROW_BYTES} bytes");
                return Err(self.expected(&expected, "a longer one"));
            }
        }
    }

    /// Reads what is left of the file: nothing of meaning.
    fn end(&mut self) -> Result<()> {
        self.is_over = true;
        let mut open = self.is_in_object;
        while let Some(byte) = self.byte()? {
            match byte {
                b'}' if open => open = false,
                _ if byte.is_ascii_whitespace() => {}
                _ if open => {
                    return Err(
                        self.expected("an object with `data` alone", "another key after it")
                    );
                }
                _ => return Err(self.expected("the end of the file after the list", "more")),
            }
        }
        match open {
            true => Err(self.expected("an object that ends with `}`", "the end of the file")),
            false => Ok(()),
        }
    }

    fn byte(&mut self) -> Result<Option<u8>> {
        next_byte(&mut self.reader, &self.path)
    }

    fn expected(&self, expected: &str, found: &str) -> Error {
        Error::schema(expected, found).at(&self.path, Place::Row(self.number + 1))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn elements(text: &str) -> Result<Vec<String>, String> {
        let path = Path::new("FILE");
        let beginning = beginning(text.as_bytes()).ok_or("no list")?;
        let mut list = JsonList::new(path, text.as_bytes(), beginning).unwrap();
        let rows = std::iter::from_fn(|| list.read().transpose());
        let rows: Result<Vec<String>> = rows.map(|row| row.map(|row| row.text)).collect();
        rows.map_err(|problem| problem.to_string())
    }

    #[test]
    fn elements_are_found_by_their_brackets() {
        let check = |text: &str, expected: &[&str]| {
            assert_eq!(elements(text).unwrap(), expected, "{text}");
        };
        check("[]", &[]);
        check("\u{feff} [ ]\n", &[]);
        check(
            "[{\"a\": \"],{\\\"\"}, {\"b\": [[], {}]}\n]\n",
            &["{\"a\": \"],{\\\"\"}", "{\"b\": [[], {}]}"],
        );
        check(
            "{\"data\": [\n{\"a\": 1},\n{\"a\": 2}]}",
            &["{\"a\": 1}", "{\"a\": 2}"],
        );
        check("[1]", &["1"]);
    }

    #[test]
    fn other_texts_are_no_lists_or_refused() {
        let check = |text: &str, expected: &str| {
            let problem = elements(text).unwrap_err();
            assert!(problem.contains(expected), "{text}: {problem}");
        };
        check("{\"a\": 1}", "no list");
        check("{\"data\": [1, 2], \"text\": \"\"}", "no list");
        check("{\"version\": 1, \"data\": [{}]}", "no list");
        check(
            "[{}, ",
            "FILE, row 2: expected a list that ends with `]`, found the end",
        );
        check("[{\"a", "found the end of the file");
        check(
            "[{},]",
            "FILE, row 2: expected an element after `,`, found none",
        );
        check("[,{}]", "an element before `,`");
        check("[{}] {}", "the end of the file after the list, found more");
        check(
            "{\"data\": [{}], \"split\": 1}",
            "an object with `data` alone",
        );
        check("{\"data\": [{}]", "an object that ends with `}`");
    }
}
