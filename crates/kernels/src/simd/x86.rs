//! [`Isa`] on x86: AVX-512 with VNNI, and AVX2 with FMA and F16C.

#![expect(
    unsafe_code,
    reason = "vector instructions on pointers; `gemv` checks sizes and features"
)]

use std::arch::x86_64::*;

use super::isa::Isa;

/// 64 codes in a register, 16 sums in another.
#[derive(Clone, Copy)]
pub(crate) struct Avx512;

/// Bytes of a line of the cache.
const LINE: usize = 64;

#[inline(always)]
fn prefetch(from: *const u8, bytes: usize) {
    for at in (0..bytes).step_by(LINE) {
        // SAFETY: a hint, which never fails.
        unsafe { _mm_prefetch::<_MM_HINT_T0>(from.wrapping_add(at).cast()) }
    }
}

// SAFETY (all below): the caller's promises about pointers; the caller checked for the features.
impl Isa for Avx512 {
    type Codes = __m512i;
    type Ints = __m512i;
    type Sums = __m512;

    #[inline(always)]
    fn prefetch(from: *const u8, bytes: usize) {
        prefetch(from, bytes);
    }

    #[inline(always)]
    unsafe fn zero() -> __m512 {
        unsafe { _mm512_setzero_ps() }
    }

    #[inline(always)]
    unsafe fn splat(number: f32) -> __m512 {
        unsafe { _mm512_set1_ps(number) }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> __m512 {
        unsafe { _mm512_loadu_ps(from) }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> __m512 {
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(from.cast())) }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> __m512 {
        unsafe {
            let words = _mm512_cvtepu16_epi32(_mm256_loadu_si256(from.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(words))
        }
    }

    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(from.cast()))) }
    }

    #[inline(always)]
    unsafe fn store(sums: __m512, to: *mut f32) {
        unsafe { _mm512_storeu_ps(to, sums) }
    }

    #[inline(always)]
    unsafe fn mul(a: __m512, b: __m512) -> __m512 {
        unsafe { _mm512_mul_ps(a, b) }
    }

    #[inline(always)]
    unsafe fn mul_add(a: __m512, b: __m512, c: __m512) -> __m512 {
        unsafe { _mm512_fmadd_ps(a, b, c) }
    }

    #[inline(always)]
    unsafe fn total(sums: __m512) -> f32 {
        unsafe {
            let high =
                _mm256_castsi256_ps(_mm512_extracti64x4_epi64::<1>(_mm512_castps_si512(sums)));
            total(_mm256_add_ps(_mm512_castps512_ps256(sums), high))
        }
    }

    #[inline(always)]
    unsafe fn codes(from: *const u8) -> __m512i {
        unsafe { _mm512_loadu_si512(from.cast()) }
    }

    #[inline(always)]
    unsafe fn field(codes: __m512i, shift: u32, mask: u8) -> __m512i {
        unsafe {
            let codes = _mm512_srl_epi64(codes, _mm_cvtsi32_si128(shift as i32));
            _mm512_and_si512(codes, _mm512_set1_epi8(mask as i8))
        }
    }

    #[inline(always)]
    unsafe fn merge<const SHIFT: u32>(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_or_si512(a, _mm512_slli_epi64::<SHIFT>(b)) }
    }

    #[inline(always)]
    unsafe fn lookup(codes: __m512i, table: &[i8; 16]) -> __m512i {
        unsafe {
            let table = _mm512_broadcast_i32x4(_mm_loadu_si128(table.as_ptr().cast()));
            _mm512_shuffle_epi8(table, codes)
        }
    }

    #[inline(always)]
    unsafe fn start(start: i32, shift: u32) -> __m512i {
        unsafe { _mm512_sll_epi32(_mm512_set1_epi32(start), _mm_cvtsi32_si128(shift as i32)) }
    }

    #[inline(always)]
    unsafe fn dot(sums: __m512i, codes: __m512i, x: *const i8) -> __m512i {
        unsafe { _mm512_dpbusd_epi32(sums, codes, _mm512_set1_epi32(four(x))) }
    }

    /// Codes are made unsigned by a bias of 128, which this subtracts again.
    #[inline(always)]
    unsafe fn start_signed(start: i32) -> __m512i {
        unsafe { Self::start(start, 7) }
    }

    #[inline(always)]
    unsafe fn dot_signed(sums: __m512i, codes: __m512i, x: *const i8) -> __m512i {
        unsafe {
            let biased = _mm512_xor_si512(codes, _mm512_set1_epi8(i8::MIN));
            Self::dot(sums, biased, x)
        }
    }

    #[inline(always)]
    unsafe fn to_floats(ints: __m512i) -> __m512 {
        unsafe { _mm512_cvtepi32_ps(ints) }
    }
}

