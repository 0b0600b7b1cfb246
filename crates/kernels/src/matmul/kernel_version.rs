//! The instruction sets of the microkernel.

#[cfg(target_arch = "x86_64")]
use crate::simd::features;

/// The instruction set of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum KernelVersion {
    Portable,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "x86_64")]
    Avx512,
    /// For operands rounded to bf16.
    #[cfg(target_arch = "x86_64")]
    Avx512Bf16,
}

impl KernelVersion {
    /// The set for products in bf16, if the CPU has it.
    pub(super) fn bf16() -> Option<Self> {
        #[cfg(target_arch = "x86_64")]
        if features::has_avx512_bf16() {
            return Some(Self::Avx512Bf16);
        }
        None
    }

    /// Values along the sum per word.
    pub(super) fn depth(self) -> usize {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512Bf16 => 2,
            _ => 1,
        }
    }

    /// The f32 sets that the CPU has, the widest last.
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
