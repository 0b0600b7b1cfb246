//! The identity of a run's base: a resumed run must stand on the weights that it began on, wherever they are now.

use checkpoint::{Folder, fnv1a};

use crate::Result;
use crate::session::Base;

/// Tensors that are looked into. A hash of every byte of a large model would take as long as reading it.
const SAMPLED_TENSORS: usize = 64;
/// Bytes at the beginning and at the end of each.
const SAMPLED_BYTES: usize = 64;

/// A text that tells a base from another: names, types and shapes of its tensors, with some of their values; the
/// architecture if its weights are fresh.
pub(crate) fn of_base(base: &Base) -> Result<String> {
    let hash = match &base.folder {
        Some(folder) => of_weights(folder)?,
        None => fnv1a(0, base.config.to_string().bytes()),
    };
    Ok(format!("{hash:016x}"))
}

fn of_weights(folder: &Folder) -> Result<u64> {
    let names: Vec<&str> = folder.names().collect();
    let mut hash = fnv1a(folder.tensor_bytes(), names.len().to_le_bytes());
    let distance = names.len().div_ceil(SAMPLED_TENSORS).max(1);
    for (number, name) in names.iter().enumerate() {
        let tensor = folder.stored(name)?;
        let head = format!("{name} {:?} {:?}\n", tensor.dtype, tensor.shape);
        hash = fnv1a(hash, head.bytes());
        if number % distance == 0 {
            let bytes = &tensor.bytes[..];
            let (n, end) = (bytes.len().min(SAMPLED_BYTES), bytes.len());
            let both_ends = bytes[..n].iter().chain(&bytes[end - n..]);
            hash = fnv1a(hash, both_ends.copied());
        }
    }
    Ok(hash)
}
