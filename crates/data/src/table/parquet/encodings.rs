//! The encodings of values and levels in a page. Each is read value by value: what a page claims takes no memory.
//!
//! Source: apache/parquet-format: Encodings.md.

use super::schema::Physical;
use super::thrift::{varint, zigzag};
use bytes::Bytes;
use std::rc::Rc;

/// A value that is not null.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum ParquetValue {
    Bool(bool),
    Int(i64),
    Float(f32),
    Double(f64),
    Bytes(Bytes),
}

/// Splits off the first `n` bytes.
pub(super) fn take(bytes: &mut Bytes, n: usize) -> Option<Bytes> {
    (n <= bytes.len()).then(|| bytes.split_to(n))
}

pub(super) fn take_u32(bytes: &mut Bytes) -> Option<usize> {
    let number = take(bytes, 4)?;
    usize::try_from(u32::from_le_bytes(number.as_ref().try_into().ok()?)).ok()
}

fn take_varint(bytes: &mut Bytes) -> Option<u64> {
    let (value, rest) = varint(bytes)?;
    let read = bytes.len() - rest.len();
    take(bytes, read)?;
    Some(value)
}

/// `width` bits from a place on, lowest first; 0 beyond the end.
fn bits(bytes: &[u8], place: usize, width: u32) -> u64 {
    let (start, shift) = (place / 8, place % 8);
    // A number of 64 bits may begin inside of a byte.
    let window = bytes
        .get(start..)
        .unwrap_or_default()
        .iter()
        .take(9)
        .enumerate();
    let value = window.fold(0, |value, (index, &byte)| {
        value | u128::from(byte) << (8 * index)
    });
    (value >> shift & ((1 << width) - 1)) as u64
}

/// Runs of one number, and runs of numbers packed into bits.
#[derive(Clone, Debug)]
pub(super) struct Hybrid {
    bytes: Bytes,
    width: u32,
    run: CodeRun,
}

#[derive(Clone, Debug)]
enum CodeRun {
    Repeated {
        value: u32,
        left: u64,
    },
    Packed {
        bytes: Bytes,
        place: usize,
        left: u64,
    },
}

impl Hybrid {
    /// None if numbers have more than 32 bits.
    pub(super) fn new(bytes: Bytes, width: u32) -> Option<Self> {
        let run = CodeRun::Repeated { value: 0, left: 0 };
        (width <= 32).then_some(Self { bytes, width, run })
    }

    /// Numbers of one bit, without runs.
    fn packed(bytes: Bytes) -> Self {
        let left = 8 * bytes.len() as u64;
        Self {
            bytes: Bytes::new(),
            width: 1,
            run: CodeRun::Packed {
                bytes,
                place: 0,
                left,
            },
        }
    }

    pub(super) fn next(&mut self) -> Option<u32> {
        loop {
            match &mut self.run {
                CodeRun::Repeated { value, left } if *left > 0 => {
                    *left -= 1;
                    return Some(*value);
                }
                CodeRun::Packed { bytes, place, left } if *left > 0 => {
                    let value = bits(bytes, *place, self.width);
                    *left -= 1;
                    *place += self.width as usize;
                    return Some(value as u32);
                }
                _ => self.run = self.next_run()?,
            }
        }
    }

    fn next_run(&mut self) -> Option<CodeRun> {
        let header = take_varint(&mut self.bytes)?;
        if header & 1 == 0 {
            let value = take(&mut self.bytes, self.width.div_ceil(8) as usize)?;
            return Some(CodeRun::Repeated {
                value: bits(&value, 0, self.width) as u32,
                left: header >> 1,
            });
        }
        let groups = header >> 1;
        let size = groups.checked_mul(u64::from(self.width))?;
        // Some writers leave out the padding of the last group.
        let size = usize::try_from(size).ok()?.min(self.bytes.len());
        Some(CodeRun::Packed {
            bytes: take(&mut self.bytes, size)?,
            place: 0,
            left: groups.checked_mul(8)?,
        })
    }
}

