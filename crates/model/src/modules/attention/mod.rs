//! The kinds of attention: latent, and grouped queries.

mod form;
mod gqa;
mod mla;

use burn::module::Module;

pub use gqa::Gqa;
pub use mla::Mla;

/// The kinds of attention.
#[expect(
    clippy::large_enum_variant,
    reason = "tensor handles; there are as many as layers, and burn derives no boxed variants"
)]
#[derive(Module, Debug)]
pub enum Attention {
    /// Latent attention.
    Mla(Mla),
    /// Grouped queries.
    Gqa(Gqa),
}
