//! Reads JSON files of bounded length that hold an object.

use std::fs::File;
use std::io::Read;
use std::path::Path;

use serde::de::DeserializeOwned;

use crate::error::{io, shown};
use crate::file::{expect_file, expect_no_pointer};
use crate::{Error, Result};

/// The longest configuration file, in bytes. Real ones have a few thousand.
pub(crate) const CONFIG_LIMIT: u64 = 16 << 20;

/// The longest index, in bytes. DeepSeek-V3's, with 91,000 tensors, has 9 MB.
pub(crate) const INDEX_LIMIT: u64 = 256 << 20;

/// Reads a file that holds a JSON object, as text.
///
/// # Errors
/// If the file cannot be read, is longer than `limit` bytes, or starts like anything else.
pub(crate) fn read_object(path: &Path, limit: u64) -> Result<Vec<u8>> {
    let metadata = expect_file(path)?;
    let too_long = |found| Error::TooLong {
        path: path.to_owned(),
        limit,
        found,
    };
    if metadata.len() > limit {
        return Err(too_long(metadata.len()));
    }
    let mut text = Vec::new();
    let file = File::open(path).map_err(io("open", path))?;
    // Bounded again, because the file may grow after its length was read.
    file.take(limit + 1)
        .read_to_end(&mut text)
        .map_err(io("read", path))?;
    if text.len() as u64 > limit {
        return Err(too_long(text.len() as u64));
    }
    expect_no_pointer(path, &text)?;
    if text.trim_ascii_start().first() != Some(&b'{') {
        let start = &text[..text.len().min(20)];
        return Err(Error::NotAnObject {
            path: path.to_owned(),
            found: format!("`{}`", shown(&String::from_utf8_lossy(start))),
        });
    }
    Ok(text)
}

/// Parses the text of [`read_object`].
///
/// # Errors
/// If the text is not JSON, or its values have the wrong type.
pub(crate) fn parse<T: DeserializeOwned>(path: &Path, text: &[u8]) -> Result<T> {
    serde_json::from_slice(text).map_err(|cause| Error::Json {
        path: path.to_owned(),
        cause,
    })
}
