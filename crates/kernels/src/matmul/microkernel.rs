//! The innermost part of every product: a few rows of the output, a few vectors wide, held in registers.
//!
//! `tile` sums `a(i, p) · b(p, j)` over `p` with one multiplication and addition after another, fused where the CPU can, so
//! an element's value depends on its own row and column alone: not on the tile it falls into, on the rows beside it, or on
//! the width of fused vectors.
//!
//! Operands are words of 32 bits: a value each, or two in bf16 that follow one another in the sum, where the CPU has an
//! instruction that multiplies pairs and adds both products.

#![expect(
    unsafe_code,
    reason = "vector instructions on pointers; the callers in this folder check sizes and features"
)]

use std::hint::black_box;

/// A vector of f32 values in a register, or of words of an operand.
pub(super) trait Lanes: Copy {
    /// Values in it.
    const LEN: usize;
    /// Values in a word of an operand.
    const DEPTH: usize = 1;
    /// The same instructions for what is words already.
    type Words: Lanes;
    /// Rows of the largest tile: its sums, one row of b and a value of a fill the registers.
    const ROWS: usize;

    unsafe fn splat(value: f32) -> Self;
    /// # Safety
    /// `LEN` values can be read.
    unsafe fn load(from: *const f32) -> Self;
    /// # Safety
    /// `LEN` values can be written.
    unsafe fn store(self, to: *mut f32);
    /// The first `len ≤ LEN` values, zeros behind them.
    ///
    /// # Safety
    /// `len` values can be read.
    unsafe fn load_first(from: *const f32, len: usize) -> Self;
    /// # Safety
    /// `len` values can be written.
    unsafe fn store_first(self, to: *mut f32, len: usize);
    /// `self · a + b`.
    unsafe fn mul_add(self, a: Self, b: Self) -> Self;
    /// Adds the products of words of both operands to a sum.
    #[inline(always)]
    unsafe fn add_products(self, a: Self, b: Self) -> Self {
        // SAFETY: the caller's promise.
        unsafe { a.mul_add(b, self) }
    }
    /// The words of the first `len ≤ DEPTH · LEN` values along a line, zeros behind them.
    ///
    /// # Safety
    /// `len` values can be read.
    #[inline(always)]
    unsafe fn along(from: *const f32, len: usize) -> Self {
        // SAFETY: the caller's promise.
        unsafe {
            match len {
                len if len >= Self::LEN => Self::load(from),
                _ => Self::load_first(from, len),
            }
        }
    }
    /// The words across `depth ≤ DEPTH` lines that lie `stride` apart, of the first `len ≤ LEN` values of each.
    ///
    /// # Safety
    /// The values can be read.
    #[inline(always)]
    unsafe fn across(from: *const f32, stride: usize, depth: usize, len: usize) -> Self {
        let _ = (stride, depth);
        // SAFETY: the caller's promise.
        unsafe { Self::along(from, len) }
    }
    /// Turns `rows ≤ LEN` rows of `cols ≤ LEN` values into `cols` rows of `LEN`, zeros at their ends.
    ///
    /// # Safety
    /// The rows, `stride` and `to_stride` apart, can be read and written.
    unsafe fn transpose(
        from: *const f32,
        stride: usize,
        size: [usize; 2],
        to: *mut f32,
        to_stride: usize,
    );
}

/// Rows of the largest tile of all vectors, and columns of the widest panel.
pub(super) const MAX_ROWS: usize = 6;
pub(super) const WIDEST: usize = 64;

/// Where a tile goes: `scale · sum`, added to what is there or in its place.
#[derive(Clone, Copy)]
pub(super) struct Out {
    pub(super) ptr: *mut f32,
    pub(super) stride: usize,
    /// Columns that exist; the panel may be wider.
    pub(super) cols: usize,
    pub(super) scale: f32,
    pub(super) add: bool,
}

/// Rows of the left operand: word `p` of row `i` is at `ptr + i · stride + p`.
#[derive(Clone, Copy)]
pub(super) struct Left {
    pub(super) ptr: *const f32,
    pub(super) stride: usize,
}

/// Columns of the right operand as wide as a tile: row `p` is at `ptr + p · stride`.
#[derive(Clone, Copy)]
pub(super) struct Panel {
    pub(super) ptr: *const f32,
    pub(super) stride: usize,
}

