//! A GGUF file: metadata and tensors in one file, in llama.cpp's format.
//!
//! A file is a magic number, a version, two counts, the metadata (key, type, value), the tensors' descriptions (name,
//! dimensions from the innermost out, type, offset), padding, and the tensors' bytes, each padded. A model may be cut into
//! several files, named `….-00001-of-00003.gguf`. The module [`origin`] undoes the changes of the conversion from a Hugging
//! Face folder.
//!
//! Source: ggml-org/ggml: docs/gguf.md; ggml-org/llama.cpp: ggml/src/gguf.cpp (the checks).

pub(crate) mod layout;
mod names;
pub(crate) mod origin;
mod rope;
pub(crate) mod settings;
pub(crate) mod writer;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use bytes::Bytes;
use serde_json::Value;

use crate::dtype::DType;
use crate::error::shown;
use crate::header::check_name;
use crate::map::map;
use crate::{Error, Result, Tensor, TensorSpec};

const GGUF_MAGIC: &[u8] = b"GGUF";
/// Supported versions, which do not differ in anything that is read here. The first had counts of 32 bits.
const VERSIONS: [u32; 2] = [2, 3];
const DEFAULT_ALIGNMENT: usize = 32;
/// Maximum number of dimensions of ggml's tensors.
const MOST_DIMENSIONS: u32 = 4;
/// Minimum size of a metadata entry and of a tensor's description: they bound the counts.
const SMALLEST_ENTRY: usize = 13;
const SMALLEST_TENSOR: usize = 24;

/// The content of a GGUF model, of all its files.
#[derive(Clone, Debug)]
pub struct Gguf {
    /// The metadata of the first file: numbers, texts, and lists of them.
    pub(crate) metadata: BTreeMap<String, Value>,
    /// The files, and the tensors of each.
    pub(crate) files: Vec<(PathBuf, Vec<Tensor>)>,
}

impl Gguf {
    /// Maps a file, and the other parts of a split model.
    ///
    /// # Errors
    /// If a file cannot be mapped, is malformed, or is another part than expected.
    pub fn open(path: &Path) -> Result<Self> {
        let (metadata, tensors) = parse(path, &map(path)?)?;
        let number = |metadata: &BTreeMap<String, Value>, key: &str| {
            metadata.get(key).and_then(Value::as_u64).unwrap_or(0)
        };
        let first = number(&metadata, "split.no");
        if first != 0 {
            let problem = format!(
                "expected the first part of a split model, found part {}",
                first + 1
            );
            return Err(malformed(path, problem));
        }
        let mut files = vec![(path.to_owned(), tensors)];
        for part in 1..number(&metadata, "split.count") {
            let path = sibling(path, part, number(&metadata, "split.count"))?;
            let (part_metadata, tensors) = parse(&path, &map(&path)?)?;
            let found = number(&part_metadata, "split.no");
            if found != part {
                return Err(malformed(
                    &path,
                    format!("expected `split.no` {part}, found {found}"),
                ));
            }
            files.push((path, tensors));
        }
        Ok(Self { metadata, files })
    }
}

impl Gguf {
    /// The value of a key of the metadata.
    pub fn metadata(&self, key: &str) -> Option<&Value> {
        self.metadata.get(key)
    }

    /// Its tensors under their names in the GGUF.
    pub fn tensors(&self) -> impl Iterator<Item = &Tensor> {
        self.files.iter().flat_map(|file| &file.1)
    }

    /// An error about its content.
    pub fn malformed(&self, problem: String) -> Error {
        let file = self.files.first().map(|file| file.0.as_path());
        malformed(file.unwrap_or(Path::new("")), problem)
    }
}

/// The file of another part of a split model.
fn sibling(path: &Path, part: u64, count: u64) -> Result<PathBuf> {
    let name = path
        .file_name()
        .map(|name| name.to_string_lossy().into_owned());
    let first = format!("-00001-of-{count:05}.gguf");
    let stem = name.as_deref().and_then(|name| name.strip_suffix(&first));
    let stem = stem.ok_or_else(|| {
        let problem =
            format!("expected a name that ends in `{first}`, as the first part of {count} has");
        malformed(path, problem)
    })?;
    Ok(path.with_file_name(format!("{stem}-{:05}-of-{count:05}.gguf", part + 1)))
}

pub(crate) fn malformed(file: &Path, problem: String) -> Error {
    Error::Gguf {
        file: file.to_owned(),
        problem,
    }
}

type Parsed = (BTreeMap<String, Value>, Vec<Tensor>);

