//! Tables of separated values: the first line names the columns, every other one is a row of texts.
//!
//! RFC 4180: fields with separators, line ends or quotes stand in quotes, and a quote in them is doubled. An empty field is
//! null, as pandas and `datasets` read it.

use crate::error::{Error, Place, Result};
use crate::file::{MAX_ROW_BYTES, RowText, next_byte};
use std::collections::BTreeSet;
use std::io::BufRead;
use std::path::{Path, PathBuf};

/// Columns that a table may have.
const MAX_COLUMNS: usize = 10_000;

/// A table, open at a row.
#[derive(Debug)]
pub(super) struct Csv<R> {
    path: PathBuf,
    reader: R,
    separator: u8,
    /// The JSON texts of the columns' names.
    names: Vec<String>,
    /// The line that is read next, counted from 1.
    line: usize,
}

impl<R: BufRead> Csv<R> {
    pub(super) fn new(path: &Path, reader: R, separator: u8) -> Result<Self> {
        let mut csv = Self {
            path: path.to_path_buf(),
            reader,
            separator,
            names: Vec::new(),
            line: 1,
        };
        let (place, header) = csv.record()?.unwrap_or((Place::Line(1), Vec::new()));
        let mut seen = BTreeSet::new();
        for (index, name) in header.into_iter().enumerate() {
            let name = name
                .strip_prefix('\u{feff}')
                .map_or(name.clone(), str::to_owned);
            // The index that pandas writes has no name; it calls it so when it reads the file.
            let name = if name.is_empty() {
                format!("Unnamed: {index}")
            } else {
                name
            };
            csv.names
                .push(serde_json::Value::from(name.as_str()).to_string());
            if !seen.insert(name.clone()) {
                let found = format!("`{name}` twice");
                return Err(Error::schema("a name for each column", found).at(path, place));
            }
        }
        Ok(csv)
    }

    pub(super) fn read(&mut self) -> Result<Option<RowText>> {
        let Some((place, fields)) = self.record()? else {
            return Ok(None);
        };
        let (n, expected) = (fields.len(), self.names.len());
        if n != expected {
            let expected = format!("{expected} fields, as the first line has");
            return Err(Error::schema(expected, n.to_string()).at(&self.path, place));
        }
        let values = self
            .names
            .iter()
            .zip(&fields)
            .map(|(name, field)| match field.is_empty() {
                true => format!("{name}:null"),
                false => format!("{name}:{}", serde_json::Value::from(field.as_str())),
            });
        let text = format!("{{{}}}", values.collect::<Vec<_>>().join(","));
        Ok(Some(RowText {
            place,
            offset: 0,
            end: 0,
            text,
        }))
    }

    /// The place and the fields of the next row that is not a blank line; none at the end of the file.
    fn record(&mut self) -> Result<Option<(Place, Vec<String>)>> {
        let (mut place, mut fields, mut bytes) = (Place::Line(self.line), Vec::new(), 0);
        loop {
            let (field, end) = self.field(&mut bytes, place)?;
            if fields.is_empty() && field.is_empty() && end == FieldEnd::File {
                return Ok(None);
            }
            self.line += usize::from(end == FieldEnd::Line);
            if fields.is_empty() && field.is_empty() && end == FieldEnd::Line && bytes <= 2 {
                (place, bytes) = (Place::Line(self.line), 0);
                continue;
            }
            fields.push(self.text(field, place)?);
            if fields.len() > MAX_COLUMNS {
                return Err(
                    Error::schema(format!("at most {MAX_COLUMNS} fields"), "more")
                        .at(&self.path, place),
                );
            }
            if end != FieldEnd::Separator {
                return Ok(Some((place, fields)));
            }
        }
    }

    fn text(&self, field: Vec<u8>, place: Place) -> Result<String> {
        let text = String::from_utf8(field);
        text.map_err(|_| Error::schema("UTF-8 text", "other bytes").at(&self.path, place))
    }