/// One tile of `rows ≤ ROWS` rows and `NV` vectors, summed over `len` rows of a panel of words.
///
/// # Safety
/// The operands cover the tile, the panel has `len` rows of `NV · LEN` values, and the CPU has the instructions of `V`.
#[inline(always)]
pub(super) unsafe fn tile<V: Lanes, const NV: usize>(
    rows: usize,
    len: usize,
    left: Left,
    panel: Panel,
    out: Out,
) {
    // SAFETY: the caller's promise, handed on.
    unsafe {
        match rows {
            1 => sums::<V, 1, NV>(len, left, panel, out),
            2 => sums::<V, 2, NV>(len, left, panel, out),
            3 => sums::<V, 3, NV>(len, left, panel, out),
            4 => sums::<V, 4, NV>(len, left, panel, out),
            5 => sums::<V, 5, NV>(len, left, panel, out),
            6 => sums::<V, 6, NV>(len, left, panel, out),
            _ => unreachable!("tiles have at most six rows"),
        }
    }
}

/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn sums<V: Lanes, const MR: usize, const NV: usize>(
    len: usize,
    left: Left,
    panel: Panel,
    out: Out,
) {
    // SAFETY: row i < MR and p < len lie inside the operands, and stores end at `out.cols`.
    unsafe {
        // Hides that the rows are equally far apart. The compiler would make each address out of the one before, for every
        // value: a chain of additions as long as the multiplications beside it.
        let rows: [_; MR] =
            std::array::from_fn(|i| black_box(left.ptr.wrapping_add(i * left.stride)));
        let mut sums = [[V::splat(0.0); NV]; MR];
        for p in 0..len {
            let mut b = [V::splat(0.0); NV];
            for (j, b) in b.iter_mut().enumerate() {
                *b = V::load(panel.ptr.add(p * panel.stride + j * V::LEN));
            }
            for (i, sums) in sums.iter_mut().enumerate() {
                let value = V::splat(*rows[i].add(p));
                for (sum, b) in sums.iter_mut().zip(b) {
                    *sum = sum.add_products(value, b);
                }
            }
        }
        // Both loops are short enough to be unrolled, so that the sums never leave the registers.
        let scale = V::splat(out.scale);
        let whole = out.cols == NV * V::LEN;
        if whole && out.add {
            for (i, sums) in sums.iter().enumerate() {
                for (j, sum) in sums.iter().enumerate() {
                    let to = out.ptr.add(i * out.stride + j * V::LEN);
                    sum.mul_add(scale, V::load(to)).store(to);
                }
            }
        } else if whole {
            for (i, sums) in sums.iter().enumerate() {
                for (j, sum) in sums.iter().enumerate() {
                    let to = out.ptr.add(i * out.stride + j * V::LEN);
                    sum.mul_add(scale, V::splat(0.0)).store(to);
                }
            }
        } else {
            let mut rows = [0.0; MAX_ROWS * WIDEST];
            for (i, sums) in sums.iter().enumerate() {
                for (j, sum) in sums.iter().enumerate() {
                    sum.store(rows.as_mut_ptr().add((i * NV + j) * V::LEN));
                }
            }
            for (i, row) in rows.chunks_exact(NV * V::LEN).enumerate().take(MR) {
                edge::<V>(row, out.ptr.add(i * out.stride), out);
            }
        }
    }
}

/// Writes a row of sums of which only the first `out.cols` exist.
///
/// # Safety
/// As [`tile`].
#[inline(always)]
unsafe fn edge<V: Lanes>(sums: &[f32], to: *mut f32, out: Out) {
    let (scale, zero) = (unsafe { V::splat(out.scale) }, unsafe { V::splat(0.0) });
    for (at, sums) in (0..out.cols).step_by(V::LEN).zip(sums.chunks_exact(V::LEN)) {
        let len = V::LEN.min(out.cols - at);
        // SAFETY: the first `cols` columns exist.
        unsafe {
            let to = to.add(at);
            let before = if out.add {
                V::load_first(to, len)
            } else {
                zero
            };
            let sum = V::load(sums.as_ptr());
            sum.mul_add(scale, before).store_first(to, len);
        }
    }
}

/// Four values that the compiler turns into whatever the target has: NEON and SSE have four. With NEON the 24 sums of a tile,
/// a row of b and the values stay in its 32 registers, and nothing is left to be written by hand.
#[derive(Clone, Copy)]
pub(super) struct PortableLanes([f32; 4]);

