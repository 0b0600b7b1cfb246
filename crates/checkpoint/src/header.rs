//! The header of a safetensors file, parsed and written.
//!
//! A file is the header's length (8 bytes, little-endian), the header (a JSON object: name to
//! dtype, shape and data offsets), and the tensors' bytes without a gap. The rules are those of
//! the `safetensors` crate, which the tests hold against this one. It is not used to read because
//! its errors do not name the tensor, it lets a repeated key replace the first, and its sum of
//! offsets can overflow on a hostile file.
//!
//! Source: huggingface/safetensors: safetensors/src/tensor.rs.

use std::collections::{BTreeMap, HashSet};
use std::fmt;
use std::ops::Range;
use std::path::Path;
use std::sync::Arc;

use serde::de::{Error as _, MapAccess, Visitor};
use serde::{Deserialize, Deserializer, Serialize};

use crate::error::shown;
use crate::{DType, Error, OrderedMap, Result, TensorSpec};

/// The longest header, in bytes: the limit of the format's own implementation.
const HEADER_LIMIT: u64 = 100_000_000;
/// The longest tensor name, in bytes. Real ones have fewer than a hundred.
const NAME_LIMIT: usize = 4096;
/// The bytes of the header's length.
const LENGTH_BYTES: usize = 8;
/// The key that holds free text instead of a tensor.
const METADATA_KEY: &str = "__metadata__";

/// The content of a header, checked against its file.
#[derive(Debug)]
pub(crate) struct Header {
    /// Free text.
    pub(crate) metadata: BTreeMap<String, String>,
    /// The tensors in the order of their bytes, and where these are in the file.
    pub(crate) tensors: Vec<(TensorSpec, Range<usize>)>,
}

impl Header {
    /// Parses and checks the header of a whole mapped file.
    ///
    /// # Errors
    /// If the header is malformed, or the tensors do not tile the rest of the file exactly.
    pub(crate) fn parse(file: &Path, bytes: &[u8]) -> Result<Self> {
        let (text, data) = split(file, bytes)?;
        let raw: RawHeader = serde_json::from_slice(text).map_err(|cause| Error::Header {
            file: file.to_owned(),
            cause,
        })?;

        let data_start = LENGTH_BYTES + text.len();
        let mut entries = raw.tensors;
        entries.sort_by_key(|(_, entry)| entry.data_offsets);

        let mut tensors = Vec::with_capacity(entries.len());
        let mut data_end = 0;
        for (name, entry) in entries {
            let offsets = entry.data_offsets;
            let spec = checked_spec(file, name, entry, data_end)?;
            data_end = offsets.1;
            tensors.push((spec, offsets));
        }
        if data_end != data.len() {
            return Err(Error::FileLength {
                file: file.to_owned(),
                expected: (data_start as u64).saturating_add(data_end as u64),
                found: bytes.len() as u64,
            });
        }

        // No sum can overflow: every offset is at most `data.len()` now.
        let tensors = tensors
            .into_iter()
            .map(|(spec, (start, end))| (spec, data_start + start..data_start + end))
            .collect();
        Ok(Self {
            metadata: raw.metadata,
            tensors,
        })
    }
}

/// Splits a file into its header's text and its tensors' bytes.
fn split<'a>(file: &Path, bytes: &'a [u8]) -> Result<(&'a [u8], &'a [u8])> {
    let Some((length, rest)) = bytes.split_first_chunk::<LENGTH_BYTES>() else {
        return Err(Error::FileLength {
            file: file.to_owned(),
            expected: LENGTH_BYTES as u64,
            found: bytes.len() as u64,
        });
    };
    let found = u64::from_le_bytes(*length);
    let limit = HEADER_LIMIT.min(rest.len() as u64);
    if found > limit {
        return Err(Error::HeaderLength {
            file: file.to_owned(),
            limit,
            found,
        });
    }
    // Within `rest`, so it fits into a usize.
    Ok(rest.split_at(found as usize))
}

