//! Parquet files: rows put together from their columns, as JSON.
//!
//! Reads what published data sets have: texts, numbers, booleans, and lists, structs and maps of these, nulls at every depth;
//! packed with Snappy, gzip, Zstandard or LZ4; in all encodings but one that was given up. A row group is read page by page,
//! each of a bounded size, so that memory holds a page of every column. Nothing a file claims is allocated before it is there.
//!
//! Values are found by Dremel's levels: the repetition level says which list goes on, the definition level what is null.
//!
//! Source: apache/parquet-format: README.md, src/main/thrift/parquet.thrift.

mod codec;
mod column;
mod encodings;
mod schema;
mod thrift;

use crate::error::{Error, Place, Result};
use crate::file::{MAX_ROW_BYTES, RowText, UnreadColumn};
use column::{ParquetColumn, Source};
use encodings::ParquetValue;
use schema::{Node, ParquetField, Repeated, Schema};
use std::fs::File;
use std::path::Path;
use thrift::Thrift;

/// The first bytes of a file, and its last ones.
pub(super) const MAGIC: &[u8] = b"PAR1";
/// The last bytes of a file: the size of its metadata, and the magic.
const TAIL_BYTES: u64 = 8;
/// Metadata of a hundred thousand column chunks fit in it.
const MAX_METADATA_BYTES: u64 = 64 << 20;

/// A file, open at a row.
#[derive(Debug)]
pub(super) struct Parquet {
    source: Source,
    schema: Schema,
    row_groups: Vec<RowGroup>,
    /// The row groups that are read.
    next_group: usize,
    /// Columns of the row group that is read, those without a form in rows left out.
    columns: Vec<Option<ParquetColumn>>,
    rows_left: u64,
    /// Rows read, of how many.
    number: usize,
    rows: u64,
    /// Bytes of rows so far.
    text_bytes: u64,
}

#[derive(Debug)]
struct RowGroup {
    rows: u64,
    columns: Vec<Thrift>,
}

impl Parquet {
    /// # Errors
    /// If the metadata is malformed. `limit` is what the file may unpack to, in bytes.
    pub(super) fn open(path: &Path, file: File, limit: u64) -> Result<Self> {
        let file_bytes = file.metadata().map_err(|problem| Error::Read {
            path: path.to_path_buf(),
            problem,
        })?;
        let mut source = Source {
            path: path.to_path_buf(),
            file,
            file_bytes: file_bytes.len(),
            limit,
            unpacked: 0,
        };
        let at_file = |problem: Error| Error::malformed(path, problem.to_string());
        let metadata = metadata(&mut source).map_err(at_file)?;
        let malformed = || {
            Error::malformed(
                path,
                "expected the metadata of a Parquet file, found malformed ones",
            )
        };
        let schema = metadata
            .list(2)
            .and_then(Schema::new)
            .ok_or_else(malformed)?;
        let group = |group: &Thrift| {
            let columns = group.list(1)?.to_vec();
            let rows = group.size(3)?;
            (columns.len() == schema.leaves.len()).then_some(RowGroup { rows, columns })
        };
        let groups = metadata.list(4).ok_or_else(malformed)?.iter().map(group);
        let row_groups: Vec<RowGroup> = groups.collect::<Option<_>>().ok_or_else(malformed)?;
        Ok(Self {
            source,
            schema,
            next_group: 0,
            columns: Vec::new(),
            rows_left: 0,
            number: 0,
            rows: row_groups
                .iter()
                .fold(0, |rows, group| rows.saturating_add(group.rows)),
            row_groups,
            text_bytes: 0,
        })
    }

    pub(super) fn unread_columns(&self) -> &[UnreadColumn] {
        &self.schema.unread
    }

