//! Matrix products with weights in any stored form. [`plan`] decides the path of each.

mod block_product;
mod blocked;
mod gemm;
mod kernel_version;
mod lanes;
#[cfg(target_arch = "x86_64")]
mod lanes_x86;
mod linear;
mod microkernel;
mod operand;
mod packing;
mod plan;
mod rounding;

pub(crate) use self::blocked::{nn_serial, nt_serial};
pub(crate) use self::gemm::gemm;
pub(crate) use self::linear::{Term, new_nn, new_nt, new_nt_pair, new_tn, nn, nt};
pub(crate) use self::operand::{LayerPass, TILE, WeightFakeQuant, WeightOperand};
pub(crate) use self::plan::plan;
