//! Maps a file into memory. The only unsafe code of this crate.
//!
//! The hazard: a mapped file is shared with every other program. If one of them truncates it
//! while it is mapped, reading past the new end ends this process with a bus error, and if one
//! writes into it, values change under our feet. No check can prevent this, and copying instead
//! would double the memory of every model. So a model's files must stay as they are while they
//! are in use; this crate itself never writes into a file in place, it only renames new ones
//! over old ones, which leaves existing maps intact.
#![expect(
    unsafe_code,
    reason = "mapping a file is unsafe by nature, see the module's documentation"
)]

use std::fs::File;
use std::path::Path;

use bytes::Bytes;

use crate::Result;
use crate::error::io;
use crate::file::expect_file;

/// Maps a whole file, read-only. Slices of the result share the map, and the last one unmaps it.
///
/// # Errors
/// If `path` is no regular file, or cannot be opened or mapped.
pub(crate) fn map(path: &Path) -> Result<Bytes> {
    let metadata = expect_file(path)?;
    if metadata.len() == 0 {
        return Ok(Bytes::new());
    }
    let file = File::open(path).map_err(io("open", path))?;
    // SAFETY: the map is read-only and only ever seen as `&[u8]`, for which any bytes are valid.
    // What remains is another program that changes the file while it is mapped; that hazard is
    // accepted and documented above.
    let map = unsafe { memmap2::Mmap::map(&file) }.map_err(io("map", path))?;
    Ok(Bytes::from_owner(map))
}