/// Checks one entry of a header; `expected` is the end of the previous tensor.
fn checked_spec(
    file: &Path,
    name: String,
    entry: RawTensor,
    expected: usize,
) -> Result<TensorSpec> {
    check_name(file, &name)?;
    let Some(dtype) = DType::from_name(&entry.dtype) else {
        return Err(Error::UnknownDType {
            file: file.to_owned(),
            tensor: name,
            found: shown(&entry.dtype),
        });
    };
    let (start, end) = entry.data_offsets;
    if start != expected || end < start {
        return Err(Error::Offsets {
            file: file.to_owned(),
            tensor: name,
            expected,
            found: (start, end),
        });
    }
    let spec = TensorSpec {
        name: name.into(),
        dtype,
        shape: entry.shape,
    };
    let needed = spec.n_bytes(file)?;
    if end - start != needed {
        return Err(Error::TensorLength {
            file: file.to_owned(),
            tensor: spec.name.to_string(),
            expected: needed,
            found: end - start,
        });
    }
    Ok(spec)
}

/// Checks that a name is fit for messages.
pub(crate) fn check_name(file: &Path, name: &str) -> Result<()> {
    if (1..=NAME_LIMIT).contains(&name.len()) && !name.chars().any(char::is_control) {
        return Ok(());
    }
    Err(Error::TensorName {
        file: file.to_owned(),
        limit: NAME_LIMIT,
        len: name.len(),
        found: shown(name),
    })
}

/// The first bytes of a file that holds these tensors in this order: length and header, padded so
/// that the data starts at a multiple of eight.
///
/// # Errors
/// If a shape is impossible, a name repeats, or the header would be too long to be read again.
pub(crate) fn encode(
    file: &Path,
    tensors: &[&TensorSpec],
    metadata: &BTreeMap<String, String>,
) -> Result<Vec<u8>> {
    let mut entries = serde_json::Map::new();
    // Also if empty: it makes a tensor of that name a repeated one.
    entries.insert(METADATA_KEY.to_owned(), json(file, metadata)?);
    let mut end = 0usize;
    for spec in tensors {
        check_name(file, &spec.name)?;
        if spec.dtype.block() > 1 {
            let found = spec.dtype.to_string();
            return Err(Error::UnsupportedDType { found });
        }
        let start = end;
        end = start
            .checked_add(spec.n_bytes(file)?)
            .ok_or_else(|| Error::ShapeOverflow {
                file: file.to_owned(),
                tensor: spec.name.to_string(),
                dtype: spec.dtype,
                found: spec.shape.clone(),
            })?;
        let entry = RawTensor {
            dtype: spec.dtype.to_string(),
            shape: spec.shape.clone(),
            data_offsets: (start, end),
        };
        if entries
            .insert(spec.name.to_string(), json(file, &entry)?)
            .is_some()
        {
            return Err(Error::DuplicateTensor {
                tensor: spec.name.to_string(),
                first: file.to_owned(),
                second: file.to_owned(),
            });
        }
    }
    let mut text = json(file, &entries)?.to_string().into_bytes();
    text.resize(text.len().next_multiple_of(LENGTH_BYTES), b' ');
    if text.len() as u64 > HEADER_LIMIT {
        return Err(Error::HeaderLength {
            file: file.to_owned(),
            limit: HEADER_LIMIT,
            found: text.len() as u64,
        });
    }
    let mut bytes = (text.len() as u64).to_le_bytes().to_vec();
    bytes.append(&mut text);
    Ok(bytes)
}

fn json(file: &Path, value: &impl Serialize) -> Result<serde_json::Value> {
    serde_json::to_value(value).map_err(|cause| Error::Json {
        path: file.to_owned(),
        cause,
    })
}

/// A header as written, unchecked except for its syntax and repeated keys.
struct RawHeader {
    metadata: BTreeMap<String, String>,
    tensors: Vec<(String, RawTensor)>,
}

/// A tensor's entry as written.
#[derive(Deserialize, Serialize)]
struct RawTensor {
    dtype: String,
    shape: Vec<usize>,
    data_offsets: (usize, usize),
}

impl<'de> Deserialize<'de> for RawHeader {
    fn deserialize<D: Deserializer<'de>>(deserializer: D) -> Result<Self, D::Error> {
        deserializer.deserialize_map(HeaderVisitor)
    }
}

struct HeaderVisitor;

impl<'de> Visitor<'de> for HeaderVisitor {
    type Value = RawHeader;

    fn expecting(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("an object")
    }

