//! One source, several instruction sets.
//!
//! [`multiversion!`] compiles a loop for the baseline, for AVX2 with FMA and for AVX-512, and chooses at run time. On
//! ARM there is only the baseline, which has NEON and fuses. The loop is plain Rust that the compiler vectorizes; `FMA`
//! is a constant inside it, because `mul_add` without the instruction is a slow library call. Order and rounding of
//! operations are those of the source, so the width of the vectors changes no bit.

/// Declares a function in a baseline and, on x86, an AVX2+FMA and an AVX-512 version, chosen at run time.
macro_rules! multiversion {
    ($(#[$meta:meta])* fn $name:ident<$fma:ident>($($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? $body:block) => {
        $(#[$meta])*
        pub(crate) fn $name($($arg: $ty),*) $(-> $ret)? {
            #[inline(always)]
            fn body<const $fma: bool>($($arg: $ty),*) $(-> $ret)? $body

            #[cfg(target_arch = "x86_64")]
            #[expect(unsafe_code, reason = "calling a target_feature function behind its run-time check")]
            {
                #[target_feature(enable = "avx2,fma,f16c")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    body::<true>($($arg),*)
                }
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    body::<true>($($arg),*)
                }
                if $crate::simd::features::has_avx512() {
                    // SAFETY: the features were detected just above.
                    return unsafe { avx512($($arg),*) };
                }
                if $crate::simd::features::has_avx2() {
                    // SAFETY: the three features were detected just above.
                    return unsafe { avx2($($arg),*) };
                }
            }
            body::<{ cfg!(target_arch = "aarch64") }>($($arg),*)
        }
    };
}

pub(crate) use multiversion;
