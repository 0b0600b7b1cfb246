//! The instruction sets with an [`Isa`], and work that is compiled for each of them.

#![expect(unsafe_code, reason = "instructions that were found, or promised")]

#[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
use super::features;
use super::isa::{Isa, Portable};
#[cfg(target_arch = "aarch64")]
use super::neon::Neon;
#[cfg(target_arch = "x86_64")]
use super::x86::{Avx2, Avx512};

/// An instruction set that the CPU has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Instructions {
    #[cfg(target_arch = "x86_64")]
    Avx512,
    #[cfg(target_arch = "x86_64")]
    Avx2,
    #[cfg(target_arch = "aarch64")]
    Neon,
    Portable,
}

/// Work that any instruction set can do, with the same result.
pub(crate) trait SimdWork {
    /// # Safety
    /// The CPU has the instructions of `I`.
    unsafe fn run<I: Isa>(self);
}

impl Instructions {
    /// The widest set that the CPU has.
    pub(crate) fn best() -> Self {
        #[cfg(target_arch = "x86_64")]
        {
            if features::has_avx512_vnni() {
                return Self::Avx512;
            }
            if features::has_avx2() {
                return Self::Avx2;
            }
        }
        #[cfg(target_arch = "aarch64")]
        if features::has_neon_dot() {
            return Self::Neon;
        }
        Self::Portable
    }

    /// All sets that the CPU has, the widest first.
    #[cfg(test)]
    pub(crate) fn all() -> Vec<Self> {
        let all = [
            #[cfg(target_arch = "x86_64")]
            Self::Avx512,
            #[cfg(target_arch = "x86_64")]
            Self::Avx2,
            #[cfg(target_arch = "aarch64")]
            Self::Neon,
            Self::Portable,
        ];
        let best = Self::best();
        all.into_iter().skip_while(|set| *set != best).collect()
    }

    /// Does the work, compiled for these instructions with everything that is inlined into it.
    pub(crate) fn run(self, work: impl SimdWork) {
        #[cfg(any(target_arch = "x86_64", target_arch = "aarch64"))]
        macro_rules! with {
            ($features:literal, $isa:ty) => {{
                #[target_feature(enable = $features)]
                fn run<W: SimdWork>(work: W) {
                    // SAFETY: compiled for them.
                    unsafe { work.run::<$isa>() }
                }
                // SAFETY: instructions of the CPU.
                unsafe { run(work) }
            }};
        }
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => with!(
                "avx512f,avx512bw,avx512dq,avx512vl,avx512vnni,avx2,fma,f16c",
                Avx512
            ),
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => with!("avx2,fma,f16c", Avx2),
            #[cfg(target_arch = "aarch64")]
            Self::Neon => with!("neon,dotprod", Neon),
            // SAFETY: it needs none.
            Self::Portable => unsafe { work.run::<Portable>() },
        }
    }
}
