//! The operations as burn sees them: their signatures, the CPU backend, and autodiff.

mod autodiff;
pub(crate) mod cached;
mod flex;
pub(crate) mod gradients;
pub(crate) mod kept;
pub(crate) mod linear;
pub(crate) mod ops;
mod plain;