fn parse(file: &Path, bytes: &Bytes) -> Result<Parsed> {
    let mut reader = GgufReader { file, bytes, at: 0 };
    if reader.take(GGUF_MAGIC.len(), "the magic number")? != GGUF_MAGIC {
        return Err(malformed(
            file,
            "expected a file that begins with `GGUF`".into(),
        ));
    }
    let version = u32::from_le_bytes(reader.array("the version")?);
    if !VERSIONS.contains(&version) {
        let problem = match version.swap_bytes() {
            2 | 3 => "expected little-endian numbers, found big-endian ones".into(),
            _ => format!("expected version 2 or 3, found {version}"),
        };
        return Err(malformed(file, problem));
    }
    let n_tensors = reader.count("the number of tensors", SMALLEST_TENSOR)?;
    let n_entries = reader.count("the number of metadata entries", SMALLEST_ENTRY)?;
    let mut metadata = BTreeMap::new();
    for _ in 0..n_entries {
        let key = reader.text("a metadata key")?;
        check_name(file, key)?;
        let kind = u32::from_le_bytes(reader.array(key)?);
        let value = reader.value(key, kind)?;
        if metadata.insert(key.to_owned(), value).is_some() {
            return Err(malformed(
                file,
                format!("key `{}` appears twice", shown(key)),
            ));
        }
    }
    let alignment = alignment(file, metadata.get("general.alignment"))?;
    let specs = (0..n_tensors)
        .map(|_| reader.tensor())
        .collect::<Result<Vec<_>>>()?;
    let start = reader.at.next_multiple_of(alignment);
    let tensors = place(file, bytes, start, alignment, specs)?;
    Ok((metadata, tensors))
}

fn alignment(file: &Path, value: Option<&Value>) -> Result<usize> {
    let Some(value) = value else {
        return Ok(DEFAULT_ALIGNMENT);
    };
    let alignment = value.as_u64().and_then(|n| usize::try_from(n).ok());
    let fits = |n: &usize| n.is_power_of_two() && (8..=1 << 20).contains(n);
    alignment.filter(fits).ok_or_else(|| {
        let problem =
            format!("key `general.alignment`: expected a power of two from 8 on, found {value}");
        malformed(file, problem)
    })
}

/// Assigns each tensor its bytes, which are padded and in the order of the descriptions.
fn place(
    file: &Path,
    bytes: &Bytes,
    start: usize,
    alignment: usize,
    specs: Vec<(TensorSpec, u64)>,
) -> Result<Vec<Tensor>> {
    let shared: Arc<Path> = file.into();
    let (mut end, mut tensors) = (0usize, Vec::with_capacity(specs.len()));
    for (spec, offset) in specs {
        let size = spec.n_bytes(file)?;
        if offset != end as u64 {
            let name = &spec.name;
            let problem = format!("tensor `{name}`: expected offset {end}, found {offset}");
            return Err(malformed(file, problem));
        }
        let from = start.checked_add(end);
        let to = from.and_then(|from| from.checked_add(size));
        let (Some(from), Some(to)) = (from, to.filter(|to| *to <= bytes.len())) else {
            return Err(Error::FileLength {
                file: file.to_owned(),
                expected: (start as u64)
                    .saturating_add(end as u64)
                    .saturating_add(size as u64),
                found: bytes.len() as u64,
            });
        };
        end = (to - start).next_multiple_of(alignment);
        tensors.push(Tensor {
            name: spec.name,
            file: Arc::clone(&shared),
            dtype: spec.dtype,
            shape: spec.shape,
            bytes: bytes.slice(from..to),
        });
    }
    let mut names: Vec<&str> = tensors.iter().map(|tensor| &*tensor.name).collect();
    names.sort_unstable();
    match names.windows(2).find(|pair| pair[0] == pair[1]) {
        Some(pair) => Err(malformed(
            file,
            format!("tensor `{}` appears twice", pair[0]),
        )),
        None => Ok(tensors),
    }
}

/// Reads one item after another, never past the end.
struct GgufReader<'a> {
    file: &'a Path,
    bytes: &'a [u8],
    at: usize,
}

