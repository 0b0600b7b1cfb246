//! Models, and adapters, into files.

mod companions;
mod convert;
mod faithful;
pub mod gguf;
mod gguf_types;
mod hf_fp8;
pub mod importance;
mod llama_cpp;
pub mod lora_gguf;
mod merge;
pub mod mix;
mod trained;
mod weight_format;

pub use self::companions::{copy_companions, copy_texts};
pub use self::convert::convert;
pub use self::hf_fp8::is_fp8;
pub use self::llama_cpp::llama_cpp_differences;
pub use self::merge::{MergeReport, merge};
pub use self::trained::{TrainedReader, export, export_subset};
pub use self::weight_format::WeightFormat;
