//! [`Isa`] on x86: AVX-512 with VNNI, and AVX2 with FMA and F16C.

#![expect(
    unsafe_code,
    reason = "vector instructions on pointers; `rows` checks sizes and features"
)]

use std::arch::x86_64::*;

use super::isa::Isa;

/// 64 codes in a register, 16 sums in another.
#[derive(Clone, Copy)]
pub(super) struct Avx512;

/// The upper eight lanes. What goes there is read with a mask: shuffles have one port.
const UPPER: __mmask16 = 0xFF00;

#[inline(always)]
unsafe fn u16_at(from: *const u8) -> u16 {
    unsafe { from.cast::<u16>().read_unaligned() }
}

#[inline(always)]
unsafe fn f16(from: *const u8) -> f32 {
    unsafe { _mm_cvtss_f32(_mm_cvtph_ps(_mm_cvtsi32_si128(i32::from(u16_at(from))))) }
}

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
    unsafe fn f16(from: *const u8) -> f32 {
        unsafe { f16(from) }
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
    unsafe fn halves(numbers: [f32; 2]) -> __m512 {
        unsafe {
            let low = _mm512_set1_ps(numbers[0]);
            _mm512_mask_mov_ps(low, UPPER, _mm512_set1_ps(numbers[1]))
        }
    }

    #[inline(always)]
    unsafe fn quarters(numbers: *const f32) -> __m512 {
        unsafe {
            let places = _mm512_setr_epi32(0, 0, 0, 0, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 3, 3);
            let numbers = _mm512_castps128_ps512(_mm_loadu_ps(numbers));
            _mm512_permutexvar_ps(places, numbers)
        }
    }

    #[inline(always)]
    unsafe fn halves_f16(from: [*const u8; 2]) -> __m512 {
        unsafe {
            // Both in one conversion, and spread by one permutation.
            let [low, high] = [from[0], from[1]];
            let bits = u32::from(u16_at(low)) | u32::from(u16_at(high)) << 16;
            let numbers = _mm_cvtph_ps(_mm_cvtsi32_si128(bits as i32));
            let places = _mm512_setr_epi32(0, 0, 0, 0, 0, 0, 0, 0, 1, 1, 1, 1, 1, 1, 1, 1);
            _mm512_permutexvar_ps(places, _mm512_castps128_ps512(numbers))
        }
    }

    #[inline(always)]
    unsafe fn bytes(from: [*const u8; 2]) -> __m512i {
        unsafe {
            let low = _mm512_broadcast_i64x4(_mm256_loadu_si256(from[0].cast()));
            _mm512_mask_broadcast_i64x4(low, 0xF0, _mm256_loadu_si256(from[1].cast()))
        }
    }

    #[inline(always)]
    unsafe fn nibbles(from: [*const u8; 2]) -> __m512i {
        unsafe {
            let low = _mm512_broadcast_i32x4(_mm_loadu_si128(from[0].cast()));
            let high = _mm_loadu_si128(from[1].cast());
            let bytes = _mm512_mask_broadcast_i32x4(low, UPPER, high);
            let shifts = _mm512_set_epi64(4, 4, 0, 0, 4, 4, 0, 0);
            _mm512_and_si512(_mm512_srlv_epi64(bytes, shifts), _mm512_set1_epi8(15))
        }
    }

    #[inline(always)]
    unsafe fn fields(from: *const u8, [low, high]: [u32; 2], mask: u8) -> __m512i {
        unsafe {
            let bytes = _mm512_broadcast_i64x4(_mm256_loadu_si256(from.cast()));
            let [low, high] = [i64::from(low), i64::from(high)];
            let shifts = _mm512_set_epi64(high, high, high, high, low, low, low, low);
            let codes = _mm512_srlv_epi64(bytes, shifts);
            _mm512_and_si512(codes, _mm512_set1_epi8(mask as i8))
        }
    }

    #[inline(always)]
    unsafe fn halves_of_bytes(from: *const u8, shift: u32) -> __m512i {
        unsafe {
            let bytes = _mm512_loadu_si512(from.cast());
            let codes = _mm512_srl_epi64(bytes, _mm_cvtsi32_si128(shift as i32));
            _mm512_and_si512(codes, _mm512_set1_epi8(15))
        }
    }

    #[inline(always)]
    unsafe fn bits([low, high]: [u32; 2], value: u8) -> __m512i {
        let mask = u64::from(low) | u64::from(high) << 32;
        unsafe { _mm512_maskz_set1_epi8(mask, value as i8) }
    }

    #[inline(always)]
    unsafe fn merge<const SHIFT: u32>(a: __m512i, b: __m512i) -> __m512i {
        unsafe { _mm512_or_si512(a, _mm512_slli_epi64::<SHIFT>(b)) }
    }

    #[inline(always)]
    unsafe fn dot(codes: __m512i, x: *const i8, start: *const i32, shift: u32) -> __m512 {
        unsafe {
            let start = _mm512_loadu_si512(start.cast());
            let start = _mm512_sll_epi32(start, _mm_cvtsi32_si128(shift as i32));
            let x = _mm512_loadu_si512(x.cast());
            _mm512_cvtepi32_ps(_mm512_dpbusd_epi32(start, codes, x))
        }
    }

    /// Made unsigned by a bias of 128, which `start` takes off again.
    #[inline(always)]
    unsafe fn dot_signed(codes: __m512i, x: *const i8, start: *const i32) -> __m512 {
        unsafe {
            let biased = _mm512_xor_si512(codes, _mm512_set1_epi8(i8::MIN));
            Self::dot(biased, x, start, 7)
        }
    }
}

