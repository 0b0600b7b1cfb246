//! The rows of a file, whatever it is: every kind of table becomes rows of JSON text, one after another.
//!
//! JSON lines are read as they are; lists in JSON, CSV and Parquet are decoded row by row. Files packed with gzip or
//! Zstandard are unpacked while they are read. Text is known by its name (`.jsonl`, `.json`, `.csv`, `.tsv`), other files by
//! their first bytes. A file may unpack to [`unpacked_limit`] bytes: beyond that it is a bomb.

mod csv;
mod json_list;
mod packed;
mod parquet;

use crate::error::{Error, Result};
use crate::file::{JsonLines, RowText, UNPACKED_PER_BYTE, UnreadColumn};
use csv::Csv;
use json_list::JsonList;
use packed::{Counted, Unpacked};
use parquet::Parquet;
use std::cell::Cell;
use std::io::{BufReader, Cursor, Read};
use std::path::Path;
use std::rc::Rc;

/// Bytes that any file may unpack to, however small it is.
const UNPACKED_BYTES: u64 = 64 << 20;
/// Bytes that tell what a file is.
const HEAD_BYTES: u64 = 256;

/// What a file of that many bytes may unpack to.
fn unpacked_limit(file_bytes: u64) -> u64 {
    UNPACKED_BYTES.saturating_add(file_bytes.saturating_mul(UNPACKED_PER_BYTE))
}