    pub(super) fn read(&mut self) -> Result<Option<RowText>> {
        let place = Place::Row(self.number + 1);
        let row = self.row();
        let Some(bytes) = row.map_err(|problem| match problem {
            Error::Schema { .. } => problem.at(&self.source.path, place),
            other => other,
        })?
        else {
            return Ok(None);
        };
        self.number += 1;
        let text = String::from_utf8(bytes)
            .map_err(|_| Error::schema("UTF-8 text", "other bytes").at(&self.source.path, place))?;
        let part = self.number as f64 / self.rows.max(1) as f64;
        Ok(Some(RowText {
            place,
            offset: 0,
            end: (part * self.source.file_bytes as f64) as u64,
            text,
        }))
    }

    fn row(&mut self) -> Result<Option<Vec<u8>>> {
        while self.rows_left == 0 {
            let Some(group) = self.row_groups.get(self.next_group) else {
                return Ok(None);
            };
            let columns = self.schema.leaves.iter().zip(&group.columns);
            let columns = columns.map(|(leaf, chunk)| match leaf.physical {
                Ok(_) => ParquetColumn::new(leaf, chunk).map(Some),
                Err(_) => Ok(None),
            });
            self.columns = columns.collect::<Result<_>>()?;
            self.rows_left = group.rows;
            self.next_group += 1;
        }
        self.rows_left -= 1;
        let mut writer = RowWriter {
            columns: &mut self.columns,
            source: &mut self.source,
            out: Vec::new(),
        };
        writer.object(&self.schema.fields)?;
        let out = writer.out;
        self.text_bytes += out.len() as u64;
        if self.text_bytes > self.source.limit {
            let expected = format!("rows of at most {} bytes in all", self.source.limit);
            return Err(Error::schema(expected, "more"));
        }
        Ok(Some(out))
    }
}

fn metadata(source: &mut Source) -> Result<Thrift> {
    let tail = source.file_bytes.checked_sub(TAIL_BYTES);
    let no_parquet = |found: &str| Error::schema("a Parquet file, which ends with `PAR1`", found);
    let tail = tail.ok_or_else(|| no_parquet("one of a few bytes"))?;
    let bytes = source.read(tail, TAIL_BYTES)?;
    let (size, magic) = bytes.split_at(4);
    match magic {
        MAGIC => {}
        b"PARE" => return Err(no_parquet("an encrypted one")),
        _ => return Err(no_parquet("other bytes (is it complete?)")),
    }
    let size = size
        .iter()
        .rev()
        .fold(0, |size, &byte| size << 8 | u64::from(byte));
    let malformed = || Error::schema("the metadata of a Parquet file", "malformed ones");
    let start = tail
        .checked_sub(size)
        .filter(|_| size <= MAX_METADATA_BYTES);
    let bytes = source.read(start.ok_or_else(malformed)?, size)?;
    Ok(Thrift::read(&bytes).ok_or_else(malformed)?.0)
}

/// A row that is being written.
struct RowWriter<'a> {
    columns: &'a mut [Option<ParquetColumn>],
    source: &'a mut Source,
    out: Vec<u8>,
}

