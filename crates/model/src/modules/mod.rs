//! The parts of a decoder layer.

pub mod attention;
pub mod experts;
pub mod linear;
pub mod lora;
pub mod mlp;
pub mod moe;
pub mod norm;
pub mod router;
