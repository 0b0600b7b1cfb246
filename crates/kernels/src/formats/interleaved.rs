//! The interleaved layout of blocks: sixteen rows side by side, so vector instructions need not move anything between
//! lanes. llama.cpp calls making it *repack*.
//!
//! A strip is sixteen rows; the last strip is padded with zeros. A strip is made of units, each with one block of every
//! row. In a unit the fields of the blocks follow one another, and each field is cut into words: the first words of all
//! rows, then the second words, and so on. So a unit has as many bytes as its blocks, and every row can be read back.

use super::ggml::Ggml;
use crate::threads::prefetch_line;

/// Rows of a strip.
pub(crate) const ROWS: usize = 16;
/// Bytes of a line of the cache.
pub(crate) const LINE: usize = 64;
/// The fields of missing rows.
const ZEROS: [u8; 128] = [0; 128];

/// A field of a block.
#[derive(Clone, Copy, Debug)]
struct Field {
    at: usize,
    bytes: usize,
    cut: Cut,
}

/// The words that a field is cut into.
#[derive(Clone, Copy, Debug)]
enum Cut {
    Bytes,
    Twos,
    Fours,
    /// Four bytes of 32 bits, reordered so that the bits of every fourth code share a byte.
    Bits,
}

const fn field(at: usize, bytes: usize, cut: Cut) -> Field {
    Field { at, bytes, cut }
}

/// The fields of a format's blocks, in the order of a unit.
fn fields(format: Ggml) -> &'static [Field] {
    use Cut::{Bits, Bytes, Fours, Twos};
    match format {
        Ggml::F16 => unreachable!("a format without blocks has no strips"),
        Ggml::Q8_0 => const { &[field(0, 2, Twos), field(2, 32, Fours)] },
        Ggml::Q4_0 | Ggml::Iq4Nl => const { &[field(0, 2, Twos), field(2, 16, Fours)] },
        Ggml::MxFp4 => const { &[field(0, 1, Bytes), field(1, 16, Fours)] },
        Ggml::Q4_1 => const { &[field(0, 4, Twos), field(4, 16, Fours)] },
        Ggml::Q5_0 => const { &[field(0, 2, Twos), field(2, 4, Bits), field(6, 16, Fours)] },
        Ggml::Q5_1 => const { &[field(0, 4, Twos), field(4, 4, Bits), field(8, 16, Fours)] },
        Ggml::Q2K => {
            const {
                &[
                    field(80, 4, Twos),
                    field(0, 16, Bytes),
                    field(16, 64, Fours),
                ]
            }
        }
        Ggml::Q3K => {
            const {
                &[
                    field(108, 2, Twos),
                    field(96, 12, Bytes),
                    field(0, 32, Fours),
                    field(32, 64, Fours),
                ]
            }
        }
        Ggml::Q4K => {
            const {
                &[
                    field(0, 4, Twos),
                    field(4, 12, Bytes),
                    field(16, 128, Fours),
                ]
            }
        }
        Ggml::Q5K => {
            const {
                &[
                    field(0, 4, Twos),
                    field(4, 12, Bytes),
                    field(16, 32, Fours),
                    field(48, 128, Fours),
                ]
            }
        }
        Ggml::Q6K => {
            const {
                &[
                    field(208, 2, Twos),
                    field(192, 16, Bytes),
                    field(128, 64, Fours),
                    field(0, 128, Fours),
                ]
            }
        }
    }
}

/// Interleaves up to sixteen rows of blocks into a strip.
///
/// # Panics
/// If there are more than sixteen rows, or they do not fill the strip.
pub(crate) fn fill(format: Ggml, rows: &[u8], row_bytes: usize, strip: &mut [u8]) {
    let (block, n) = (format.block_bytes(), rows.len() / row_bytes.max(1));
    assert!(
        n <= ROWS && n * row_bytes == rows.len() && strip.len() == ROWS * row_bytes,
        "{n} rows of a strip"
    );
    for (i, unit) in strip.chunks_exact_mut(ROWS * block).enumerate() {
        // No CPU predicts what is read next of sixteen rows at once: mostly the next strip.
        let ahead = rows.as_ptr_range().end.addr() + i * ROWS * block;
        for line in (0..ROWS * block).step_by(LINE) {
            prefetch_line(ahead.wrapping_add(line));
        }
        let mut left = unit;
        for field in fields(format) {
            let (words, after) = left.split_at_mut(ROWS * field.bytes);
            let from = std::array::from_fn(|row| match row < n {
                true => &rows[row * row_bytes + i * block + field.at..][..field.bytes],
                false => &ZEROS[..field.bytes],
            });
            match field.cut {
                Cut::Bytes => spread::<1>(from, words, |word| word),
                Cut::Twos => spread::<2>(from, words, |word| word),
                Cut::Fours => spread::<4>(from, words, |word| word),
                Cut::Bits => spread::<4>(from, words, by_byte),
            }
            left = after;
        }
    }
}