/// Two registers for each of [`Avx512`]'s.
#[derive(Clone, Copy)]
pub(super) struct Avx2;

/// The sum of eight lanes: halves onto each other.
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

/// One register of [`Avx2`]'s two. No closures here: instructions in a closure would be calls.
mod half {
    use std::arch::x86_64::*;

    #[inline(always)]
    pub(super) unsafe fn load_bf16(from: *const u8) -> __m256 {
        unsafe {
            let words = _mm256_cvtepu16_epi32(_mm_loadu_si128(from.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(words))
        }
    }

    /// Each of two numbers in four lanes.
    #[inline(always)]
    pub(super) unsafe fn pair(numbers: *const f32) -> __m256 {
        unsafe {
            let (low, high) = (_mm_set1_ps(*numbers), _mm_set1_ps(*numbers.add(1)));
            _mm256_set_m128(high, low)
        }
    }

    #[inline(always)]
    pub(super) unsafe fn splat_f16(from: *const u8) -> __m256 {
        unsafe { _mm256_cvtph_ps(_mm_set1_epi16(from.cast::<i16>().read_unaligned())) }
    }

    #[inline(always)]
    pub(super) unsafe fn nibbles(from: *const u8) -> __m256i {
        unsafe {
            let bytes = _mm_loadu_si128(from.cast());
            let codes = _mm256_set_m128i(_mm_srli_epi16::<4>(bytes), bytes);
            _mm256_and_si256(codes, _mm256_set1_epi8(15))
        }
    }

    #[inline(always)]
    pub(super) unsafe fn field(bytes: __m256i, shift: u32, mask: u8) -> __m256i {
        unsafe {
            let codes = _mm256_srl_epi64(bytes, _mm_cvtsi32_si128(shift as i32));
            _mm256_and_si256(codes, _mm256_set1_epi8(mask as i8))
        }
    }

    #[inline(always)]
    pub(super) unsafe fn bits(bits: u32, value: u8) -> __m256i {
        unsafe {
            // A byte of the bits in each of its eight places, and there the bit of the place.
            let places = _mm256_setr_epi64x(
                0,
                0x0101_0101_0101_0101,
                0x0202_0202_0202_0202,
                0x0303_0303_0303_0303,
            );
            let wanted = _mm256_set1_epi64x(0x8040_2010_0804_0201_u64 as i64);
            let bytes = _mm256_shuffle_epi8(_mm256_set1_epi32(bits as i32), places);
            let is_set = _mm256_cmpeq_epi8(_mm256_and_si256(bytes, wanted), wanted);
            _mm256_and_si256(is_set, _mm256_set1_epi8(value as i8))
        }
    }

    #[inline(always)]
    pub(super) unsafe fn dot(
        codes: __m256i,
        x: *const i8,
        start: *const i32,
        shift: u32,
    ) -> __m256 {
        unsafe {
            // Two products of less than 2^13: no sum is too large for 16 bits.
            let pairs = _mm256_maddubs_epi16(codes, _mm256_loadu_si256(x.cast()));
            let fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
            let start = _mm256_loadu_si256(start.cast());
            let start = _mm256_sll_epi32(start, _mm_cvtsi32_si128(shift as i32));
            _mm256_cvtepi32_ps(_mm256_add_epi32(start, fours))
        }
    }

    #[inline(always)]
    pub(super) unsafe fn dot_signed(codes: __m256i, x: *const i8) -> __m256 {
        unsafe {
            let x = _mm256_sign_epi8(_mm256_loadu_si256(x.cast()), codes);
            let pairs = _mm256_maddubs_epi16(_mm256_abs_epi8(codes), x);
            let fours = _mm256_madd_epi16(pairs, _mm256_set1_epi16(1));
            _mm256_cvtepi32_ps(fours)
        }
    }
}

impl Isa for Avx2 {
    type Codes = [__m256i; 2];
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
    unsafe fn f16(from: *const u8) -> f32 {
        unsafe { f16(from) }
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
    unsafe fn halves(numbers: [f32; 2]) -> [__m256; 2] {
        unsafe { [_mm256_set1_ps(numbers[0]), _mm256_set1_ps(numbers[1])] }
    }

    #[inline(always)]
    unsafe fn quarters(numbers: *const f32) -> [__m256; 2] {
        unsafe { [half::pair(numbers), half::pair(numbers.add(2))] }
    }

    #[inline(always)]
    unsafe fn halves_f16(from: [*const u8; 2]) -> [__m256; 2] {
        unsafe { [half::splat_f16(from[0]), half::splat_f16(from[1])] }
    }

    #[inline(always)]
    unsafe fn bytes(from: [*const u8; 2]) -> [__m256i; 2] {
        unsafe {
            [
                _mm256_loadu_si256(from[0].cast()),
                _mm256_loadu_si256(from[1].cast()),
            ]
        }
    }

    #[inline(always)]
    unsafe fn nibbles(from: [*const u8; 2]) -> [__m256i; 2] {
        unsafe { [half::nibbles(from[0]), half::nibbles(from[1])] }
    }

    #[inline(always)]
    unsafe fn fields(from: *const u8, shifts: [u32; 2], mask: u8) -> [__m256i; 2] {
        unsafe {
            let bytes = _mm256_loadu_si256(from.cast());
            [
                half::field(bytes, shifts[0], mask),
                half::field(bytes, shifts[1], mask),
            ]
        }
    }

    #[inline(always)]
    unsafe fn halves_of_bytes(from: *const u8, shift: u32) -> [__m256i; 2] {
        unsafe {
            [
                half::field(_mm256_loadu_si256(from.cast()), shift, 15),
                half::field(_mm256_loadu_si256(from.add(32).cast()), shift, 15),
            ]
        }
    }

    #[inline(always)]
    unsafe fn bits(bits: [u32; 2], value: u8) -> [__m256i; 2] {
        unsafe { [half::bits(bits[0], value), half::bits(bits[1], value)] }
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
    unsafe fn dot(codes: [__m256i; 2], x: *const i8, start: *const i32, shift: u32) -> [__m256; 2] {
        unsafe {
            [
                half::dot(codes[0], x, start, shift),
                half::dot(codes[1], x.add(32), start.add(8), shift),
            ]
        }
    }

    /// The sign of a code goes to its activation.
    #[inline(always)]
    unsafe fn dot_signed(codes: [__m256i; 2], x: *const i8, _: *const i32) -> [__m256; 2] {
        unsafe {
            [
                half::dot_signed(codes[0], x),
                half::dot_signed(codes[1], x.add(32)),
            ]
        }
    }
}
