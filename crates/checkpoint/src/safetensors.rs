//! One safetensors file: mapped to read, streamed to write.

use std::cmp::Reverse;
use std::collections::{BTreeMap, HashMap};
use std::io::Write;
use std::path::Path;
use std::sync::Arc;

use crate::error::io;
use crate::file::write_atomically;
use crate::header::{self, Header};
use crate::map::map;
use crate::{Error, Result, Tensor, TensorSpec};

/// A mapped safetensors file. The tensors are slices of the map.
///
/// The file must not change while any of its tensors is in use: truncating it makes reads past
/// its new end fatal.
#[derive(Clone, Debug)]
pub struct Safetensors {
    file: Arc<Path>,
    tensors: Vec<Tensor>,
    by_name: HashMap<Arc<str>, usize>,
    metadata: BTreeMap<String, String>,
}

impl Safetensors {
    /// Maps a file and checks its header against its length.
    ///
    /// # Errors
    /// If the file cannot be mapped, its header is malformed, or its tensors do not fill it
    /// exactly.
    pub fn open(path: &Path) -> Result<Self> {
        let bytes = map(path)?;
        let header = Header::parse(path, &bytes)?;
        let file: Arc<Path> = path.into();
        let tensors: Vec<Tensor> = header
            .tensors
            .into_iter()
            .map(|(spec, range)| Tensor {
                name: spec.name,
                file: Arc::clone(&file),
                dtype: spec.dtype,
                shape: spec.shape,
                bytes: bytes.slice(range),
            })
            .collect();
        let names = tensors.iter().map(|tensor| Arc::clone(&tensor.name));
        let by_name = names.enumerate().map(|(i, name)| (name, i)).collect();
        Ok(Self {
            file,
            tensors,
            by_name,
            metadata: header.metadata,
        })
    }

    /// The file's path.
    pub fn path(&self) -> &Path {
        &self.file
    }

    /// The tensors, in the order of their bytes in the file.
    pub fn tensors(&self) -> &[Tensor] {
        &self.tensors
    }

    /// Whether there is a tensor of that name.
    pub fn contains(&self, name: &str) -> bool {
        self.by_name.contains_key(name)
    }

    /// The tensor of that name.
    ///
    /// # Errors
    /// If there is none.
    pub fn tensor(&self, name: &str) -> Result<Tensor> {
        let tensor = self.by_name.get(name).and_then(|&i| self.tensors.get(i));
        tensor.cloned().ok_or_else(|| Error::NoTensor {
            path: self.file.to_path_buf(),
            tensor: name.to_owned(),
        })
    }

    /// The free text in the header, such as `format`: `pt`.
    pub fn metadata(&self) -> &BTreeMap<String, String> {
        &self.metadata
    }
}

/// Writes a safetensors file in one step, one tensor after another, the wider dtypes first so
/// that every tensor is aligned.
///
/// # Errors
/// If a name repeats, a tensor's bytes do not fit its shape, or writing fails; nothing is left
/// behind then.
pub fn write_safetensors(
    path: &Path,
    tensors: &[Tensor],
    metadata: &BTreeMap<String, String>,
) -> Result<()> {
    let specs: Vec<TensorSpec> = tensors.iter().map(Tensor::spec).collect();
    write_atomically(path, |file, temporary| {
        let produce = |i: usize| Ok(tensors[i].bytes.clone());
        stream(file, temporary, &specs, metadata, produce)
    })
}

/// Writes the header, then one tensor after another.
///
/// # Errors
/// If the specs make no header, `produce` fails or returns another number of bytes than its
/// spec needs, or writing fails.
pub(crate) fn stream<B: AsRef<[u8]>>(
    output: &mut impl Write,
    path: &Path,
    specs: &[TensorSpec],
    metadata: &BTreeMap<String, String>,
    mut produce: impl FnMut(usize) -> Result<B>,
) -> Result<()> {
    // Others read a tensor in place and need it aligned: as in the safetensors crate, the wider
    // dtypes come first. The sort is stable, so their order is otherwise the caller's.
    let mut order: Vec<usize> = (0..specs.len()).collect();
    order.sort_by_key(|&i| Reverse(specs[i].dtype.size_bytes()));
    let in_order: Vec<&TensorSpec> = order.iter().map(|&i| &specs[i]).collect();

    let header = header::encode(path, &in_order, metadata)?;
    output.write_all(&header).map_err(io("write", path))?;
    for i in order {
        let spec = &specs[i];
        let bytes = produce(i)?;
        let bytes = bytes.as_ref();
        let expected = spec.n_bytes(path)?;
        if bytes.len() != expected {
            return Err(Error::TensorLength {
                file: path.to_owned(),
                tensor: spec.name.to_string(),
                expected,
                found: bytes.len(),
            });
        }
        output.write_all(bytes).map_err(io("write", path))?;
    }
    output.flush().map_err(io("write", path))
}

#[cfg(test)]
mod tests {
    use std::fs;

    use bytes::Bytes;

    use super::*;
    use crate::DType;