/// Reads blocks of one row back, from `first_block` on.
///
/// # Panics
/// If the blocks leave the strip.
pub(crate) fn row_blocks(
    format: Ggml,
    strip: &[u8],
    row: usize,
    first_block: usize,
    blocks: &mut [u8],
) {
    let block = format.block_bytes();
    let units = strip.chunks_exact(ROWS * block).skip(first_block);
    assert!(
        row < ROWS && blocks.len() / block + first_block <= strip.len() / (ROWS * block),
        "blocks of a strip"
    );
    for (unit, blocks) in units.zip(blocks.chunks_exact_mut(block)) {
        let mut start = 0;
        for field in fields(format) {
            let unit = &unit[start..start + ROWS * field.bytes];
            let to = &mut blocks[field.at..field.at + field.bytes];
            match field.cut {
                Cut::Bytes => collect::<1>(unit, row, to, |word| word),
                Cut::Twos => collect::<2>(unit, row, to, |word| word),
                Cut::Fours => collect::<4>(unit, row, to, |word| word),
                Cut::Bits => collect::<4>(unit, row, to, by_code),
            }
            start += ROWS * field.bytes;
        }
    }
}

#[inline(always)]
fn spread<const N: usize>(
    from: [&[u8]; ROWS],
    words: &mut [u8],
    word: impl Fn([u8; N]) -> [u8; N],
) {
    let from = from.map(|row| row.as_chunks::<N>().0);
    let words = words.as_chunks_mut::<N>().0.chunks_exact_mut(ROWS);
    for (i, words) in words.enumerate() {
        for (to, from) in words.iter_mut().zip(&from) {
            *to = word(from[i]);
        }
    }
}

#[inline(always)]
fn collect<const N: usize>(
    unit: &[u8],
    row: usize,
    to: &mut [u8],
    word: impl Fn([u8; N]) -> [u8; N],
) {
    let rows = unit.as_chunks::<N>().0.chunks_exact(ROWS);
    for (rows, to) in rows.zip(to.as_chunks_mut::<N>().0) {
        *to = word(rows[row]);
    }
}

/// Moves bit 4c + j to 8j + c.
fn by_byte(bits: [u8; 4]) -> [u8; 4] {
    let bits = u32::from_le_bytes(bits);
    std::array::from_fn(|j| {
        // Every fourth bit; then neighbors are joined to pairs, fours, and all eight.
        let every_fourth = bits >> j & 0x1111_1111;
        let pairs = (every_fourth | every_fourth >> 3) & 0x0303_0303;
        let fours = (pairs | pairs >> 6) & 0x000F_000F;
        (fours | fours >> 12) as u8
    })
}

/// Moves bit 8j + c back to 4c + j.
fn by_code(bytes: [u8; 4]) -> [u8; 4] {
    let bit = |i: usize| u32::from(bytes[i % 4] >> (i / 4) & 1) << i;
    (0..32).fold(0, |bits, i| bits | bit(i)).to_le_bytes()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_strip_has_every_byte_of_its_rows_once() {
        let formats = Ggml::WRITTEN.into_iter().chain(Ggml::READ_ONLY);
        for format in formats.filter(|format| format.block() > 1) {
            let (block, units) = (format.block_bytes(), 3);
            let all: usize = fields(format).iter().map(|field| field.bytes).sum();
            assert_eq!(all, block, "{}", format.name());
            for n in [1, 5, 16] {
                let rows: Vec<u8> = (0..n * units * block)
                    .map(|i| (i * 61 % 253) as u8)
                    .collect();
                let mut strip = vec![0xEE; ROWS * units * block];
                fill(format, &rows, units * block, &mut strip);
                for (row, expected) in rows.chunks(units * block).enumerate() {
                    for first in 0..units {
                        let mut found = vec![0; (units - first) * block];
                        row_blocks(format, &strip, row, first, &mut found);
                        assert_eq!(found, expected[first * block..], "{}", format.name());
                    }
                }
                if n < ROWS {
                    let mut found = vec![1; units * block];
                    row_blocks(format, &strip, n, 0, &mut found);
                    assert!(found.iter().all(|byte| *byte == 0));
                }
            }
        }
    }
}