/// Integers as differences, in blocks of blocks.
#[derive(Clone, Debug)]
pub(super) struct Delta {
    bytes: Bytes,
    /// Numbers in a small block, and small blocks in a block.
    small: usize,
    per_block: usize,
    left: u64,
    last: i64,
    is_first: bool,
    min_delta: i64,
    widths: Bytes,
    packed: Bytes,
    width: u32,
    place: usize,
    left_in_small: usize,
}

impl Delta {
    pub(super) fn new(mut bytes: Bytes) -> Option<Self> {
        /// What writers use is 128; a number without bits takes no bytes, so that more would be free.
        const MAX_BLOCK: u64 = 1 << 16;
        let block = take_varint(&mut bytes)?;
        let per_block = take_varint(&mut bytes)?;
        let left = take_varint(&mut bytes)?;
        let last = zigzag(take_varint(&mut bytes)?);
        let is_valid = (1..=MAX_BLOCK).contains(&block) && (1..=block).contains(&per_block);
        let small = if is_valid {
            (block / per_block) as usize
        } else {
            0
        };
        (small > 0 && small.is_multiple_of(8)).then(|| Self {
            bytes,
            small,
            per_block: per_block as usize,
            left,
            last,
            is_first: true,
            min_delta: 0,
            widths: Bytes::new(),
            packed: Bytes::new(),
            width: 0,
            place: 0,
            left_in_small: 0,
        })
    }

    pub(super) fn next(&mut self) -> Option<i64> {
        self.left = self.left.checked_sub(1)?;
        if std::mem::take(&mut self.is_first) {
            return Some(self.last);
        }
        if self.left_in_small == 0 {
            self.next_small()?;
        }
        let delta = bits(&self.packed, self.place, self.width) as i64;
        self.place += self.width as usize;
        self.left_in_small -= 1;
        self.last = self.last.wrapping_add(delta).wrapping_add(self.min_delta);
        Some(self.last)
    }

    fn next_small(&mut self) -> Option<()> {
        if self.widths.is_empty() {
            self.min_delta = zigzag(take_varint(&mut self.bytes)?);
            self.widths = take(&mut self.bytes, self.per_block)?;
        }
        self.width = u32::from(take(&mut self.widths, 1)?[0]);
        if self.width > 64 {
            return None;
        }
        self.packed = take(&mut self.bytes, self.small / 8 * self.width as usize)?;
        (self.place, self.left_in_small) = (0, self.small);
        Some(())
    }

    /// The bytes after all numbers.
    fn rest(&self) -> Option<Bytes> {
        let mut at = self.clone();
        let mut left = at.left.saturating_sub(1);
        while left > 0 {
            at.next_small()?;
            left = left.saturating_sub(at.small as u64);
        }
        Some(at.bytes)
    }
}

/// The values of a page.
#[derive(Clone, Debug)]
pub(super) enum Values {
    Plain(Bytes, Physical),
    Bools(Hybrid),
    Dictionary(Hybrid, Rc<Vec<ParquetValue>>),
    Delta(Delta, Physical),
    Lengths(Delta, Bytes),
    /// Lengths of what is taken from the last value, and of what is new; the new bytes; the last value.
    Prefixes(Delta, Delta, Bytes, Vec<u8>),
    /// The first bytes of all values, then the second ones, and so on; and the number of the next value.
    Split(Bytes, Physical, usize),
}

/// The longest value: a row may have no more bytes.
const MAX_VALUE_BYTES: usize = crate::file::MAX_ROW_BYTES as usize;