impl RowWriter<'_> {
    fn object(&mut self, fields: &[ParquetField]) -> Result<()> {
        self.put(b"{")?;
        for (index, field) in fields.iter().enumerate() {
            if index > 0 {
                self.put(b",")?;
            }
            self.put(quoted(&field.name).as_bytes())?;
            self.put(b":")?;
            self.field(field)?;
        }
        self.put(b"}")
    }

    fn field(&mut self, field: &ParquetField) -> Result<()> {
        if self.level(field)?.def < field.def {
            self.skip(field)?;
            return self.put(b"null");
        }
        match &field.node {
            Node::Value => self.value(field),
            Node::Object(fields) => self.object(fields),
            Node::List(list) => {
                self.put(b"[")?;
                self.elements(field, list, Self::field)?;
                self.put(b"]")
            }
            Node::Map(map) => {
                self.put(b"{")?;
                self.elements(field, map, Self::entry)?;
                self.put(b"}")
            }
        }
    }

    /// The elements of a list, each written by `write`.
    fn elements(
        &mut self,
        field: &ParquetField,
        list: &Repeated,
        write: fn(&mut Self, &ParquetField) -> Result<()>,
    ) -> Result<()> {
        if self.level(field)?.def < list.def {
            return self.skip(field);
        }
        loop {
            write(self, &list.element)?;
            let (column, source) = self.column(field.leaves.start)?;
            match column.peek(source)? {
                Some(levels) if levels.rep == list.rep => self.put(b",")?,
                _ => return Ok(()),
            }
        }
    }

    /// A key and its value.
    fn entry(&mut self, entry: &ParquetField) -> Result<()> {
        let Node::Object(fields) = &entry.node else {
            return Err(Error::schema("keys and values in a map", "others"));
        };
        let [key, value] = fields.as_slice() else {
            return Err(Error::schema(
                "a key and a value in a map",
                fields.len().to_string(),
            ));
        };
        let start = self.out.len();
        self.field(key)?;
        if self.out.get(start) != Some(&b'"') {
            let expected = format!(
                "texts as keys of the map with the columns `{}` and `{}`",
                key.name, value.name
            );
            return Err(Error::schema(expected, "others"));
        }
        self.put(b":")?;
        self.field(value)
    }

    fn value(&mut self, field: &ParquetField) -> Result<()> {
        let (column, source) = self.column(field.leaves.start)?;
        let value = column.take(source)?;
        let is_unsigned = column.leaf().is_unsigned;
        let text = match value {
            None => "null".to_owned(),
            Some(ParquetValue::Bool(value)) => value.to_string(),
            Some(ParquetValue::Int(value)) if is_unsigned => {
                let is_short = column.leaf().physical == Ok(schema::Physical::Int32);
                let value = value as u64;
                let value = if is_short {
                    value & u64::from(u32::MAX)
                } else {
                    value
                };
                value.to_string()
            }
            Some(ParquetValue::Int(value)) => value.to_string(),
            // Numbers that are not finite become null, as tables write missing ones.
            Some(ParquetValue::Float(value)) => serde_json::to_string(&value).unwrap_or_default(),
            Some(ParquetValue::Double(value)) => serde_json::to_string(&value).unwrap_or_default(),
            Some(ParquetValue::Bytes(bytes)) => {
                let text = std::str::from_utf8(&bytes);
                let other = |_| {
                    Error::schema(
                        format!("UTF-8 text in column `{}`", field.name),
                        "other bytes",
                    )
                };
                quoted(text.map_err(other)?)
            }
        };
        self.put(text.as_bytes())
    }

    fn level(&mut self, field: &ParquetField) -> Result<column::ValueLevels> {
        let (column, source) = self.column(field.leaves.start)?;
        let levels = column.peek(source)?;
        let name = &column.leaf().name;
        levels.ok_or_else(|| {
            Error::schema(format!("a value of column `{name}` for each row"), "fewer")
        })
    }

    /// Passes over a null or an empty list in all columns below.
    fn skip(&mut self, field: &ParquetField) -> Result<()> {
        for leaf in field.leaves.clone() {
            let (column, source) = self.column(leaf)?;
            column.take(source)?;
        }
        Ok(())
    }

    fn column(&mut self, leaf: usize) -> Result<(&mut ParquetColumn, &mut Source)> {
        let column = self.columns.get_mut(leaf).and_then(Option::as_mut);
        let column =
            column.ok_or_else(|| Error::schema("columns of values", "a group without any"))?;
        Ok((column, &mut *self.source))
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        if (self.out.len() + bytes.len()) as u64 > MAX_ROW_BYTES {
            return Err(Error::schema(
                format!("a row of at most {MAX_ROW_BYTES} bytes"),
                "a longer one",
            ));
        }
        self.out.extend_from_slice(bytes);
        Ok(())
    }
}

/// A text as JSON.
fn quoted(text: &str) -> String {
    serde_json::Value::from(text).to_string()
}
