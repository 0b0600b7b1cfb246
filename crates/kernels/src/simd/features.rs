//! CPU features detected at run time: the one list from which every choice of instructions is made.

/// AVX2, with FMA and F16C.
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// AVX-512 F, BW, DQ and VL, with [`has_avx2`].
#[cfg(target_arch = "x86_64")]
#[inline(always)]
pub(crate) fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && has_avx2()
}

/// Dot products of bytes in [`has_avx512`].
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx512_vnni() -> bool {
    has_avx512() && is_x86_feature_detected!("avx512vnni")
}

/// Dot products of pairs of bf16 in [`has_avx512`].
#[cfg(target_arch = "x86_64")]
pub(crate) fn has_avx512_bf16() -> bool {
    has_avx512() && is_x86_feature_detected!("avx512bf16")
}

/// Dot products of bytes in NEON, which every CPU of the architecture has.
#[cfg(target_arch = "aarch64")]
pub(crate) fn has_neon_dot() -> bool {
    std::arch::is_aarch64_feature_detected!("dotprod")
}