/// How the rows of a file are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct FileFormat {
    layout: Layout,
    packing: Compression,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Layout {
    Lines,
    /// Lines, or one list.
    Json,
    Csv {
        separator: u8,
    },
    Parquet,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Compression {
    None,
    Gzip,
    Zstd,
}

/// First bytes of files without rows that could be read, with what they are and what helps.
const OTHERS: [(&[u8], &str); 5] = [
    (b"ARROW1", ARROW),
    (b"\xFF\xFF\xFF\xFF", ARROW),
    (b"PK\x03\x04", "a zip archive; unpack it first"),
    (b"BZh", "a bzip2 file; unpack it first"),
    (b"\xFD7zXZ", "an xz file; unpack it first"),
];
const ARROW: &str =
    "an Arrow file; write the rows as Parquet, with `to_parquet` of the `datasets` package";

impl FileFormat {
    /// # Errors
    /// If the file cannot be read or has no rows that could be.
    pub(crate) fn of(path: &Path) -> Result<Self> {
        let read = |problem| Error::Read {
            path: path.to_path_buf(),
            problem,
        };
        let mut head = Vec::new();
        let file = crate::file::open(path)?;
        file.take(HEAD_BYTES).read_to_end(&mut head).map_err(read)?;
        if let Some((_, found)) = OTHERS.iter().find(|(magic, _)| head.starts_with(magic)) {
            return Err(Error::malformed(
                path,
                format!("expected rows, found {found}"),
            ));
        }
        let packing = match head.as_slice() {
            [0x1F, 0x8B, ..] => Compression::Gzip,
            [0x28, 0xB5, 0x2F, 0xFD, ..] => Compression::Zstd,
            _ => Compression::None,
        };
        let layout = match file_type(path).as_deref() {
            Some("parquet") => Layout::Parquet,
            _ if head.starts_with(parquet::MAGIC) => Layout::Parquet,
            Some("csv") => Layout::Csv { separator: b',' },
            Some("tsv") => Layout::Csv { separator: b'\t' },
            Some("json") => Layout::Json,
            _ => Layout::Lines,
        };
        Ok(Self { layout, packing })
    }

    /// Whether a row can be found again by the offset of its line.
    pub(crate) fn is_lines(self) -> bool {
        let lines = Self {
            layout: Layout::Lines,
            packing: Compression::None,
        };
        self == lines
    }
}

/// The end of a file's name that says how its rows are stored, in lower case, without that of its packing.
pub(crate) fn file_type(path: &Path) -> Option<String> {
    let name = path.file_name()?.to_str()?.to_ascii_lowercase();
    let packings = [".gz", ".zst", ".zstd"];
    let name = packings
        .iter()
        .find_map(|end| name.strip_suffix(end))
        .unwrap_or(&name);
    name.rsplit_once('.').map(|(_, end)| end.to_owned())
}

/// A file, open at a row.
pub(crate) struct Table {
    rows: Rows,
    is_lines: bool,
    bytes_read: Rc<Cell<u64>>,
}

type FileInput = BufReader<std::io::Chain<Cursor<Vec<u8>>, Box<dyn Read>>>;

enum Rows {
    Lines(JsonLines<FileInput>),
    List(JsonList<FileInput>),
    Csv(Csv<FileInput>),
    Parquet(Box<Parquet>),
}

impl Table {
    /// # Errors
    /// If the file cannot be read or its beginning is malformed.
    pub(crate) fn open(path: &Path) -> Result<Self> {
        let format = FileFormat::of(path)?;
        let read = |problem| Error::Read {
            path: path.to_path_buf(),
            problem,
        };
        let file = crate::file::open(path)?;
        let limit = unpacked_limit(file.metadata().map_err(read)?.len());
        let bytes_read = Rc::new(Cell::new(0));
        if format.layout == Layout::Parquet && format.packing == Compression::None {
            let rows = Parquet::open(path, file, limit)?;
            return Ok(Self {
                rows: Rows::Parquet(Box::new(rows)),
                is_lines: false,
                bytes_read,
            });
        }
        let counted = BufReader::new(Counted::new(file, &bytes_read));
        let mut unpacked: Box<dyn Read> = match format.packing {
            Compression::None => Box::new(counted),
            Compression::Gzip => Box::new(Unpacked::gzip(counted, limit)),
            Compression::Zstd => Box::new(Unpacked::zstd(counted, limit)),
        };
        let mut head = Vec::new();
        let mut first = unpacked.by_ref().take(HEAD_BYTES);
        first.read_to_end(&mut head).map_err(read)?;
        let list = json_list::beginning(&head).filter(|_| format.layout == Layout::Json);
        let input = BufReader::new(Cursor::new(head).chain(unpacked));
        let rows = match (format.layout, list) {
            (Layout::Parquet, _) => {
                let found = "one packed as a whole; unpack it first";
                return Err(Error::malformed(
                    path,
                    format!("expected a Parquet file, found {found}"),
                ));
            }
            (Layout::Csv { separator }, _) => Rows::Csv(Csv::new(path, input, separator)?),
            (_, Some(beginning)) => Rows::List(JsonList::new(path, input, beginning)?),
            _ => Rows::Lines(JsonLines::new(path, input)),
        };
        Ok(Self {
            rows,
            is_lines: format.is_lines(),
            bytes_read,
        })
    }

    /// The columns that rows do not have.
    pub(crate) fn unread_columns(&self) -> &[UnreadColumn] {
        match &self.rows {
            Rows::Parquet(parquet) => parquet.unread_columns(),
            _ => &[],
        }
    }

    fn read(&mut self) -> Result<Option<RowText>> {
        let row = match &mut self.rows {
            Rows::Lines(lines) => lines.read(),
            Rows::List(list) => list.read(),
            Rows::Csv(csv) => csv.read(),
            Rows::Parquet(parquet) => return parquet.read(),
        };
        let end = self.bytes_read.get();
        let is_lines = self.is_lines;
        let placed = |row| match is_lines {
            true => row,
            false => RowText {
                offset: 0,
                end,
                ..row
            },
        };
        row.map(|row| row.map(placed))
    }
}

impl Iterator for Table {
    type Item = Result<RowText>;

    fn next(&mut self) -> Option<Self::Item> {
        self.read().transpose()
    }
}

#[cfg(test)]
mod tests;