impl Values {
    /// From the number of their encoding. None if they are malformed, or not encoded in a way that such values can be.
    pub(super) fn new(
        encoding: i64,
        mut bytes: Bytes,
        physical: Physical,
        dictionary: Option<&Rc<Vec<ParquetValue>>>,
    ) -> Option<Self> {
        Some(match (encoding, physical) {
            (0, Physical::Bool) => Self::Bools(Hybrid::packed(bytes)),
            (0, _) => Self::Plain(bytes, physical),
            (2 | 8, _) => {
                let width = u32::from(take(&mut bytes, 1)?[0]);
                Self::Dictionary(Hybrid::new(bytes, width)?, Rc::clone(dictionary?))
            }
            (3, Physical::Bool) => {
                let size = take_u32(&mut bytes)?;
                Self::Bools(Hybrid::new(take(&mut bytes, size)?, 1)?)
            }
            (5, Physical::Int32 | Physical::Int64) => Self::Delta(Delta::new(bytes)?, physical),
            (6, Physical::Bytes) => {
                let lengths = Delta::new(bytes)?;
                let bytes = lengths.rest()?;
                Self::Lengths(lengths, bytes)
            }
            (7, Physical::Bytes) => {
                let prefixes = Delta::new(bytes)?;
                let lengths = Delta::new(prefixes.rest()?)?;
                let bytes = lengths.rest()?;
                Self::Prefixes(prefixes, lengths, bytes, Vec::new())
            }
            (9, _) if physical.size().is_some() => Self::Split(bytes, physical, 0),
            _ => return None,
        })
    }

    pub(super) fn next(&mut self) -> Option<ParquetValue> {
        Some(match self {
            Self::Plain(bytes, physical) => plain(bytes, *physical)?,
            Self::Bools(bits) => ParquetValue::Bool(bits.next()? != 0),
            Self::Dictionary(indices, values) => values.get(indices.next()? as usize)?.clone(),
            Self::Delta(numbers, Physical::Int32) => {
                ParquetValue::Int(i64::from(numbers.next()? as i32))
            }
            Self::Delta(numbers, _) => ParquetValue::Int(numbers.next()?),
            Self::Lengths(lengths, bytes) => {
                let length = usize::try_from(lengths.next()?).ok()?;
                ParquetValue::Bytes(take(bytes, length)?)
            }
            Self::Prefixes(prefixes, lengths, bytes, last) => {
                let kept = usize::try_from(prefixes.next()?).ok()?;
                let new = take(bytes, usize::try_from(lengths.next()?).ok()?)?;
                if kept > last.len() || kept + new.len() > MAX_VALUE_BYTES {
                    return None;
                }
                last.truncate(kept);
                last.extend_from_slice(&new);
                ParquetValue::Bytes(Bytes::copy_from_slice(last))
            }
            Self::Split(bytes, physical, index) => {
                let size = physical.size()?;
                let n = bytes.len() / size;
                let byte = |part| bytes.get(part * n + *index).filter(|_| *index < n);
                let whole: Option<Vec<u8>> = (0..size).map(|part| byte(part).copied()).collect();
                *index += 1;
                plain(&mut whole?.into(), *physical)?
            }
        })
    }
}

/// The next of values that stand one after another.
pub(super) fn plain(bytes: &mut Bytes, physical: Physical) -> Option<ParquetValue> {
    Some(match physical {
        Physical::Bool => return None,
        Physical::Int32 => ParquetValue::Int(i64::from(i32::from_le_bytes(array(bytes)?))),
        Physical::Int64 => ParquetValue::Int(i64::from_le_bytes(array(bytes)?)),
        Physical::Float => ParquetValue::Float(f32::from_le_bytes(array(bytes)?)),
        Physical::Double => ParquetValue::Double(f64::from_le_bytes(array(bytes)?)),
        Physical::Bytes => {
            let length = take_u32(bytes)?;
            ParquetValue::Bytes(take(bytes, length)?)
        }
    })
}

