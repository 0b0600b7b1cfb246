//! The memory that runs take: predicted, compared with what there is, and said.

pub(crate) mod budget;
pub(crate) mod conversion;
pub(crate) mod generation_need;
pub(crate) mod knobs;
pub(crate) mod lines;
mod memory_plan;
pub(crate) mod placement;
pub(crate) mod run_memory;
mod sizing;
mod training_need;
pub(crate) mod verb;
