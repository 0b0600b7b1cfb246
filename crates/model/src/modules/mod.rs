//! The parts of a decoder layer.

pub(crate) mod attention;
pub mod experts;
pub mod linear;
pub(crate) mod lora;
pub(crate) mod mlp;
pub mod moe;
pub(crate) mod norm;
pub mod router;