impl Lanes for PortableLanes {
    const LEN: usize = 4;
    const ROWS: usize = 6;
    type Words = Self;

    #[inline(always)]
    unsafe fn splat(value: f32) -> Self {
        Self([value; 4])
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> Self {
        // SAFETY: the caller's promise.
        unsafe { Self(from.cast::<[f32; 4]>().read_unaligned()) }
    }

    #[inline(always)]
    unsafe fn store(self, to: *mut f32) {
        // SAFETY: the caller's promise.
        unsafe { to.cast::<[f32; 4]>().write_unaligned(self.0) }
    }

    #[inline(always)]
    unsafe fn load_first(from: *const f32, len: usize) -> Self {
        let mut values = [0.0; 4];
        for (i, value) in values.iter_mut().enumerate().take(len) {
            // SAFETY: the caller's promise.
            *value = unsafe { *from.add(i) };
        }
        Self(values)
    }

    #[inline(always)]
    unsafe fn store_first(self, to: *mut f32, len: usize) {
        for (i, value) in self.0.iter().enumerate().take(len) {
            // SAFETY: the caller's promise.
            unsafe { *to.add(i) = *value };
        }
    }

    #[inline(always)]
    unsafe fn mul_add(self, a: Self, b: Self) -> Self {
        let mut sums = b.0;
        for (sum, (x, a)) in sums.iter_mut().zip(self.0.iter().zip(a.0)) {
            // Without the instruction, `mul_add` is a slow library call.
            *sum = if cfg!(target_arch = "aarch64") {
                x.mul_add(a, *sum)
            } else {
                x * a + *sum
            };
        }
        Self(sums)
    }

    #[inline(always)]
    unsafe fn transpose(
        from: *const f32,
        stride: usize,
        [rows, cols]: [usize; 2],
        to: *mut f32,
        to_stride: usize,
    ) {
        let mut values = [[0.0; 4]; 4];
        // SAFETY (all below): the caller's promise. Loops of constant length stay in registers.
        if [rows, cols] == [4; 2] {
            for (i, row) in values.iter_mut().enumerate() {
                *row = unsafe { Self::load(from.add(i * stride)).0 };
            }
        } else {
            for (i, row) in values.iter_mut().enumerate().take(rows) {
                *row = unsafe { Self::load_first(from.add(i * stride), cols).0 };
            }
        }
        let columns: [_; 4] = std::array::from_fn(|j| Self(values.map(|row| row[j])));
        for (j, column) in columns.iter().enumerate().take(cols) {
            unsafe { column.store(to.add(j * to_stride)) };
        }
    }
}

#[cfg(target_arch = "x86_64")]
pub(super) use self::x86::{Avx2, Avx512};

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::*;

    use super::{Lanes, MAX_ROWS};

    /// Sixteen values, or words of two where `DEPTH` is 2.
    #[derive(Clone, Copy)]
    pub(in crate::matmul) struct Avx512<const DEPTH: usize>(__m512);

    /// For two vectors of pairs: the places of the first's values, each followed by that of the second's.
    static BY_TURNS: [u16; 32] = {
        let mut places = [0; 32];
        let mut i = 0;
        while i < 32 {
            places[i] = (i / 2 + i % 2 * 16) as u16;
            i += 1;
        }
        places
    };

    /// Words as pairs of bf16.
    #[inline(always)]
    fn pairs(words: __m512) -> __m512bh {
        // SAFETY: the same 512 bits.
        unsafe { std::mem::transmute(words) }
    }

    #[inline(always)]
    fn words(pairs: __m512bh) -> __m512 {
        // SAFETY: the same 512 bits.
        unsafe { std::mem::transmute(pairs) }
    }

    /// The first values, sixteen at most, zeros behind them.
    #[inline(always)]
    unsafe fn up_to(from: *const f32, len: usize) -> __m512 {
        // SAFETY: the caller's promise.
        unsafe {
            match len {
                16.. => _mm512_loadu_ps(from),
                _ => _mm512_maskz_loadu_ps(mask(len), from),
            }
        }
    }

    /// The first `len` lanes.
    #[inline(always)]
    fn mask(len: usize) -> __mmask16 {
        ((1u32 << len) - 1) as __mmask16
    }

