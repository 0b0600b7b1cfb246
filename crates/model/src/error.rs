//! The one error type of the crate.

use std::path::PathBuf;

/// Why a model cannot be made from its files.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// A file of a checkpoint or adapter could not be read, or lacks a tensor.
    #[error(transparent)]
    Checkpoint(#[from] checkpoint::Error),
    /// A key of `config.json` is missing or has a value we cannot work with.
    #[error("{}: `{key}`: expected {expected}, found {found}", .file.display())]
    Config {
        /// The file.
        file: PathBuf,
        /// The key, with dots between levels.
        key: String,
        /// What would have done.
        expected: String,
        /// What was there.
        found: String,
    },
    /// A tensor's bytes cannot serve as the weight they are meant to be.
    #[error("{}: tensor `{name}`: {cause}", .file.display())]
    Weight {
        /// The file.
        file: PathBuf,
        /// The tensor.
        name: String,
        /// Why not.
        cause: kernels::Error,
    },
    /// A tensor has a dtype that is no weight format.
    #[error("{}: tensor `{name}`: expected one of F32, F16, BF16, F8_E4M3, found {found}", .file.display())]
    DType {
        /// The file.
        file: PathBuf,
        /// The tensor.
        name: String,
        /// Its dtype.
        found: checkpoint::DType,
    },
    /// A pattern that chooses modules chose none.
    #[error("pattern `{pattern}` matches no module; there are {available}")]
    NoMatch {
        /// The pattern.
        pattern: String,
        /// What there is to match, by its last names.
        available: String,
    },
    /// A pattern that chooses tensors chose none.
    #[error(
        "pattern `{pattern}` matches no tensor of the model; tensors are called like `{example}`"
    )]
    NoTensor {
        /// The pattern.
        pattern: String,
        /// The name of one that there is.
        example: String,
    },
    /// An adapter does not fit the model.
    #[error("{}: adapter tensor `{name}`: expected {expected}, found {found}", .file.display())]
    Adapter {
        /// The file.
        file: PathBuf,
        /// The tensor.
        name: String,
        /// What the model needs.
        expected: String,
        /// What the file holds.
        found: String,
    },
    /// A weight cannot be copied to the device that computes.
    #[error("copying weights to the device: {0}")]
    Device(#[from] kernels::Error),
    /// Two adapters, or settings that exclude each other.
    #[error("{0}")]
    Unsupported(String),
    /// A file or folder could not be read.
    #[error("{}: {cause}", .file.display())]
    Read {
        /// Which.
        file: PathBuf,
        /// Why.
        cause: std::io::Error,
    },
    /// A checkpoint has no module for multi-token prediction.
    #[error(
        "{}: expected layers for multi-token prediction (`num_nextn_predict_layers` in the config, and their tensors), \
         found {found}",
        .place.display()
    )]
    NoMtp {
        /// The checkpoint.
        place: PathBuf,
        /// What there was instead.
        found: String,
    },
    /// A written model has other values than it should have.
    #[error(
        "tensor `{tensor}` of the output: expected {expected}, found {found}; no output was written"
    )]
    Unfaithful {
        /// Which tensor.
        tensor: String,
        /// What should be there.
        expected: String,
        /// What is.
        found: String,
    },
}
