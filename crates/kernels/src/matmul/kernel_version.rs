//! Which instructions the products of views are made of.

#[cfg(target_arch = "x86_64")]
use crate::simd::features;

/// Which instructions a product is made of.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KernelVersion {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// Of operands that are rounded to bf16.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
}

impl KernelVersion {
    /// That of products in bf16, where the CPU has such.
    pub(super) fn bf16() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if features::has_avx512_bf16() {
            return Some(Self::Avx512Bf16);
        }
        None
    }

    /// Values of the sum in a word.
    pub(super) fn depth(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => 2,
            _ => 1,
        }
    }

    /// Those in f32 that the CPU has, the widest last.
    pub(super) fn all() -> impl DoubleEndedIterator<Item = Self> {
        #[cfg(target_arch = "x86_64")]
        let (wide, wider) = (
            features::has_avx2().then_some(Self::Avx2),
            features::has_avx512().then_some(Self::Avx512),
        );
        #[cfg(not(target_arch = "x86_64"))]
        let (wide, wider) = (None, None);
        [Some(Self::Portable), wide, wider].into_iter().flatten()
    }
}