/// Four activations as one number.
#[inline(always)]
unsafe fn four(x: *const i8) -> i32 {
    unsafe { x.cast::<i32>().read_unaligned() }
}

/// Two registers for each of [`Avx512`]'s.
#[derive(Clone, Copy)]
pub(crate) struct Avx2;

/// The sum of eight lanes: the upper half is added to the lower.
#[inline(always)]
unsafe fn total(sums: __m256) -> f32 {
    unsafe {
        let sums = _mm_add_ps(
            _mm256_castps256_ps128(sums),
            _mm256_extractf128_ps::<1>(sums),
        );
        let sums = _mm_add_ps(sums, _mm_movehl_ps(sums, sums));
        _mm_cvtss_f32(_mm_add_ss(sums, _mm_movehdup_ps(sums)))
    }
}

/// One of the two registers of [`Avx2`]. There are no closures here: instructions in a closure would be calls.
mod half {
    use std::arch::x86_64::*;

    #[inline(always)]
    pub(crate) unsafe fn load_bf16(from: *const u8) -> __m256 {
        unsafe {
            let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
        }
    }

    #[inline(always)]
    pub(crate) unsafe fn field(codes: __m256i, shift: u32, mask: u8) -> __m256i {
        unsafe {
            let codes = _mm256_srl_epi64(codes, _mm_cvtsi32_si128(shift as i32));
            _mm256_and_si256(codes, _mm256_set1_epi8(mask as i8))
        }
    }

    /// Two products of less than 2^13 each, or of 2^14 that are not all of one sign: no sum is too large for 16 bits.
    #[inline(always)]
    pub(crate) unsafe fn dot(sums: __m256i, codes: __m256i, x: __m256i) -> __m256i {
        unsafe {
            let pairs = _mm256_maddubs_epi16(codes, x);
            _mm256_add_epi32(sums, _mm256_madd_epi16(pairs, _mm256_set1_epi16(1)))
        }
    }

    /// The sign of a code goes to its activation.
    #[inline(always)]
    pub(crate) unsafe fn dot_signed(sums: __m256i, codes: __m256i, x: __m256i) -> __m256i {
        unsafe { dot(sums, _mm256_abs_epi8(codes), _mm256_sign_epi8(x, codes)) }
    }
}

impl Isa for Avx2 {
    type Codes = [__m256i; 2];
    type Ints = [__m256i; 2];
    type Sums = [__m256; 2];

    #[inline(always)]
    fn prefetch(from: *const u8, bytes: usize) {
        prefetch(from, bytes);
    }

    #[inline(always)]
    unsafe fn zero() -> [__m256; 2] {
        unsafe { [_mm256_setzero_ps(); 2] }
    }

    #[inline(always)]
    unsafe fn splat(number: f32) -> [__m256; 2] {
        unsafe { [_mm256_set1_ps(number); 2] }
    }

    #[inline(always)]
    unsafe fn load(from: *const f32) -> [__m256; 2] {
        unsafe { [_mm256_loadu_ps(from), _mm256_loadu_ps(from.add(8))] }
    }

