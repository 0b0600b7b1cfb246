//! [`Lanes`] on x86: AVX-512, of values or of pairs of bf16, and AVX2 with FMA.

#![expect(
    unsafe_code,
    reason = "vector instructions on pointers; the callers in this folder check sizes and features"
)]

use std::arch::x86_64::*;

use super::lanes::{Lanes, MAX_ROWS};

/// Sixteen values, or words of two where `DEPTH` is 2.
#[derive(Clone, Copy)]
pub(super) struct Avx512Lanes<const DEPTH: usize>(__m512);

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
impl<const DEPTH: usize> Lanes for Avx512Lanes<DEPTH> {
    const LEN: usize = 16;
    const DEPTH: usize = DEPTH;
    type Words = Avx512Lanes<1>;
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
pub(super) struct Avx2Lanes(__m256);

/// All bits set in the first `len` lanes.
#[inline(always)]
unsafe fn lanes(len: usize) -> __m256i {
    const BITS: [i32; 16] = [-1, -1, -1, -1, -1, -1, -1, -1, 0, 0, 0, 0, 0, 0, 0, 0];
    // SAFETY: len ≤ 8, so eight values from there exist; the caller checked for avx2.
    unsafe { _mm256_loadu_si256(BITS.as_ptr().add(8 - len).cast()) }
}

// SAFETY (all below): the caller's promises about pointers; the caller checked for avx2 and fma.
impl Lanes for Avx2Lanes {
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