    /// The bytes of a field, and what ended it. `bytes` counts those of the row.
    fn field(&mut self, bytes: &mut u64, place: Place) -> Result<(Vec<u8>, FieldEnd)> {
        let (mut field, mut state) = (Vec::new(), FieldState::Start);
        loop {
            let byte = self.byte()?;
            *bytes += 1;
            // A separator costs a text of its own.
            if *bytes > MAX_ROW_BYTES {
                let expected = format!("a row of at most {MAX_ROW_BYTES} bytes");
                return Err(Error::schema(expected, "a longer one").at(&self.path, place));
            }
            let (next, pushed) = match (state, byte) {
                (FieldState::Quoted, None) => {
                    let expected = "a quote at the end of a quoted field";
                    return Err(
                        Error::schema(expected, "the end of the file").at(&self.path, place)
                    );
                }
                (FieldState::Quoted, Some(b'"')) => (FieldState::AfterQuote, None),
                (FieldState::Quoted, Some(byte)) => {
                    self.line += usize::from(byte == b'\n');
                    (FieldState::Quoted, Some(byte))
                }
                (FieldState::Start, Some(b'"')) => (FieldState::Quoted, None),
                (FieldState::AfterQuote, Some(b'"')) => (FieldState::Quoted, Some(b'"')),
                (_, None) => return Ok((field, FieldEnd::File)),
                (_, Some(b'\n')) => {
                    if field.last() == Some(&b'\r') && state == FieldState::Plain {
                        field.pop();
                    }
                    return Ok((field, FieldEnd::Line));
                }
                (_, Some(byte)) if byte == self.separator => {
                    return Ok((field, FieldEnd::Separator));
                }
                (FieldState::AfterQuote, Some(b'\r')) => (FieldState::AfterQuote, None),
                (FieldState::AfterQuote, Some(_)) => {
                    let expected = "a separator after a quoted field";
                    return Err(Error::schema(expected, "other text").at(&self.path, place));
                }
                (_, Some(byte)) => (FieldState::Plain, Some(byte)),
            };
            state = next;
            field.extend(pushed);
        }
    }

    fn byte(&mut self) -> Result<Option<u8>> {
        next_byte(&mut self.reader, &self.path)
    }
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum FieldState {
    Start,
    Plain,
    Quoted,
    /// After the quote that ends a field, or the first of two that are one.
    AfterQuote,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum FieldEnd {
    Separator,
    Line,
    File,
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(text: &str, separator: u8) -> Result<Vec<(Place, String)>, String> {
        let open = Csv::new(Path::new("FILE"), text.as_bytes(), separator);
        let mut csv = open.map_err(|problem| problem.to_string())?;
        let rows = std::iter::from_fn(|| csv.read().transpose());
        let rows: Result<_> = rows
            .map(|row| row.map(|row| (row.place, row.text)))
            .collect();
        rows.map_err(|problem| problem.to_string())
    }

    #[test]
    fn fields_are_texts_or_null() {
        let check = |text: &str, separator, expected: &[(usize, &str)]| {
            let expected: Vec<_> = expected
                .iter()
                .map(|(line, row)| (Place::Line(*line), (*row).to_owned()))
                .collect();
            assert_eq!(rows(text, separator).unwrap(), expected, "{text}");
        };
        let text =
            "\u{feff}prompt,completion\r\n1+1=,2\r\n\r\n\"a, \"\"b\"\"\r\nc\",\"\"\nx,\" y\"";
        check(
            text,
            b',',
            &[
                (2, r#"{"prompt":"1+1=","completion":"2"}"#),
                (4, r#"{"prompt":"a, \"b\"\r\nc","completion":null}"#),
                (6, r#"{"prompt":"x","completion":" y"}"#),
            ],
        );
        check(
            "text\ta\n\"\"\t5\" x\n",
            b'\t',
            &[(2, r#"{"text":null,"a":"5\" x"}"#)],
        );
        check(
            ",text\n0,é\n",
            b',',
            &[(2, r#"{"Unnamed: 0":"0","text":"é"}"#)],
        );
        check("", b',', &[]);
        check("text\n", b',', &[]);
        // A blank line is no row, a quoted nothing is one.
        check(
            "\ntext\na\n\n\"\"\n\n",
            b',',
            &[(3, r#"{"text":"a"}"#), (5, r#"{"text":null}"#)],
        );
    }

    #[test]
    fn malformed_rows_name_their_line() {
        let check = |text: &str, expected: &str| {
            let problem = rows(text, b',').unwrap_err();
            assert!(problem.starts_with(expected), "{problem}");
        };
        check(
            "a,b\n1,2\n\n3\n",
            "FILE:4: expected 2 fields, as the first line has, found 1",
        );
        check(
            "a,b\n1,2,3\n",
            "FILE:2: expected 2 fields, as the first line has, found 3",
        );
        check(
            "a\n\"b\n",
            "FILE:2: expected a quote at the end of a quoted field, found the end",
        );
        check(
            "a\n\"b\"c\n",
            "FILE:2: expected a separator after a quoted field, found other text",
        );
        check(
            "a,a\n",
            "FILE:1: expected a name for each column, found `a` twice",
        );
    }
}