    // SAFETY (all below): the caller's promises about pointers; the caller checked for avx512f, and for avx512bw and
    // avx512bf16 where words are pairs.
    impl<const DEPTH: usize> Lanes for Avx512<DEPTH> {
        const LEN: usize = 16;
        const DEPTH: usize = DEPTH;
        type Words = Avx512<1>;
        const ROWS: usize = MAX_ROWS;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { Self(_mm512_set1_ps(value)) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { Self(_mm512_loadu_ps(from)) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm512_storeu_ps(to, self.0) }
        }

        #[inline(always)]
        unsafe fn load_first(from: *const f32, len: usize) -> Self {
            unsafe { Self(_mm512_maskz_loadu_ps(mask(len), from)) }
        }

        #[inline(always)]
        unsafe fn store_first(self, to: *mut f32, len: usize) {
            unsafe { _mm512_mask_storeu_ps(to, mask(len), self.0) }
        }

        #[inline(always)]
        unsafe fn mul_add(self, a: Self, b: Self) -> Self {
            unsafe { Self(_mm512_fmadd_ps(self.0, a.0, b.0)) }
        }

        #[inline(always)]
        unsafe fn add_products(self, a: Self, b: Self) -> Self {
            unsafe {
                match DEPTH {
                    1 => Self(_mm512_fmadd_ps(a.0, b.0, self.0)),
                    _ => Self(_mm512_dpbf16_ps(self.0, pairs(a.0), pairs(b.0))),
                }
            }
        }

        #[inline(always)]
        unsafe fn along(from: *const f32, len: usize) -> Self {
            unsafe {
                let first = up_to(from, len);
                match DEPTH {
                    1 => Self(first),
                    _ => {
                        let second = up_to(from.wrapping_add(16), len.saturating_sub(16));
                        Self(words(_mm512_cvtne2ps_pbh(second, first)))
                    }
                }
            }
        }

        #[inline(always)]
        unsafe fn across(from: *const f32, stride: usize, depth: usize, len: usize) -> Self {
            unsafe {
                let first = up_to(from, len);
                match DEPTH {
                    1 => Self(first),
                    _ => {
                        let len = if depth > 1 { len } else { 0 };
                        let second = up_to(from.wrapping_add(stride), len);
                        let both = words(_mm512_cvtne2ps_pbh(second, first));
                        let places = _mm512_loadu_si512(BY_TURNS.as_ptr().cast());
                        let both = _mm512_permutexvar_epi16(places, _mm512_castps_si512(both));
                        Self(_mm512_castsi512_ps(both))
                    }
                }
            }
        }

