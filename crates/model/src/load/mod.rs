//! From a checkpoint's tensors to a model. The only place that knows foreign shapes.
//!
//! Frozen weights stay mapped in their published bytes; a trained model converts each weight to f32 once. Fresh models
//! are built by the same walk, from a seed instead of a file: a weight's values depend on the seed and its key alone.

mod audit;
mod builder;
mod mtp_weights;
mod stored;

pub use self::audit::{Audit, audit, expect_complete};
pub(crate) use self::builder::normal;
pub use self::builder::{Training, fresh, fresh_shard, load, load_shard};
pub(crate) use self::mtp_weights::mtp_keys;
pub use self::mtp_weights::{fresh_mtp, load_mtp};
pub(crate) use self::stored::{has_e8m0_scales, read_tensor, weight_names};
pub use self::stored::{read_config, read_matrix, unknown_keys};
