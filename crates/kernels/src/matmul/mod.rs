//! Matrix products over weights in any stored form, and what their operands are rounded to.

mod gemm;
mod linear;
mod microkernel;
mod operand;
mod packing;
mod rounding;

pub(crate) use self::gemm::gemm;
pub(crate) use self::linear::{
    Term, new_nn, new_nt, new_nt_pair, new_tn, nn, nn_serial, nt, nt_serial,
};
pub(crate) use self::operand::{TILE, WeightFakeQuant, WeightOperand};
