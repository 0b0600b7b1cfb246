//! Matrix products over weights in any stored form, and what their operands are rounded to.

pub(crate) mod ahead;
mod blocks;
pub(crate) mod compute;
pub(crate) mod gemm;
mod microkernel;
pub(crate) mod rows;
pub(crate) mod strided;
pub(crate) mod team;
pub(crate) mod weights;
