//! The packings of Parquet's pages: Snappy, gzip, Zstandard and LZ4. A page says its unpacked size, which is the limit.

use flate2::read::MultiGzDecoder;
use ruzstd::decoding::StreamingDecoder;
use std::io::Read;

/// How a column's pages are packed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Codec {
    None,
    Snappy,
    Gzip,
    Zstd,
    Lz4,
}

impl Codec {
    /// From its number in the metadata; otherwise the name of a codec that is not read.
    pub(super) fn of(number: i64) -> Result<Self, &'static str> {
        match number {
            0 => Ok(Self::None),
            1 => Ok(Self::Snappy),
            2 => Ok(Self::Gzip),
            6 => Ok(Self::Zstd),
            7 => Ok(Self::Lz4),
            3 => Err("LZO"),
            4 => Err("Brotli"),
            5 => Err("Hadoop's LZ4"),
            _ => Err("an unknown codec"),
        }
    }

    /// Exactly `size` unpacked bytes; none if there are others.
    pub(super) fn unpack(self, packed: &[u8], size: usize) -> Option<Vec<u8>> {
        let unpacked = match self {
            Self::None => packed.to_vec(),
            Self::Snappy => snappy(packed, size)?,
            Self::Lz4 => lz4(packed, size)?,
            Self::Gzip => read(MultiGzDecoder::new(packed), size)?,
            Self::Zstd => {
                let window = (size as u64).max(1 << 10);
                read(
                    StreamingDecoder::new_with_max_window_size(packed, window).ok()?,
                    size,
                )?
            }
        };
        (unpacked.len() == size).then_some(unpacked)
    }
}

/// Unpacked bytes, one more than expected at most.
fn read(unpacking: impl Read, size: usize) -> Option<Vec<u8>> {
    let mut bytes = Vec::new();
    unpacking
        .take(size as u64 + 1)
        .read_to_end(&mut bytes)
        .ok()?;
    Some(bytes)
}

/// Appends `length` bytes from `distance` bytes before the end, which may overlap what is appended.
fn copy(unpacked: &mut Vec<u8>, distance: usize, length: usize) -> Option<()> {
    let start = unpacked.len().checked_sub(distance)?;
    if distance == 0 {
        return None;
    }
    for index in start..start + length {
        unpacked.push(unpacked[index]);
    }
    Some(())
}

/// Splits off the first `n` bytes.
fn take<'a>(bytes: &mut &'a [u8], n: usize) -> Option<&'a [u8]> {
    let (first, rest) = bytes.split_at_checked(n)?;
    *bytes = rest;
    Some(first)
}

fn number(bytes: &mut &[u8], n: usize) -> Option<usize> {
    let bytes = take(bytes, n)?;
    Some(
        bytes
            .iter()
            .rev()
            .fold(0, |value, &byte| value << 8 | usize::from(byte)),
    )
}

/// Source: google/snappy: format_description.txt.
fn snappy(packed: &[u8], size: usize) -> Option<Vec<u8>> {
    let (claimed, mut rest) = super::thrift::varint(packed)?;
    if claimed != size as u64 {
        return None;
    }
    let mut unpacked = Vec::new();
    while let Some(tag) = number(&mut rest, 1) {
        let (length, distance) = match tag & 3 {
            0 => {
                let length = match tag >> 2 {
                    short @ 0..60 => short,
                    long => number(&mut rest, long - 59)?,
                };
                let literal = take(&mut rest, length.checked_add(1)?)?;
                (unpacked.len() + literal.len() <= size)
                    .then(|| unpacked.extend_from_slice(literal))?;
                continue;
            }
            1 => ((tag >> 2 & 7) + 4, tag >> 5 << 8 | number(&mut rest, 1)?),
            2 => ((tag >> 2) + 1, number(&mut rest, 2)?),
            _ => ((tag >> 2) + 1, number(&mut rest, 4)?),
        };
        (unpacked.len() + length <= size).then(|| copy(&mut unpacked, distance, length))??;
    }
    Some(unpacked)
}

/// One block without a frame. Source: lz4/lz4: doc/lz4_Block_format.md.
fn lz4(packed: &[u8], size: usize) -> Option<Vec<u8>> {
    /// The shortest copy.
    const MIN_COPY: usize = 4;
    let (mut rest, mut unpacked) = (packed, Vec::new());
    let length = |rest: &mut &[u8], nibble: usize| {
        let mut length = nibble;
        if nibble == 15 {
            loop {
                let byte = number(rest, 1)?;
                length = length.checked_add(byte)?;
                if byte != 255 {
                    break;
                }
            }
        }
        Some(length)
    };
    loop {
        let token = number(&mut rest, 1)?;
        let literals = length(&mut rest, token >> 4)?;
        let literals = take(&mut rest, literals)?;
        (unpacked.len() + literals.len() <= size).then(|| unpacked.extend_from_slice(literals))?;
        if rest.is_empty() {
            return Some(unpacked);
        }
        let distance = number(&mut rest, 2)?;
        let length = length(&mut rest, token & 15)?.checked_add(MIN_COPY)?;
        (length <= size.checked_sub(unpacked.len())?)
            .then(|| copy(&mut unpacked, distance, length))??;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn literals_and_overlapping_copies_are_unpacked() {
        // "abc", then nine bytes from three before.
        let text = b"abcabcabcabc";
        let snappy = [12, 2 << 2, b'a', b'b', b'c', (9 - 1) << 2 | 2, 3, 0];
        let lz4 = [3 << 4 | 5, b'a', b'b', b'c', 3, 0, 0];
        for (codec, packed) in [(Codec::Snappy, &snappy[..]), (Codec::Lz4, &lz4)] {
            assert_eq!(codec.unpack(packed, 12).unwrap(), text, "{codec:?}");
            for size in [0, 11, 13] {
                assert_eq!(codec.unpack(packed, size), None);
            }
            for cut in 0..packed.len() - 1 {
                assert_eq!(codec.unpack(&packed[..cut], 12), None, "{codec:?} {cut}");
            }
        }
        assert_eq!(Codec::Snappy.unpack(&[4, 3 << 2 | 2, 1, 0], 4), None);
        assert_eq!(
            Codec::Snappy.unpack(&[4, 0, b'a', 3 << 2 | 2, 0, 0], 4),
            None
        );
        assert_eq!(Codec::None.unpack(text, 12).unwrap(), text);
    }

    #[test]
    fn bombs_are_unpacked_up_to_the_size_that_the_page_says() {
        use flate2::{Compression, write::GzEncoder};
        use std::io::Write;
        let mut bomb = GzEncoder::new(Vec::new(), Compression::best());
        bomb.write_all(&vec![0; 10 << 20]).unwrap();
        let bomb = bomb.finish().unwrap();
        assert_eq!(Codec::Gzip.unpack(&bomb, 1000), None);
        assert_eq!(Codec::Gzip.unpack(&bomb, 10 << 20).unwrap().len(), 10 << 20);
        assert_eq!(Codec::of(4), Err("Brotli"));
    }
}
