//! Writes a GGUF whole or not at all: metadata and descriptions first, then the tensors' bytes as they arrive.
//!
//! A tensor may be larger than memory (a layer's stacked experts often are), so its bytes are taken in pieces. Everything
//! goes into a temporary sibling of the output, which is renamed at the end; before that it can be opened and compared.
//!
//! Source: ggml-org/ggml: docs/gguf.md.

use std::fs::File;
use std::io::{BufWriter, Write};
use std::path::{Path, PathBuf};

use serde_json::Value;
use tempfile::TempPath;

use super::{DEFAULT_ALIGNMENT, GGUF_MAGIC, malformed};
use crate::error::io;
use crate::file::{expect_absent, name_file, temporary_file};
use crate::{Error, Result, TensorSpec};

const VERSION: u32 = 3;
/// Bytes that are collected before they are written.
const BUFFER_BYTES: usize = 1 << 20;

/// A value of a GGUF's metadata, with its type in the file.
#[derive(Clone, Debug, PartialEq)]
pub enum GgufValue {
    /// A whole number.
    Count(u32),
    /// A number.
    Number(f32),
    /// True or false.
    Flag(bool),
    /// A text.
    Text(String),
    /// Texts.
    Texts(Vec<String>),
    /// Numbers.
    Numbers(Vec<f32>),
    /// Whole numbers.
    Integers(Vec<i32>),
}

/// A GGUF being written. Dropped before [`finish`](Self::finish), it leaves nothing.
#[derive(Debug)]
pub struct GgufWriter {
    file: BufWriter<File>,
    temporary: TempPath,
    output: PathBuf,
    /// Name and bytes of each tensor.
    tensors: Vec<(String, u64)>,
    /// The tensor that is being written, and its bytes so far.
    at: (usize, u64),
}

impl GgufWriter {
    /// Starts a file that will be at `out`, with its metadata and the descriptions of its tensors: their names in a GGUF,
    /// their shapes from the outermost dimension in. Missing folders are created.
    ///
    /// # Errors
    /// If `out` exists, GGUF files do not have a dtype, or writing fails.
    pub fn create(
        out: &Path,
        metadata: &[(String, GgufValue)],
        tensors: &[TensorSpec],
    ) -> Result<Self> {
        expect_absent(out)?;
        let header = header(out, metadata, tensors)?;
        let (file, temporary) = temporary_file(out)?.into_parts();
        let sizes = tensors
            .iter()
            .map(|spec| Ok((spec.name.to_string(), spec.n_bytes(out)? as u64)));
        let mut writer = Self {
            file: BufWriter::with_capacity(BUFFER_BYTES, file),
            temporary,
            output: out.to_owned(),
            tensors: sizes.collect::<Result<_>>()?,
            at: (0, 0),
        };
        writer.put(&header)?;
        writer.pass_complete()?;
        Ok(writer)
    }

    /// The temporary file, for reading back what was written.
    pub fn path(&self) -> &Path {
        &self.temporary
    }

    /// The next bytes: of the first tensor, then of the second, and so on. A tensor may take any number of calls.
    ///
    /// # Errors
    /// If they reach beyond the end of a tensor, or writing fails. The writer can only be dropped then.
    pub fn write(&mut self, bytes: &[u8]) -> Result<()> {
        let (i, so_far) = self.at;
        let written = so_far + bytes.len() as u64;
        match self.tensors.get(i) {
            Some((_, size)) if written <= *size => {}
            Some(_) => return Err(self.length(i, written)),
            None if bytes.is_empty() => return Ok(()),
            None => {
                let problem = "expected no bytes after the last tensor".into();
                return Err(malformed(&self.output, problem));
            }
        }
        self.put(bytes)?;
        self.at.1 = written;
        self.pass_complete()
    }

    /// Moves on past every tensor that is complete, with the padding after it.
    fn pass_complete(&mut self) -> Result<()> {
        while let (i, so_far) = self.at
            && self.tensors.get(i).is_some_and(|(_, size)| *size == so_far)
        {
            self.put(padding(so_far as usize))?;
            self.at = (i + 1, 0);
        }
        Ok(())
    }

    /// Flushes what is buffered, so that [`path`](Self::path) is a whole GGUF.
    ///
    /// # Errors
    /// If a tensor is not complete, or writing fails.
    pub fn flush(&mut self) -> Result<()> {
        if self.at.0 < self.tensors.len() {
            return Err(self.length(self.at.0, self.at.1));
        }
        self.file.flush().map_err(io("write", &self.temporary))
    }

