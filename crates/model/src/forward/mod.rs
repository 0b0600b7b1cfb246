//! What a forward pass is given besides tokens, and what it leaves behind.

pub(crate) mod cache;
pub(crate) mod context;
pub(crate) mod recorder;
