//! Matrix products over weights in any stored form, and what their operands are rounded to.

pub(crate) mod compute;
pub(crate) mod gemm;
pub(crate) mod strided;
pub(crate) mod weights;