    fn visit_map<A: MapAccess<'de>>(self, mut map: A) -> Result<RawHeader, A::Error> {
        let mut seen: HashSet<Arc<str>> = HashSet::new();
        let mut header = RawHeader {
            metadata: BTreeMap::new(),
            tensors: Vec::new(),
        };
        while let Some(key) = map.next_key::<String>()? {
            let in_entry =
                |error: A::Error| A::Error::custom(format!("key `{}`: {error}", shown(&key)));
            if !seen.insert(key.as_str().into()) {
                return Err(in_entry(A::Error::custom("appears twice")));
            }
            if key == METADATA_KEY {
                let metadata: Option<OrderedMap<String>> = map.next_value().map_err(in_entry)?;
                header.metadata = metadata.unwrap_or_default().0.into_iter().collect();
            } else {
                let tensor = map.next_value().map_err(in_entry)?;
                header.tensors.push((key, tensor));
            }
        }
        Ok(header)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn file(header: &str, n_data: usize) -> Vec<u8> {
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.resize(bytes.len() + n_data, 0);
        bytes
    }

    fn refuse(bytes: &[u8], expected: &str) {
        let error = Header::parse(Path::new("m.safetensors"), bytes).unwrap_err();
        let found = error.to_string();
        assert!(
            found.contains(expected),
            "expected {expected:?} in {found:?}"
        );
        assert!(found.starts_with("`m.safetensors`: "), "{found}");
        let theirs = ::safetensors::SafeTensors::deserialize(bytes);
        // The reference implementation accepts repeated keys, odd names and sub-byte dtypes.
        let stricter = ["appears twice", "printable", "unknown dtype `F4`"];
        if !stricter.iter().any(|reason| found.contains(reason)) {
            assert!(
                theirs.is_err(),
                "the safetensors crate accepts what gives: {found}"
            );
        }
    }

    #[test]
    fn lengths_are_bounded_by_the_file_and_by_the_limit() {
        refuse(b"", "expected 8 bytes as its header says, found 0");
        refuse(&[1, 0, 0], "found 3");
        refuse(
            &[3, 0, 0, 0, 0, 0, 0, 0, b'{', b'}'],
            "at most 2 bytes, found 3",
        );
        refuse(&[0xff; 16], "at most 8 bytes, found 18446744073709551615");
        refuse(&file("", 0), "malformed safetensors header");
    }

    #[test]
    fn malformed_headers_are_refused_with_the_reason() {
        for (header, expected) in [
            ("[]", "malformed safetensors header: invalid type"),
            (r#"{"a": 3}"#, "key `a`: invalid type"),
            (
                r#"{"a": {"dtype": "F32", "shape": [1]}}"#,
                "key `a`: missing field `data_offsets`",
            ),
            (
                r#"{"a": {"dtype":"F32","shape":[-1],"data_offsets":[0,4]}}"#,
                "key `a`: invalid value",
            ),
            (
                r#"{"a": {"dtype":"F32","shape":[1.5],"data_offsets":[0,4]}}"#,
                "key `a`: invalid type",
            ),
            (
                r#"{"__metadata__": {"a": 1}}"#,
                "key `__metadata__`: key `a`: invalid type",
            ),
            (
                r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},
                    "a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}"#,
                "key `a`: appears twice",
            ),
            (
                r#"{"a":{"dtype":"Q9","shape":[1],"data_offsets":[0,4]}}"#,
                "malformed safetensors header",
            ),
        ] {
            let expected = if header.contains("Q9") {
                "tensor `a`: unknown dtype `Q9`"
            } else {
                expected
            };
            refuse(&file(header, 4), expected);
        }
    }

