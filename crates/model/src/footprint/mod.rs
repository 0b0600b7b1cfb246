//! The memory that a model takes, predicted from its config alone: no weight is read, and nothing is allocated.
//!
//! What is held between passes follows from shapes ([`ModelShape::trained`], [`ModelShape::updates`]). What a pass holds
//! ([`ModelShape::training_pass`]) follows from what each operation saves for its gradient, as the modules hand it to the
//! kernels: who changes what a module saves changes its line in `saved.rs`. The scratch of an operation is predicted beside the
//! operation, in `kernels`.
//!
//! Bytes are f64: no option makes them overflow.

mod generation;
mod pass;
mod saved;
mod shapes;
mod stored_bytes;

pub use self::generation::CachedPass;
pub use self::pass::PassBytes;
pub use self::saved::TrainingPass;
pub use self::shapes::{ExpertsAt, FeedForwardShape, LayerShape, LinearShape, ModelShape, Trained};
pub use self::stored_bytes::{FrozenBytes, StoredAs, WeightBytes, stored_bytes};

/// Bytes of an f32.
const BYTES_OF_F32: f64 = 4.0;