    /// Flushes everything to the disk, and gives the file its name.
    ///
    /// # Errors
    /// If a tensor is not complete, or writing or renaming fails; nothing is left behind then.
    pub fn finish(mut self) -> Result<()> {
        self.flush()?;
        name_file(self.file.get_ref(), self.temporary, &self.output)
    }

    fn put(&mut self, bytes: &[u8]) -> Result<()> {
        self.file
            .write_all(bytes)
            .map_err(io("write", &self.temporary))
    }

    fn length(&self, i: usize, found: u64) -> Error {
        let (tensor, expected) = &self.tensors[i];
        Error::TensorLength {
            file: self.output.clone(),
            tensor: tensor.clone(),
            expected: *expected as usize,
            found: found as usize,
        }
    }
}

/// The padding after this number of bytes.
fn padding(len: usize) -> &'static [u8] {
    const ZEROS: [u8; DEFAULT_ALIGNMENT] = [0; DEFAULT_ALIGNMENT];
    &ZEROS[..len.next_multiple_of(DEFAULT_ALIGNMENT) - len]
}

/// Everything before the tensors' bytes.
fn header(out: &Path, metadata: &[(String, GgufValue)], tensors: &[TensorSpec]) -> Result<Vec<u8>> {
    let mut header = [GGUF_MAGIC, &VERSION.to_le_bytes()].concat();
    header.extend((tensors.len() as u64).to_le_bytes());
    header.extend((metadata.len() as u64).to_le_bytes());
    for (key, value) in metadata {
        put_text(&mut header, key);
        value.put(&mut header);
    }
    let mut offset = 0u64;
    for spec in tensors {
        put_text(&mut header, &spec.name);
        header.extend((spec.shape.len() as u32).to_le_bytes());
        for size in spec.shape.iter().rev() {
            header.extend((*size as u64).to_le_bytes());
        }
        let number = spec.dtype.to_ggml().ok_or_else(|| {
            let (name, dtype) = (&spec.name, spec.dtype);
            malformed(
                out,
                format!("tensor `{name}`: expected a type of ggml's, found {dtype}"),
            )
        })?;
        header.extend(number.to_le_bytes());
        header.extend(offset.to_le_bytes());
        let size = spec.n_bytes(out)?;
        offset += (size + padding(size).len()) as u64;
    }
    header.extend_from_slice(padding(header.len()));
    Ok(header)
}

fn put_text(out: &mut Vec<u8>, text: &str) {
    out.extend((text.len() as u64).to_le_bytes());
    out.extend_from_slice(text.as_bytes());
}

impl GgufValue {
    const COUNT: u32 = 4;
    const INTEGER: u32 = 5;
    const NUMBER: u32 = 6;
    const FLAG: u32 = 7;
    const TEXT: u32 = 8;
    const LIST: u32 = 9;

