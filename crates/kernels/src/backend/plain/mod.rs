//! Every operation and gradient in burn's own operations: what each of them means, and how a backend without kernels of
//! its own computes it.
//!
//! The formulas are written out, not left to autodiff, and nothing is read back. Weights that lie on the host are decoded
//! and uploaded whole, so a backend overrides what it can do better: the CPU all of it, a GPU the products. Sums are of a
//! fixed order, and none is longer than a thread of a GPU may count.

pub(crate) mod attention;
pub(crate) mod decoding;
mod dropout;
pub(crate) mod elementwise;
pub(crate) mod experts;
mod ints;
pub(crate) mod linear;
pub(crate) mod loss;
pub(crate) mod optimizer;
pub(crate) mod primitives;
mod reals;
pub(crate) mod route;
pub(crate) mod saved_reals;
mod sums;
#[cfg(test)]
mod tests;

use crate::settings::Compute;

/// Panics unless products are f32.
pub(crate) fn check_compute(compute: Compute) {
    assert!(
        matches!(compute, Compute::F32 | Compute::MatchWeight),
        "this backend multiplies in f32 alone, not in {compute:?}"
    );
}
