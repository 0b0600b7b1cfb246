//! Vector code: loops that are compiled for several instruction sets, and operations that are written for each.

mod convert;
mod dot;
pub(crate) mod exp;
pub(crate) mod features;
mod instructions;
mod isa;
mod multiversion;
#[cfg(target_arch = "aarch64")]
mod neon;
#[cfg(target_arch = "x86_64")]
mod x86;

pub(crate) use self::convert::{
    decode_f16, narrow_to_bf16, round_to_bf16, round_to_f16, widen_bf16,
};
pub(crate) use self::dot::{axpy, dot, sum};
pub(crate) use self::instructions::{Instructions, SimdWork};
pub(crate) use self::isa::{FOUR, Isa, LANES};
pub(crate) use self::multiversion::multiversion;