impl<'a> GgufReader<'a> {
    fn take(&mut self, len: usize, what: &str) -> Result<&'a [u8]> {
        let rest = self.bytes.get(self.at..).unwrap_or_default();
        let Some(taken) = rest.get(..len) else {
            let (what, left) = (shown(what), rest.len());
            let problem = format!(
                "`{what}` at byte {}: expected {len} more bytes, found {left}",
                self.at
            );
            return Err(malformed(self.file, problem));
        };
        self.at += len;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self, what: &str) -> Result<[u8; N]> {
        let mut array = [0; N];
        array.copy_from_slice(self.take(N, what)?);
        Ok(array)
    }

    /// A count of items that take at least `smallest` bytes each.
    fn count(&mut self, what: &str, smallest: usize) -> Result<usize> {
        let found = u64::from_le_bytes(self.array(what)?);
        let most = (self.bytes.len() - self.at) / smallest.max(1);
        match usize::try_from(found) {
            Ok(count) if count <= most => Ok(count),
            _ => {
                let what = shown(what);
                let problem = format!(
                    "`{what}`: expected at most {most} in what is left of the file, found {found}"
                );
                Err(malformed(self.file, problem))
            }
        }
    }

    fn text(&mut self, what: &str) -> Result<&'a str> {
        let len = self.count(what, 1)?;
        let bytes = self.take(len, what)?;
        std::str::from_utf8(bytes).map_err(|cause| {
            malformed(
                self.file,
                format!("`{}`: expected UTF-8: {cause}", shown(what)),
            )
        })
    }

    fn value(&mut self, key: &str, kind: u32) -> Result<Value> {
        const TEXT: u32 = 8;
        const LIST: u32 = 9;
        Ok(match kind {
            TEXT => self.text(key)?.into(),
            LIST => {
                let kind = u32::from_le_bytes(self.array(key)?);
                if kind == LIST {
                    let problem = format!(
                        "key `{}`: expected a list of values, found one of lists",
                        shown(key)
                    );
                    return Err(malformed(self.file, problem));
                }
                let smallest = if kind == TEXT { 8 } else { 1 };
                let count = self.count(key, smallest)?;
                let values = (0..count).map(|_| self.scalar_or_text(key, kind));
                Value::Array(values.collect::<Result<_>>()?)
            }
            _ => self.scalar_or_text(key, kind)?,
        })
    }

    fn scalar_or_text(&mut self, key: &str, kind: u32) -> Result<Value> {
        Ok(match kind {
            0 => u8::from_le_bytes(self.array(key)?).into(),
            1 => i8::from_le_bytes(self.array(key)?).into(),
            2 => u16::from_le_bytes(self.array(key)?).into(),
            3 => i16::from_le_bytes(self.array(key)?).into(),
            4 => u32::from_le_bytes(self.array(key)?).into(),
            5 => i32::from_le_bytes(self.array(key)?).into(),
            6 => decimal(f32::from_le_bytes(self.array(key)?)),
            7 => (self.array::<1>(key)? != [0]).into(),
            8 => self.text(key)?.into(),
            10 => u64::from_le_bytes(self.array(key)?).into(),
            11 => i64::from_le_bytes(self.array(key)?).into(),
            12 => f64::from_le_bytes(self.array(key)?).into(),
            _ => {
                let problem = format!("key `{}`: unknown type {kind}", shown(key));
                return Err(malformed(self.file, problem));
            }
        })
    }

    fn tensor(&mut self) -> Result<(TensorSpec, u64)> {
        let name = self.text("a tensor's name")?;
        check_name(self.file, name)?;
        let n_dimensions = u32::from_le_bytes(self.array(name)?);
        if n_dimensions > MOST_DIMENSIONS {
            let problem = format!(
                "tensor `{name}`: expected at most {MOST_DIMENSIONS} dimensions, found {n_dimensions}"
            );
            return Err(malformed(self.file, problem));
        }
        let mut shape = Vec::new();
        for _ in 0..n_dimensions {
            let size = u64::from_le_bytes(self.array(name)?);
            let size = usize::try_from(size).map_err(|_| {
                malformed(
                    self.file,
                    format!("tensor `{name}`: an impossible dimension, {size}"),
                )
            })?;
            // The file has dimensions from the innermost out, a tensor from the outermost in.
            shape.insert(0, size);
        }
        let kind = u32::from_le_bytes(self.array(name)?);
        let dtype = DType::from_ggml(kind).ok_or_else(|| Error::UnknownDType {
            file: self.file.to_owned(),
            tensor: name.to_owned(),
            found: DType::other_ggml(kind),
        })?;
        let spec = TensorSpec {
            name: name.into(),
            dtype,
            shape,
        };
        Ok((spec, u64::from_le_bytes(self.array(name)?)))
    }
}

/// A number as people write it: 1e-5 in f32 is 1e-5, not the f64 of the same bits. Null if it is not finite.
fn decimal(value: f32) -> Value {
    value
        .to_string()
        .parse::<f64>()
        .map_or(Value::Null, Value::from)
}

#[cfg(test)]
pub(crate) mod tests;