    #[inline(always)]
    unsafe fn load_f16(from: *const u8) -> [__m256; 2] {
        unsafe {
            [
                _mm256_cvtph_ps(_mm_loadu_si128(from.cast())),
                _mm256_cvtph_ps(_mm_loadu_si128(from.add(16).cast())),
            ]
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(from: *const u8) -> [__m256; 2] {
        unsafe { [half::load_bf16(from), half::load_bf16(from.add(16))] }
    }

    #[inline(always)]
    unsafe fn load_u8(from: *const u8) -> [__m256; 2] {
        unsafe {
            let (low, high) = (
                _mm_loadl_epi64(from.cast()),
                _mm_loadl_epi64(from.add(8).cast()),
            );
            [
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(low)),
                _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(high)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn load_i8(from: *const u8) -> [__m256; 2] {
        unsafe {
            let (low, high) = (
                _mm_loadl_epi64(from.cast()),
                _mm_loadl_epi64(from.add(8).cast()),
            );
            [
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(low)),
                _mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(high)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn store(sums: [__m256; 2], to: *mut f32) {
        unsafe {
            _mm256_storeu_ps(to, sums[0]);
            _mm256_storeu_ps(to.add(8), sums[1]);
        }
    }

    #[inline(always)]
    unsafe fn mul(a: [__m256; 2], b: [__m256; 2]) -> [__m256; 2] {
        unsafe { [_mm256_mul_ps(a[0], b[0]), _mm256_mul_ps(a[1], b[1])] }
    }

    #[inline(always)]
    unsafe fn mul_add(a: [__m256; 2], b: [__m256; 2], c: [__m256; 2]) -> [__m256; 2] {
        unsafe {
            [
                _mm256_fmadd_ps(a[0], b[0], c[0]),
                _mm256_fmadd_ps(a[1], b[1], c[1]),
            ]
        }
    }

    #[inline(always)]
    unsafe fn total(sums: [__m256; 2]) -> f32 {
        unsafe { total(_mm256_add_ps(sums[0], sums[1])) }
    }

    #[inline(always)]
    unsafe fn codes(from: *const u8) -> [__m256i; 2] {
        unsafe {
            [
                _mm256_loadu_si256(from.cast()),
                _mm256_loadu_si256(from.add(32).cast()),
            ]
        }
    }

    #[inline(always)]
    unsafe fn field(codes: [__m256i; 2], shift: u32, mask: u8) -> [__m256i; 2] {
        unsafe {
            [
                half::field(codes[0], shift, mask),
                half::field(codes[1], shift, mask),
            ]
        }
    }

    #[inline(always)]
    unsafe fn merge<const SHIFT: u32>(a: [__m256i; 2], b: [__m256i; 2]) -> [__m256i; 2] {
        unsafe {
            let count = _mm_cvtsi32_si128(SHIFT as i32);
            [
                _mm256_or_si256(a[0], _mm256_sll_epi64(b[0], count)),
                _mm256_or_si256(a[1], _mm256_sll_epi64(b[1], count)),
            ]
        }
    }

    #[inline(always)]
    unsafe fn lookup(codes: [__m256i; 2], table: &[i8; 16]) -> [__m256i; 2] {
        unsafe {
            let table = _mm256_broadcastsi128_si256(_mm_loadu_si128(table.as_ptr().cast()));
            [
                _mm256_shuffle_epi8(table, codes[0]),
                _mm256_shuffle_epi8(table, codes[1]),
            ]
        }
    }

    #[inline(always)]
    unsafe fn start(start: i32, shift: u32) -> [__m256i; 2] {
        unsafe {
            let start = _mm256_set1_epi32(start);
            [_mm256_sll_epi32(start, _mm_cvtsi32_si128(shift as i32)); 2]
        }
    }

    #[inline(always)]
    unsafe fn dot(sums: [__m256i; 2], codes: [__m256i; 2], x: *const i8) -> [__m256i; 2] {
        unsafe {
            let x = _mm256_set1_epi32(four(x));
            [
                half::dot(sums[0], codes[0], x),
                half::dot(sums[1], codes[1], x),
            ]
        }
    }

    #[inline(always)]
    unsafe fn start_signed(_: i32) -> [__m256i; 2] {
        unsafe { [_mm256_setzero_si256(); 2] }
    }

    #[inline(always)]
    unsafe fn dot_signed(sums: [__m256i; 2], codes: [__m256i; 2], x: *const i8) -> [__m256i; 2] {
        unsafe {
            let x = _mm256_set1_epi32(four(x));
            [
                half::dot_signed(sums[0], codes[0], x),
                half::dot_signed(sums[1], codes[1], x),
            ]
        }
    }

    #[inline(always)]
    unsafe fn to_floats(ints: [__m256i; 2]) -> [__m256; 2] {
        unsafe { [_mm256_cvtepi32_ps(ints[0]), _mm256_cvtepi32_ps(ints[1])] }
    }
}