        /// Pairs, fours, then the four quarters of a register: 64 shuffles for 256 values.
        #[inline(always)]
        unsafe fn transpose(
            from: *const f32,
            stride: usize,
            [rows, cols]: [usize; 2],
            to: *mut f32,
            to_stride: usize,
        ) {
            unsafe {
                let zero = _mm512_setzero_ps();
                let (mut a, mut b) = ([zero; 16], [zero; 16]);
                // Loops of constant length stay in registers.
                if rows == 16 && cols == 16 {
                    for (i, row) in a.iter_mut().enumerate() {
                        *row = Self::load(from.add(i * stride)).0;
                    }
                } else {
                    for (i, row) in a.iter_mut().enumerate() {
                        let from = from.wrapping_add(i * stride);
                        *row = Self::load_first(from, if i < rows { cols } else { 0 }).0;
                    }
                }
                for i in 0..8 {
                    b[2 * i] = _mm512_unpacklo_ps(a[2 * i], a[2 * i + 1]);
                    b[2 * i + 1] = _mm512_unpackhi_ps(a[2 * i], a[2 * i + 1]);
                }
                let low = |x, y| {
                    _mm512_castpd_ps(_mm512_unpacklo_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)))
                };
                let high = |x, y| {
                    _mm512_castpd_ps(_mm512_unpackhi_pd(_mm512_castps_pd(x), _mm512_castps_pd(y)))
                };
                for i in (0..16).step_by(4) {
                    a[i] = low(b[i], b[i + 2]);
                    a[i + 1] = high(b[i], b[i + 2]);
                    a[i + 2] = low(b[i + 1], b[i + 3]);
                    a[i + 3] = high(b[i + 1], b[i + 3]);
                }
                for c in 0..4 {
                    b[c] = _mm512_shuffle_f32x4::<0x88>(a[c], a[4 + c]);
                    b[4 + c] = _mm512_shuffle_f32x4::<0xdd>(a[c], a[4 + c]);
                    b[8 + c] = _mm512_shuffle_f32x4::<0x88>(a[8 + c], a[12 + c]);
                    b[12 + c] = _mm512_shuffle_f32x4::<0xdd>(a[8 + c], a[12 + c]);
                }
                for c in 0..4 {
                    a[c] = _mm512_shuffle_f32x4::<0x88>(b[c], b[8 + c]);
                    a[4 + c] = _mm512_shuffle_f32x4::<0x88>(b[4 + c], b[12 + c]);
                    a[8 + c] = _mm512_shuffle_f32x4::<0xdd>(b[c], b[8 + c]);
                    a[12 + c] = _mm512_shuffle_f32x4::<0xdd>(b[4 + c], b[12 + c]);
                }
                for (j, column) in a.iter().enumerate() {
                    if j < cols {
                        _mm512_storeu_ps(to.add(j * to_stride), *column);
                    }
                }
            }
        }
    }

    /// Eight values.
    #[derive(Clone, Copy)]
    pub(in crate::matmul) struct Avx2(__m256);

    /// All bits set in the first `len` lanes.
    #[inline(always)]
    unsafe fn lanes(len: usize) -> __m256i {
        const BITS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
        // SAFETY: len ≤ 8, so eight values from there exist; the caller checked for avx2.
        unsafe { _mm256_loadu_si256(BITS.as_ptr().add(8 - len).cast()) }
    }

    // SAFETY (all below): the caller's promises about pointers; the caller checked for avx2 and fma.
    impl Lanes for Avx2 {
        const LEN: usize = 8;
        const ROWS: usize = 6;
        type Words = Self;

        #[inline(always)]
        unsafe fn splat(value: f32) -> Self {
            unsafe { Self(_mm256_set1_ps(value)) }
        }

        #[inline(always)]
        unsafe fn load(from: *const f32) -> Self {
            unsafe { Self(_mm256_loadu_ps(from)) }
        }

        #[inline(always)]
        unsafe fn store(self, to: *mut f32) {
            unsafe { _mm256_storeu_ps(to, self.0) }
        }

        #[inline(always)]
        unsafe fn load_first(from: *const f32, len: usize) -> Self {
            unsafe { Self(_mm256_maskload_ps(from, lanes(len))) }
        }

        #[inline(always)]
        unsafe fn store_first(self, to: *mut f32, len: usize) {
            unsafe { _mm256_maskstore_ps(to, lanes(len), self.0) }
        }

        #[inline(always)]
        unsafe fn mul_add(self, a: Self, b: Self) -> Self {
            unsafe { Self(_mm256_fmadd_ps(self.0, a.0, b.0)) }
        }

        #[inline(always)]
        unsafe fn transpose(
            from: *const f32,
            stride: usize,
            [rows, cols]: [usize; 2],
            to: *mut f32,
            to_stride: usize,
        ) {
            unsafe {
                let zero = _mm256_setzero_ps();
                let (mut a, mut b) = ([zero; 8], [zero; 8]);
                // Loops of constant length stay in registers.
                for (i, row) in a.iter_mut().enumerate() {
                    let from = from.wrapping_add(i * stride);
                    *row = Self::load_first(from, if i < rows { cols } else { 0 }).0;
                }
                for i in 0..4 {
                    b[2 * i] = _mm256_unpacklo_ps(a[2 * i], a[2 * i + 1]);
                    b[2 * i + 1] = _mm256_unpackhi_ps(a[2 * i], a[2 * i + 1]);
                }
                for i in (0..8).step_by(4) {
                    a[i] = _mm256_shuffle_ps::<0x44>(b[i], b[i + 2]);
                    a[i + 1] = _mm256_shuffle_ps::<0xee>(b[i], b[i + 2]);
                    a[i + 2] = _mm256_shuffle_ps::<0x44>(b[i + 1], b[i + 3]);
                    a[i + 3] = _mm256_shuffle_ps::<0xee>(b[i + 1], b[i + 3]);
                }
                for c in 0..4 {
                    b[c] = _mm256_permute2f128_ps::<0x20>(a[c], a[4 + c]);
                    b[4 + c] = _mm256_permute2f128_ps::<0x31>(a[c], a[4 + c]);
                }
                for (j, column) in b.iter().enumerate() {
                    if j < cols {
                        _mm256_storeu_ps(to.add(j * to_stride), *column);
                    }
                }
            }
        }
    }
}
