//! Maps a file into memory. This file and `advice.rs` have the only unsafe code of this crate.
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
use std::sync::{Arc, Mutex, Weak};

use bytes::Bytes;
use memmap2::Mmap;

use crate::Result;
use crate::error::io;
use crate::file::{expect_file, expect_no_pointer};

/// All maps, to tell the bytes of a file from others.
static MAPS: Mutex<Vec<Weak<Mapped>>> = Mutex::new(Vec::new());

/// A file and its map.
pub(crate) struct Mapped {
    pub(crate) map: Mmap,
    #[cfg_attr(not(unix), expect(dead_code, reason = "read at places on Unix alone"))]
    file: File,
}

/// The shared owner of a map's slices.
struct Owner(Arc<Mapped>);

impl AsRef<[u8]> for Owner {
    fn as_ref(&self) -> &[u8] {
        &self.0.map
    }
}

/// Maps a whole file, read-only. Slices of the result share the map, and the last one unmaps it.
///
/// # Errors
/// If `path` is not a regular file, or cannot be opened or mapped.
pub(crate) fn map(path: &Path) -> Result<Bytes> {
    let metadata = expect_file(path)?;
    if metadata.len() == 0 {
        return Ok(Bytes::new());
    }
    let file = File::open(path).map_err(io("open", path))?;
    // SAFETY: the map is read-only and only ever seen as `&[u8]`, for which any bytes are valid.
    // What remains is another program that changes the file while it is mapped; that hazard is
    // accepted and documented above.
    let map = unsafe { Mmap::map(&file) }.map_err(io("map", path))?;
    expect_no_pointer(path, &map)?;
    let map = Arc::new(Mapped { map, file });
    let mut maps = MAPS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    maps.retain(|map| map.strong_count() > 0);
    maps.push(Arc::downgrade(&map));
    Ok(Bytes::from_owner(Owner(map)))
}

/// Copies a part of a mapped file without mapping its pages, and other bytes as they are.
///
/// # Panics
/// If `out` has another length.
pub fn read(bytes: &[u8], out: &mut [u8]) {
    #[cfg(unix)]
    if let Some((mapped, start)) = map_of(bytes) {
        use std::os::unix::fs::FileExt;
        assert_eq!(bytes.len(), out.len(), "bytes and their copy");
        if mapped.file.read_exact_at(out, start as u64).is_ok() {
            return;
        }
    }
    out.copy_from_slice(bytes);
}

/// The map that holds these bytes, and their offset in it.
#[cfg(unix)]
pub(crate) fn map_of(bytes: &[u8]) -> Option<(Arc<Mapped>, usize)> {
    let maps = MAPS.lock().unwrap_or_else(|poisoned| poisoned.into_inner());
    let start = bytes.as_ptr() as usize;
    maps.iter().filter_map(Weak::upgrade).find_map(|mapped| {
        let first = mapped.map.as_ptr() as usize;
        let is_inside = first <= start && start + bytes.len() <= first + mapped.map.len();
        is_inside.then(|| (mapped, start - first))
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_part_is_read_from_the_map_it_lies_in() {
        let folder = tempfile::tempdir().unwrap();
        let files: Vec<Bytes> = (0..3u8)
            .map(|number| {
                let path = folder.path().join(number.to_string());
                std::fs::write(
                    &path,
                    (0..9000)
                        .map(|i| (i % 251) as u8 ^ number)
                        .collect::<Vec<_>>(),
                )
                .unwrap();
                map(&path).unwrap()
            })
            .collect();
        let memory = Bytes::from(vec![7; 9000]);
        for bytes in files.iter().chain([&memory]) {
            for part in [0..9000, 4000..4500, 8999..9000, 0..0] {
                let mut found = vec![0; part.len()];
                read(&bytes[part.clone()], &mut found);
                assert_eq!(found, bytes[part]);
            }
        }
    }
}