    #[test]
    fn tensors_that_do_not_tile_the_file_are_refused_by_name() {
        let max = usize::MAX;
        for (dtype, shape, offsets, expected) in [
            (
                "F4",
                "[8]",
                "[0,4]".to_owned(),
                "tensor `a`: unknown dtype `F4`",
            ),
            (
                "F32",
                "[1]",
                "[4,8]".to_owned(),
                "offsets that start at 0, found (4, 8)",
            ),
            (
                "F32",
                "[1]",
                "[0,8]".to_owned(),
                "tensor `a`: expected 4 bytes, found 8",
            ),
            ("F32", "[2]", "[0,8]".to_owned(), "bytes as its header says"),
            ("F32", "[0]", "[0,0]".to_owned(), "bytes as its header says"),
            (
                "F32",
                "[1]",
                format!("[{max},3]"),
                "offsets that start at 0",
            ),
            (
                "U8",
                "[18446744073709551615]",
                format!("[0,{max}]"),
                "bytes as its header says",
            ),
            (
                "U8",
                "[4294967296,4294967296]",
                "[0,4]".to_owned(),
                "an impossible shape",
            ),
        ] {
            let header = format!(
                r#"{{"a":{{"dtype":"{dtype}","shape":{shape},"data_offsets":{offsets}}}}}"#
            );
            let bytes = file(&header, 4);
            refuse(&bytes, expected);
        }
    }

    #[test]
    fn offsets_that_sum_up_to_the_address_space_are_refused_without_overflow() {
        // No tensor has 2^64 bits, and together they end at byte 2^64 - 1. Adding the header's
        // length to that overflows, as it does in the reference implementation.
        const LARGEST: usize = (1 << 61) - 1;
        let entry = |i: usize| {
            let start = i * LARGEST;
            let end = start.saturating_add(LARGEST);
            let size = end - start;
            format!(r#""{i}":{{"dtype":"U8","shape":[{size}],"data_offsets":[{start},{end}]}}"#)
        };
        let entries: Vec<String> = (0..9).map(entry).collect();
        let bytes = file(&format!("{{{}}}", entries.join(",")), 4);
        let error = Header::parse(Path::new("m"), &bytes).unwrap_err();
        assert!(matches!(error, Error::FileLength { .. }), "{error}");
    }

    #[test]
    fn names_must_be_printable_and_short() {
        let entry = r#"{"dtype":"F32","shape":[1],"data_offsets":[0,4]}"#;
        refuse(
            &file(&format!(r#"{{"":{entry}}}"#), 4),
            "printable tensor name",
        );
        refuse(
            &file(&format!(r#"{{"\u001b[2J":{entry}}}"#), 4),
            r"found 4: `\u{1b}[2J`",
        );
        let long = "x".repeat(5000);
        refuse(
            &file(&format!(r#"{{"{long}":{entry}}}"#), 4),
            "found 5000: `xxx",
        );
    }

    #[test]
    fn every_single_byte_change_of_a_small_file_parses_or_is_refused_without_a_panic() {
        let header = r#"{"a":{"dtype":"F32","shape":[1],"data_offsets":[0,4]},"b":{"dtype":"U8","shape":[2,2],"data_offsets":[4,8]}}"#;
        let whole = file(header, 8);
        for i in 0..whole.len() {
            let _ = Header::parse(Path::new("m"), &whole[..i]).unwrap_err();
            for byte in [0, b'0', b'9', b'"', b'{', b'}', b'[', b',', 0xff] {
                let mut changed = whole.clone();
                changed[i] = byte;
                let _ = Header::parse(Path::new("m"), &changed);
            }
        }
    }

    #[test]
    fn an_encoded_header_is_aligned_and_parses_here_and_in_the_safetensors_crate() {
        let specs = [
            TensorSpec {
                name: "b".into(),
                dtype: DType::F32,
                shape: vec![2, 3],
            },
            TensorSpec {
                name: "ä \" \\".into(),
                dtype: DType::F8E4M3,
                shape: vec![5],
            },
            TensorSpec {
                name: "none".into(),
                dtype: DType::I64,
                shape: vec![0, 9],
            },
        ];
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        let specs: Vec<_> = specs.iter().collect();
        let mut bytes = encode(Path::new("m"), &specs, &metadata).unwrap();
        assert_eq!(bytes.len() % 8, 0);
        bytes.resize(bytes.len() + 29, 0);

        let header = Header::parse(Path::new("m"), &bytes).unwrap();
        assert_eq!(header.metadata, metadata);
        let found: Vec<_> = header.tensors.iter().map(|(spec, _)| spec).collect();
        assert_eq!(found, specs);
        let theirs = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
        assert_eq!(theirs.tensor("b").unwrap().shape(), [2, 3]);
        assert_eq!(theirs.len(), 3);
    }
}
