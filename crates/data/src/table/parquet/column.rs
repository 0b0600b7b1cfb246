//! A column of a row group, page by page: levels and values, one at a time.

use super::codec::Codec;
use super::encodings::{Hybrid, ParquetValue, Values, plain, take, take_u32};
use super::schema::Leaf;
use super::thrift::Thrift;
use crate::error::{Error, Result};
use crate::file::UNPACKED_PER_BYTE;
use bytes::Bytes;
use std::fs::File;
use std::io::{Read, Seek, SeekFrom};
use std::path::PathBuf;
use std::rc::Rc;

/// The largest page, unpacked.
const MAX_PAGE_BYTES: u64 = 256 << 20;
/// What any page may unpack to, however small it is.
const ANY_PAGE_BYTES: u64 = 1 << 20;
/// The headers of pages have statistics, which may be long texts.
const MAX_HEADER_BYTES: usize = 1 << 20;
const HEADER_BYTES: usize = 1 << 10;

/// The file, and what may still be unpacked from it.
#[derive(Debug)]
pub(super) struct Source {
    pub(super) path: PathBuf,
    pub(super) file: File,
    pub(super) file_bytes: u64,
    pub(super) limit: u64,
    pub(super) unpacked: u64,
}

impl Source {
    pub(super) fn read(&mut self, offset: u64, size: u64) -> Result<Vec<u8>> {
        if offset
            .checked_add(size)
            .is_none_or(|end| end > self.file_bytes)
        {
            return Err(Error::schema(
                "data inside of the file",
                "a place beyond its end",
            ));
        }
        let mut bytes = Vec::new();
        let read = |problem| Error::Read {
            path: self.path.clone(),
            problem,
        };
        self.file.seek(SeekFrom::Start(offset)).map_err(read)?;
        (&mut self.file)
            .take(size)
            .read_to_end(&mut bytes)
            .map_err(read)?;
        match bytes.len() as u64 == size {
            true => Ok(bytes),
            false => Err(Error::Changed {
                path: self.path.clone(),
            }),
        }
    }

    /// Counts what is about to be unpacked.
    pub(super) fn unpack(&mut self, bytes: u64) -> Result<()> {
        self.unpacked = self.unpacked.saturating_add(bytes);
        match self.unpacked > self.limit {
            true => {
                let expected = format!("a file that unpacks to at most {} bytes", self.limit);
                Err(Error::schema(expected, "more"))
            }
            false => Ok(()),
        }
    }
}

/// The levels of a value, or of a null.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ValueLevels {
    pub(super) def: u32,
    pub(super) rep: u32,
}

/// A column, open at a value.
#[derive(Debug)]
pub(super) struct ParquetColumn {
    leaf: Leaf,
    codec: Codec,
    /// The place of the next page.
    offset: u64,
    /// Values in pages that are not read yet.
    left: u64,
    dictionary: Option<Rc<Vec<ParquetValue>>>,
    page: Option<Page>,
    /// The levels of the next value, if they are read.
    levels: Option<ValueLevels>,
}

/// A page, open at a value.
#[derive(Debug)]
struct Page {
    left: u64,
    rep: Hybrid,
    def: Hybrid,
    values: Values,
}

impl ParquetColumn {
    /// From the metadata of a column chunk.
    pub(super) fn new(leaf: &Leaf, chunk: &Thrift) -> Result<Self> {
        let expected = || format!("metadata of column `{}`", leaf.name);
        if chunk.field(1).is_some() {
            let found = "its values in another file";
            return Err(Error::schema(
                format!("column `{}` in this file", leaf.name),
                found,
            ));
        }
        let malformed = || Error::schema(expected(), "malformed ones");
        let meta = chunk.field(3).ok_or_else(malformed)?;
        let codec = Codec::of(meta.number(4).unwrap_or(-1)).map_err(|found| {
            let expected = format!(
                "column `{}` packed with Snappy, gzip, Zstandard or LZ4 (as a file written anew with one of these)",
                leaf.name
            );
            Error::schema(expected, found)
        })?;
        let data = meta.size(9).ok_or_else(malformed)?;
        let dictionary = meta.size(11).filter(|&offset| offset > 0 && offset < data);
        Ok(Self {
            leaf: leaf.clone(),
            codec,
            offset: dictionary.unwrap_or(data),
            left: meta.size(5).ok_or_else(malformed)?,
            dictionary: None,
            page: None,
            levels: None,
        })
    }

    /// The levels of the next value; none at the end of the row group.
    pub(super) fn peek(&mut self, source: &mut Source) -> Result<Option<ValueLevels>> {
        if self.levels.is_some() {
            return Ok(self.levels);
        }
        while self.page.as_ref().is_none_or(|page| page.left == 0) {
            if self.left == 0 {
                return Ok(None);
            }
            self.next_page(source)?;
        }
        let page = self.page.as_mut();
        let levels = page.and_then(|page| {
            page.left -= 1;
            let (rep, def) = (page.rep.next()?, page.def.next()?);
            Some(ValueLevels { def, rep })
        });
        let fits = |levels: &ValueLevels| {
            levels.def <= self.leaf.max_def && levels.rep <= self.leaf.max_rep
        };
        self.levels = Some(
            levels
                .filter(fits)
                .ok_or_else(|| self.malformed("levels"))?,
        );
        Ok(self.levels)
    }

    /// The next value; none if it is null.
    pub(super) fn take(&mut self, source: &mut Source) -> Result<Option<ParquetValue>> {
        let levels = self.peek(source)?;
        self.levels = None;
        let def = levels
            .ok_or_else(|| self.malformed("number of values"))?
            .def;
        if def < self.leaf.max_def {
            return Ok(None);
        }
        let value = self.page.as_mut().and_then(|page| page.values.next());
        value.map(Some).ok_or_else(|| self.malformed("values"))
    }