    /// Type and value.
    fn put(&self, out: &mut Vec<u8>) {
        let list = |out: &mut Vec<u8>, kind: u32, len: usize| {
            out.extend(Self::LIST.to_le_bytes());
            out.extend(kind.to_le_bytes());
            out.extend((len as u64).to_le_bytes());
        };
        let mut kind = |kind: u32| out.extend(kind.to_le_bytes());
        match self {
            Self::Count(value) => {
                kind(Self::COUNT);
                out.extend(value.to_le_bytes());
            }
            Self::Number(value) => {
                kind(Self::NUMBER);
                out.extend(value.to_le_bytes());
            }
            Self::Flag(value) => {
                kind(Self::FLAG);
                out.push(u8::from(*value));
            }
            Self::Text(text) => {
                kind(Self::TEXT);
                put_text(out, text);
            }
            Self::Texts(texts) => {
                list(out, Self::TEXT, texts.len());
                texts.iter().for_each(|text| put_text(out, text));
            }
            Self::Numbers(values) => {
                list(out, Self::NUMBER, values.len());
                out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
            Self::Integers(values) => {
                list(out, Self::INTEGER, values.len());
                out.extend(values.iter().flat_map(|value| value.to_le_bytes()));
            }
        }
    }

    /// A value as it was read; none if it has no exact type here.
    pub fn of(value: &Value) -> Option<Self> {
        let integer = |value: &Value| i32::try_from(value.as_i64()?).ok();
        let number = |value: &Value| value.as_f64().map(|value| value as f32);
        match value {
            Value::Bool(flag) => Some(Self::Flag(*flag)),
            Value::String(text) => Some(Self::Text(text.clone())),
            Value::Number(n) if n.is_f64() => number(value).map(Self::Number),
            Value::Number(n) => Some(Self::Count(u32::try_from(n.as_u64()?).ok()?)),
            Value::Array(values) => {
                let texts = values.iter().map(|value| value.as_str().map(str::to_owned));
                let integers = values.iter().map(integer);
                let numbers = values.iter().map(number);
                let texts = texts.collect::<Option<_>>().map(Self::Texts);
                texts
                    .or_else(|| integers.collect::<Option<_>>().map(Self::Integers))
                    .or_else(|| numbers.collect::<Option<_>>().map(Self::Numbers))
            }
            Value::Null | Value::Object(_) => None,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::Arc;

    use super::*;
    use crate::DType;
    use crate::gguf::Gguf;

    fn spec(name: &str, dtype: DType, shape: &[usize]) -> TensorSpec {
        TensorSpec {
            name: Arc::from(name),
            dtype,
            shape: shape.to_vec(),
        }
    }

    fn metadata() -> Vec<(String, GgufValue)> {
        let entries = [
            ("general.architecture", GgufValue::Text("llama".into())),
            ("count", GgufValue::Count(7)),
            ("number", GgufValue::Number(1e-5)),
            ("flag", GgufValue::Flag(true)),
            ("texts", GgufValue::Texts(vec!["a".into(), "ä".into()])),
            ("numbers", GgufValue::Numbers(vec![0.5, -1.0])),
            ("integers", GgufValue::Integers(vec![-3, 4])),
        ];
        entries.map(|(key, value)| (key.into(), value)).to_vec()
    }

    fn specs() -> [TensorSpec; 3] {
        [
            spec("a", DType::F32, &[3]),
            spec("empty", DType::F16, &[0, 4]),
            spec("blocks", DType::Q8_0, &[2, 64]),
        ]
    }

    #[test]
    fn what_is_written_is_read() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/m.gguf");
        let mut writer = GgufWriter::create(&path, &metadata(), &specs()).unwrap();
        let blocks: Vec<u8> = (0..136).collect();
        // In pieces that end anywhere.
        writer.write(&[1, 2, 3, 4, 5]).unwrap();
        writer.write(&[6, 7, 8, 9, 10, 11, 12]).unwrap();
        writer.write(&blocks[..50]).unwrap();
        writer.write(&blocks[50..]).unwrap();
        assert!(!path.exists());
        writer.flush().unwrap();
        assert_eq!(Gguf::open(writer.path()).unwrap().files[0].1.len(), 3);
        writer.finish().unwrap();
        let gguf = Gguf::open(&path).unwrap();
        for (key, value) in metadata() {
            assert_eq!(GgufValue::of(&gguf.metadata[&key]), Some(value), "{key}");
        }
        let tensors = &gguf.files[0].1;
        assert_eq!(
            tensors[0].bytes[..],
            [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12]
        );
        assert_eq!(
            (tensors[1].shape.as_slice(), tensors[1].bytes.len()),
            (&[0, 4][..], 0)
        );
        assert_eq!(tensors[2].bytes[..], blocks);
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
        let error = GgufWriter::create(&path, &[], &[]).unwrap_err().to_string();
        assert!(error.contains("m.gguf"), "{error}");
    }

    #[test]
    fn what_does_not_fit_is_refused_and_leaves_nothing() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("m.gguf");
        let create = || GgufWriter::create(&path, &metadata(), &specs()).unwrap();
        let error = |result: Result<()>| result.unwrap_err().to_string();
        let mut long = create();
        assert!(error(long.write(&[0; 13])).contains("tensor `a`: expected 12 bytes, found 13"));
        let mut short = create();
        short.write(&[0; 12]).unwrap();
        short.write(&[0; 135]).unwrap();
        assert!(error(short.finish()).contains("tensor `blocks`: expected 136 bytes, found 135"));
        let mut further = create();
        further.write(&[0; 12]).unwrap();
        further.write(&[0; 136]).unwrap();
        further.write(&[]).unwrap();
        assert!(error(further.write(&[0])).contains("after the last tensor"));
        drop(further);
        drop(long);
        let scales = [spec("s", DType::F8E4M3, &[1])];
        let refused = GgufWriter::create(&path, &[], &scales)
            .unwrap_err()
            .to_string();
        assert!(
            refused.contains("expected a type of ggml's, found F8_E4M3"),
            "{refused}"
        );
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }
}
