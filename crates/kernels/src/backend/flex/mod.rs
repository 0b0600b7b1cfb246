//! The CPU backend: burn's tensors in, slices to the kernels, tensors out.
//!
//! `forward` and `backward` implement the traits by handing each operation to its family; `values` and `saved_values`
//! are what the families share.

mod backward;
mod forward;
pub(crate) mod saved_values;
pub(crate) mod values;