    fn tensors() -> Vec<Tensor> {
        let new = |name, dtype, shape: &[usize], bytes: &'static [u8]| {
            Tensor::new(name, dtype, shape, Bytes::from_static(bytes)).unwrap()
        };
        vec![
            new("scales", DType::F8E8M0, &[3], &[127, 128, 126]),
            new("bias", DType::F32, &[], &[0, 0, 0x80, 0x3f]),
            new("weight", DType::BF16, &[1, 2], &[0x80, 0x3f, 0, 0]),
        ]
    }

    #[test]
    fn what_is_written_reads_back_here_and_in_the_safetensors_crate() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        write_safetensors(&path, &tensors(), &metadata).unwrap();

        let file = Safetensors::open(&path).unwrap();
        assert_eq!(file.metadata(), &metadata);
        let names: Vec<_> = file.tensors().iter().map(|tensor| &*tensor.name).collect();
        assert_eq!(
            names,
            ["bias", "weight", "scales"],
            "the wider dtypes come first"
        );
        let bytes = fs::read(&path).unwrap();
        let theirs = ::safetensors::SafeTensors::deserialize(&bytes).unwrap();
        for expected in tensors() {
            let found = file.tensor(&expected.name).unwrap();
            assert_eq!(
                (found.spec(), &found.bytes),
                (expected.spec(), &expected.bytes)
            );
            assert_eq!(
                theirs.tensor(&expected.name).unwrap().data(),
                &*expected.bytes
            );
        }
        assert_eq!(file.tensor("bias").unwrap().to_f32().unwrap(), [1.0]);
    }

    #[test]
    fn tensors_share_the_map_and_outlive_the_file_handle() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        write_safetensors(&path, &tensors(), &BTreeMap::new()).unwrap();
        let file = Safetensors::open(&path).unwrap();
        let tensor = file.tensor("weight").unwrap();
        assert_eq!(tensor.bytes.as_ptr(), tensor.clone().bytes.as_ptr());
        assert_eq!(tensor.bytes.as_ptr(), file.tensors()[1].bytes.as_ptr());
        drop(file);
        assert_eq!(tensor.to_f32().unwrap(), [1.0, 0.0]);
    }

    #[test]
    fn a_file_with_misaligned_tensors_reads() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let header = r#"{"a":{"dtype":"U8","shape":[1],"data_offsets":[0,1]},"b":{"dtype":"F32","shape":[1],"data_offsets":[1,5]}}"#;
        let mut bytes = (header.len() as u64).to_le_bytes().to_vec();
        bytes.extend_from_slice(header.as_bytes());
        bytes.push(7);
        bytes.extend_from_slice(&2.5f32.to_le_bytes());
        fs::write(&path, bytes).unwrap();
        let file = Safetensors::open(&path).unwrap();
        assert_eq!(file.tensor("b").unwrap().to_f32().unwrap(), [2.5]);
    }

    #[test]
    fn files_that_are_none_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let refuse = |path: &Path, expected: &str| {
            let error = Safetensors::open(path).unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
            assert!(error.contains(&path.display().to_string()), "{error}");
        };
        refuse(folder.path(), "expected a file, found a folder");
        refuse(
            Path::new("/dev/null"),
            "expected a file, found a pipe or device",
        );
        refuse(&folder.path().join("absent"), "cannot read");
        let empty = folder.path().join("empty");
        fs::write(&empty, b"").unwrap();
        refuse(&empty, "expected 8 bytes as its header says, found 0");
    }

    #[test]
    fn a_truncated_file_and_one_with_extra_bytes_are_refused() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        write_safetensors(&path, &tensors(), &BTreeMap::new()).unwrap();
        let bytes = fs::read(&path).unwrap();
        for end in [bytes.len() - 1, bytes.len() - 11] {
            fs::write(&path, &bytes[..end]).unwrap();
            let error = Safetensors::open(&path).unwrap_err();
            assert!(matches!(error, Error::FileLength { .. }), "{error}");
        }
        fs::write(&path, [bytes.as_slice(), &[0]].concat()).unwrap();
        let error = Safetensors::open(&path).unwrap_err();
        assert!(matches!(error, Error::FileLength { .. }), "{error}");
    }

    #[test]
    fn a_repeated_name_is_not_written() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("x.safetensors");
        let twice = [tensors(), tensors()].concat();
        let error = write_safetensors(&path, &twice, &BTreeMap::new()).unwrap_err();
        assert!(matches!(error, Error::DuplicateTensor { .. }), "{error}");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 0);
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_is_an_error_that_names_the_file() {
        let path = Path::new("/dev/full");
        let mut output = fs::File::options().write(true).open(path).unwrap();
        let tensors = tensors();
        let specs: Vec<_> = tensors.iter().map(Tensor::spec).collect();
        let produce = |i: usize| Ok(&tensors[i].bytes);
        let error = stream(&mut output, path, &specs, &BTreeMap::new(), produce).unwrap_err();
        assert!(
            error
                .to_string()
                .starts_with("cannot write `/dev/full`: No space left"),
            "{error}"
        );
    }
}
