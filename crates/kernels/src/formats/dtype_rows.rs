//! Rows of stored numbers: their bytes, their values, and the product of a row with a vector.

use half::f16;

use super::fp8::e4m3_to_f32;
use crate::simd::multiversion;

/// How the numbers of a row are stored.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum RowDtype {
    F32,
    F16,
    Bf16,
    /// Blocks of a bf16 scale and 32 signed bytes. The last block of a row is padded with zeros.
    Q8Bf16,
}

impl RowDtype {
    /// Bytes of a row of `width` numbers. Blocks do not cross rows.
    pub(crate) fn row_bytes(self, width: usize) -> usize {
        match self {
            Self::F32 => 4 * width,
            Self::F16 | Self::Bf16 => 2 * width,
            Self::Q8Bf16 => width.div_ceil(Q8_BLOCK) * Q8_BLOCK_BYTES,
        }
    }
}

/// Numbers and bytes of a [`RowDtype::Q8Bf16`] block.
pub(crate) const Q8_BLOCK: usize = 32;
pub(crate) const Q8_BLOCK_BYTES: usize = 2 + Q8_BLOCK;

/// Rows of numbers, `stride` bytes apart.
#[derive(Clone, Copy, Debug)]
pub(crate) struct DtypeRows<'a> {
    pub(crate) dtype: RowDtype,
    pub(crate) bytes: &'a [u8],
    pub(crate) stride: usize,
    pub(crate) rows: usize,
    /// Numbers of a row.
    pub(crate) width: usize,
}

impl DtypeRows<'_> {
    /// # Panics
    /// If the rows leave their bytes.
    pub(crate) fn check(&self) {
        let last = self.rows.saturating_sub(1) * self.stride;
        assert!(
            self.rows == 0 || last + self.row_bytes() <= self.bytes.len(),
            "rows of numbers"
        );
    }

    pub(crate) fn row_bytes(&self) -> usize {
        self.dtype.row_bytes(self.width)
    }

    pub(crate) fn row(&self, row: usize) -> *const u8 {
        self.bytes[row * self.stride..].as_ptr()
    }
}

fn f32_at(bytes: &[u8]) -> f32 {
    f32::from_le_bytes([bytes[0], bytes[1], bytes[2], bytes[3]])
}

fn bf16_at(bytes: &[u8]) -> f32 {
    f32::from_bits(u32::from(u16::from_le_bytes([bytes[0], bytes[1]])) << 16)
}

fn f16_at(bytes: &[u8]) -> f32 {
    f16::from_le_bytes([bytes[0], bytes[1]]).to_f32()
}

/// Independent partial sums of a dot product: enough to hide the latency of an addition.
const DOT_LANES: usize = 32;

/// Sums `value(chunk) × x` over chunks of `SIZE` bytes, in a fixed order of lanes.
#[inline(always)]
fn dot_with<const SIZE: usize, const FMA: bool>(
    bytes: &[u8],
    x: &[f32],
    value: impl Fn(&[u8]) -> f32,
) -> f32 {
    let mut lanes = [0f32; DOT_LANES];
    let (mut codes, mut xs) = (
        bytes.chunks_exact(SIZE * DOT_LANES),
        x.chunks_exact(DOT_LANES),
    );
    for (codes, xs) in codes.by_ref().zip(xs.by_ref()) {
        for (lane, (code, x)) in lanes.iter_mut().zip(codes.chunks_exact(SIZE).zip(xs)) {
            *lane = if FMA {
                value(code).mul_add(*x, *lane)
            } else {
                value(code) * x + *lane
            };
        }
    }
    let rest = codes.remainder().chunks_exact(SIZE).zip(xs.remainder());
    for (lane, (code, x)) in lanes.iter_mut().zip(rest) {
        *lane = if FMA {
            value(code).mul_add(*x, *lane)
        } else {
            value(code) * x + *lane
        };
    }
    lanes.iter().sum()
}

multiversion! {
    /// The product of a row of such numbers with a vector.
    fn dot_f32<FMA>(bytes: &[u8], x: &[f32]) -> f32 { dot_with::<4, FMA>(bytes, x, f32_at) }
}
multiversion! {
    /// The product of a row of such numbers with a vector.
    fn dot_f16<FMA>(bytes: &[u8], x: &[f32]) -> f32 { dot_with::<2, FMA>(bytes, x, f16_at) }
}
multiversion! {
    /// The product of a row of such numbers with a vector.
    fn dot_bf16<FMA>(bytes: &[u8], x: &[f32]) -> f32 { dot_with::<2, FMA>(bytes, x, bf16_at) }
}
multiversion! {
    /// The product of a row of such numbers with a vector.
    fn dot_e4m3<FMA>(bytes: &[u8], x: &[f32]) -> f32 { dot_with::<1, FMA>(bytes, x, |code| e4m3_to_f32(code[0])) }
}
multiversion! {
    /// The values of a row of such numbers.
    fn decode_bf16<FMA>(bytes: &[u8], out: &mut [f32]) {
        for (code, value) in bytes.chunks_exact(2).zip(out) { *value = bf16_at(code); }
    }
}
multiversion! {
    /// The values of a row of such numbers.
    fn decode_f32<FMA>(bytes: &[u8], out: &mut [f32]) {
        for (code, value) in bytes.chunks_exact(4).zip(out) { *value = f32_at(code); }
    }
}
multiversion! {
    /// The values of a row of such numbers.
    fn decode_e4m3<FMA>(bytes: &[u8], out: &mut [f32], scale: f32) {
        for (code, value) in bytes.iter().zip(out) { *value = e4m3_to_f32(*code) * scale; }
    }
}

multiversion! {
    /// The product of values that fill whole lanes with a vector.
    fn dot_values<FMA>(values: &[f32], x: &[f32]) -> f32 {
        let mut lanes = [0f32; DOT_LANES];
        let add = |lane: &mut f32, value: f32, x: f32| {
            *lane = if FMA { value.mul_add(x, *lane) } else { value * x + *lane };
        };
        // Rows of blocks fill whole lanes.
        for (values, xs) in values.chunks_exact(DOT_LANES).zip(x.chunks_exact(DOT_LANES)) {
            for (lane, (value, x)) in lanes.iter_mut().zip(values.iter().zip(xs)) {
                add(lane, *value, *x);
            }
        }
        lanes.iter().sum()
    }
}
