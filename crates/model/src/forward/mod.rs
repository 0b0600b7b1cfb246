//! The context of a forward pass: settings, caches, and a recorder.

pub(crate) mod cache;
pub(crate) mod context;
pub(crate) mod exchange;
pub(crate) mod recorder;
pub(crate) mod routing;