    pub(super) fn leaf(&self) -> &Leaf {
        &self.leaf
    }

    fn malformed(&self, part: &str) -> Error {
        Error::schema(
            format!("{part} of column `{}`", self.leaf.name),
            "malformed or missing ones",
        )
    }

    /// Reads the next page of values, and a dictionary before it.
    fn next_page(&mut self, source: &mut Source) -> Result<()> {
        let malformed = |part| self.malformed(part);
        let (header, header_bytes) =
            page_header(self.offset, source)?.ok_or_else(|| malformed("a page header"))?;
        let sizes = header.size(2).zip(header.size(3));
        let (unpacked, packed) = sizes.ok_or_else(|| malformed("a page header"))?;
        let most = packed
            .saturating_mul(UNPACKED_PER_BYTE)
            .saturating_add(ANY_PAGE_BYTES);
        if unpacked > most.min(MAX_PAGE_BYTES) {
            let expected = format!(
                "a page of column `{}` of at most {} bytes",
                self.leaf.name,
                most.min(MAX_PAGE_BYTES)
            );
            return Err(Error::schema(expected, unpacked.to_string()));
        }
        source.unpack(unpacked)?;
        let start = self.offset + header_bytes;
        let bytes = Bytes::from(source.read(start, packed)?);
        self.offset = start + packed;
        let read = match header.number(1) {
            Some(0) => self.first_version(&header, bytes, unpacked as usize),
            Some(2) => self.read_dictionary(&header, bytes, unpacked as usize),
            Some(3) => self.second_version(&header, bytes, unpacked as usize),
            // An index, which is not needed.
            _ => Some(()),
        };
        read.ok_or_else(|| self.malformed("a page"))
    }

    fn read_dictionary(&mut self, header: &Thrift, packed: Bytes, size: usize) -> Option<()> {
        let n = header.field(7)?.size(1)?;
        let mut bytes = Bytes::from(self.codec.unpack(&packed, size)?);
        let physical = self.leaf.physical.ok()?;
        let mut values = Vec::new();
        for _ in 0..n {
            values.push(plain(&mut bytes, physical)?);
        }
        self.dictionary = Some(Rc::new(values));
        Some(())
    }

    fn first_version(&mut self, header: &Thrift, packed: Bytes, size: usize) -> Option<()> {
        let page = header.field(5)?;
        let mut bytes = Bytes::from(self.codec.unpack(&packed, size)?);
        let mut levels = |max: u32, encoding: i16| {
            if max == 0 {
                return zeros();
            }
            // The other encoding of levels was given up in 2013.
            (page.number(encoding) == Some(3)).then_some(())?;
            let size = take_u32(&mut bytes)?;
            Hybrid::new(take(&mut bytes, size)?, width(max))
        };
        let (rep, def) = (levels(self.leaf.max_rep, 4)?, levels(self.leaf.max_def, 3)?);
        let values = self.values(page.number(2)?, bytes)?;
        self.open(page.size(1)?, rep, def, values)
    }

    fn second_version(&mut self, header: &Thrift, mut bytes: Bytes, size: usize) -> Option<()> {
        let page = header.field(8)?;
        let mut level_bytes = 0;
        let mut levels = |max: u32, length: i16| {
            let length = usize::try_from(page.size(length)?).ok()?;
            level_bytes += length;
            let levels = take(&mut bytes, length)?;
            if max == 0 {
                zeros()
            } else {
                Hybrid::new(levels, width(max))
            }
        };
        let (rep, def) = (levels(self.leaf.max_rep, 6)?, levels(self.leaf.max_def, 5)?);
        let is_packed = page.field(7) != Some(&Thrift::Bool(false));
        let size = size.checked_sub(level_bytes)?;
        // A page of nulls alone has nothing to unpack.
        let bytes = match is_packed && !bytes.is_empty() {
            true => Bytes::from(self.codec.unpack(&bytes, size)?),
            false => bytes,
        };
        let values = self.values(page.number(4)?, bytes)?;
        self.open(page.size(1)?, rep, def, values)
    }

    fn values(&self, encoding: i64, bytes: Bytes) -> Option<Values> {
        // A page of nulls may have no bytes, not even those that its encoding begins with.
        if bytes.is_empty() {
            return Some(Values::Plain(bytes, self.leaf.physical.ok()?));
        }
        Values::new(
            encoding,
            bytes,
            self.leaf.physical.ok()?,
            self.dictionary.as_ref(),
        )
    }

    fn open(&mut self, n: u64, rep: Hybrid, def: Hybrid, values: Values) -> Option<()> {
        self.left = self.left.checked_sub(n)?;
        self.page = Some(Page {
            left: n,
            rep,
            def,
            values,
        });
        Some(())
    }
}

/// The header of a page and its size; none if it is malformed.
fn page_header(offset: u64, source: &mut Source) -> Result<Option<(Thrift, u64)>> {
    let mut size = HEADER_BYTES;
    loop {
        let available = source.file_bytes.saturating_sub(offset);
        let bytes = source.read(offset, available.min(size as u64))?;
        if let Some((header, rest)) = Thrift::read(&bytes) {
            return Ok(Some((header, (bytes.len() - rest.len()) as u64)));
        }
        if size >= MAX_HEADER_BYTES || bytes.len() < size {
            return Ok(None);
        }
        size *= 8;
    }
}

/// Bits of the largest level.
fn width(max: u32) -> u32 {
    u32::BITS - max.leading_zeros()
}

/// The levels of a column that has none: zeros, as many as are wanted.
fn zeros() -> Option<Hybrid> {
    // One run of 2⁶² zeros without bits.
    Hybrid::new(
        Bytes::from_static(&[0xFE, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F]),
        0,
    )
}
