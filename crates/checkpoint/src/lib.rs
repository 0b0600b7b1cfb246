//! Model files in and out: Hugging Face folders, GGUF files, safetensors files and LoRA adapters.
//!
//! Reading maps a file and hands out its tensors as slices of the map, so opening a model
//! copies nothing. Writing streams one tensor at a time into a temporary sibling and renames it
//! when it is complete, so a failure leaves no half-written output. Every file is untrusted: a malformed one is an [`Error`]
//! with the file, the tensor or key, the expected and the found.
//!
//! The meaning of the numbers is not known here: this crate has no tensors to compute with. A tensor's key and shape are those
//! of the file; for a GGUF they are those of the folder it was converted from.
//!
//! ```no_run
//! use checkpoint::{Folder, FolderWriter, TensorSpec};
//! use std::path::Path;
//!
//! let model = Folder::open(Path::new("DeepSeek-V2-Lite"))?;
//! let mut copy = FolderWriter::create(Path::new("copy"))?;
//! copy.write_json("config.json", model.config())?;
//! for (file_name, names) in model.shards() {
//!     let tensors = names.iter().map(|name| model.tensor(name)).collect::<Result<Vec<_>, _>>()?;
//!     let specs: Vec<TensorSpec> = tensors.iter().map(|tensor| tensor.spec()).collect();
//!     copy.add_shard(file_name, &specs, |i| Ok(tensors[i].bytes.clone()))?;
//! }
//! copy.write_index()?;
//! copy.finish()?;
//! # Ok::<(), checkpoint::Error>(())
//! ```

mod error;

mod dtype;
mod tensor;

mod advice;
mod fnv;
mod gguf;
mod header;
mod map;
mod mlx_adapter;
mod safetensors;

mod cache;
mod folder;
mod json;

mod file;
mod folder_writer;

mod adapter;
mod adapter_config;
mod model_card;
mod ordered_map;

pub use self::adapter::{Adapter, AdapterFormat, Notes};
pub use self::adapter_config::{AdapterConfig, TargetModules, TrainableTokens};
pub use self::advice::{advise_dontneed, advise_willneed};
pub use self::cache::{repo_and_revision, resolve};
pub use self::dtype::DType;
pub use self::error::{Error, Result, broken_link};
pub use self::file::{expect_absent, is_present, sha256, sha256_of, write_file};
pub use self::fnv::fnv1a;
pub use self::folder::{Companions, Folder};
pub use self::folder_writer::FolderWriter;
pub use self::gguf::Gguf;
pub use self::gguf::layout::{GgufLayout, GgufTensor, RowOrder};
pub use self::gguf::writer::{GgufValue, GgufWriter};
pub use self::map::read;
pub use self::model_card::{CARD_NAME, ModelCard, Relation, code, model_label};
pub use self::ordered_map::OrderedMap;
pub use self::safetensors::{Safetensors, write_safetensors};
pub use self::tensor::{Tensor, TensorSpec};
