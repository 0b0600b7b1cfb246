//! The operations as burn sees them: their public functions, their gradients and their CPU implementation.
//!
//! [`traits`] has the signatures. Each family is a folder with the public functions (`mod.rs`), what autodiff saves
//! and registers (`autodiff.rs`, if there is a gradient) and the CPU implementation (`flex.rs`). `autodiff` and `flex`
//! implement the traits by handing each operation to its family.

pub(crate) mod attention;
mod autodiff;
mod composed;
pub(crate) mod elementwise;
pub(crate) mod experts;
mod factors;
mod flex;
mod gradients;
pub(crate) mod linear;
pub(crate) mod loss;
pub(crate) mod optimizer;
pub(crate) mod saved;
pub(crate) mod traits;