fn array<const N: usize>(bytes: &mut Bytes) -> Option<[u8; N]> {
    take(bytes, N)?.as_ref().try_into().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn all(mut values: Values) -> Vec<ParquetValue> {
        std::iter::from_fn(|| values.next()).collect()
    }

    fn values(encoding: i64, bytes: &[u8], physical: Physical) -> Option<Vec<ParquetValue>> {
        let dictionary = Rc::new(vec![ParquetValue::Int(7), ParquetValue::Int(9)]);
        let bytes = Bytes::copy_from_slice(bytes);
        Values::new(encoding, bytes, physical, Some(&dictionary)).map(all)
    }

    fn ints(numbers: &[i64]) -> Option<Vec<ParquetValue>> {
        Some(
            numbers
                .iter()
                .map(|&number| ParquetValue::Int(number))
                .collect(),
        )
    }

    fn texts(texts: &[&'static str]) -> Option<Vec<ParquetValue>> {
        Some(
            texts
                .iter()
                .map(|text| ParquetValue::Bytes(Bytes::from(*text)))
                .collect(),
        )
    }

    #[test]
    fn the_example_of_the_specification_is_unpacked() {
        // The numbers 0 to 7 in three bits each.
        let mut numbers = Hybrid::new(Bytes::from_static(&[3, 0x88, 0xC6, 0xFA]), 3).unwrap();
        let found: Vec<u32> = std::iter::from_fn(|| numbers.next()).collect();
        assert_eq!(found, [0, 1, 2, 3, 4, 5, 6, 7]);
    }

    #[test]
    fn dictionaries_and_bits_are_read_from_runs() {
        // Three times the second value, then eight bits.
        let expected = ints(&[9, 9, 9, 7, 9, 7, 7, 7, 7, 7, 7]);
        assert_eq!(values(8, &[1, 6, 1, 3, 0b10], Physical::Int64), expected);
        assert_eq!(values(2, &[0, 4], Physical::Int64), ints(&[7, 7]));
        assert_eq!(values(8, &[2, 4, 3], Physical::Int64), ints(&[]));
        assert_eq!(values(8, &[33, 2, 0], Physical::Int64), None);
        let bits = [true, false, true].map(ParquetValue::Bool);
        assert_eq!(values(0, &[0b101], Physical::Bool).unwrap()[..3], bits);
        assert_eq!(
            values(3, &[2, 0, 0, 0, 6, 1], Physical::Bool).unwrap(),
            [true; 3].map(ParquetValue::Bool)
        );
    }

    #[test]
    fn differences_are_added() {
        // 7, 5, 3, 1, 2, 3, 4, 5: the example of the specification, in blocks of 32 numbers.
        let mut bytes = vec![0x80, 1, 4, 8, 14, 3, 2, 0, 0, 0, 0xC0, 0x3F];
        bytes.extend([0; 6]);
        assert_eq!(
            values(5, &bytes, Physical::Int32),
            ints(&[7, 5, 3, 1, 2, 3, 4, 5])
        );
        assert_eq!(values(5, &[0x80, 1, 4, 1, 3], Physical::Int64), ints(&[-2]));
        // A block of 2⁶³ numbers, and numbers of 65 bits.
        assert_eq!(
            values(
                5,
                &[
                    0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F, 1, 1, 0
                ],
                Physical::Int64
            ),
            None
        );
        assert_eq!(
            values(5, &[0x80, 1, 4, 2, 0, 0, 65, 0, 0, 0], Physical::Int64),
            ints(&[0])
        );
    }

    #[test]
    fn texts_are_cut_by_lengths_and_continued_from_prefixes() {
        let constant = |n: u8, value: u8| [0x80, 1, 4, n, value, 0, 0, 0, 0, 0];
        let lengths = constant(2, 4);
        let bytes = [&lengths[..], b"abcd"].concat();
        assert_eq!(values(6, &bytes, Physical::Bytes), texts(&["ab", "cd"]));
        assert_eq!(values(6, &bytes[..13], Physical::Bytes), texts(&["ab"]));
        // The second has one byte of the first.
        let prefixes = [0x80, 1, 4, 2, 0, 2, 0, 0, 0, 0];
        let bytes = [&prefixes[..], &lengths, b"abcd"].concat();
        assert_eq!(values(7, &bytes, Physical::Bytes), texts(&["ab", "acd"]));
        let bytes = [&constant(1, 2)[..5], &lengths, b"abcd"].concat();
        assert_eq!(values(7, &bytes, Physical::Bytes), texts(&[]));
    }

    #[test]
    fn split_bytes_are_put_together() {
        let [a, b] = [1.5_f32, -2.0].map(f32::to_le_bytes);
        let bytes: Vec<u8> = (0..4).flat_map(|i| [a[i], b[i]]).collect();
        let expected = [1.5, -2.0].map(ParquetValue::Float);
        assert_eq!(values(9, &bytes, Physical::Float).unwrap(), expected);
        assert_eq!(values(9, &bytes, Physical::Bytes), None);
        assert_eq!(values(4, &bytes, Physical::Int32), None);
    }
}
