//! Writes a model folder whole or not at all, one tensor in memory at a time.
//!
//! Everything goes into a temporary sibling of the output, which is renamed at the end. So the
//! output either does not exist or is complete, and a caller can reload and compare the files
//! before they get their name.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::path::{Path, PathBuf};

use serde::Serialize;
use serde_json::{Value, json};
use sha2::{Digest, Sha256};
use tempfile::TempDir;

use crate::error::{io, shown};
use crate::file::{expect_file, name_folder, sync_folder, temporary_folder};
use crate::folder::{INDEX_NAME, SINGLE_NAME, is_plain_file_name};
use crate::safetensors::stream;
use crate::{Error, Result, TensorSpec};

/// Lists every file of a finished folder with its size and hash.
const MANIFEST_NAME: &str = "moeforge.manifest.json";

/// A model folder being written. Dropped before [`finish`](Self::finish), it leaves nothing.
#[derive(Debug)]
pub struct FolderWriter {
    temporary: TempDir,
    output: PathBuf,
    files: BTreeMap<String, FileDigest>,
    /// Tensor name to the shard that holds it.
    weight_map: BTreeMap<String, String>,
    tensor_bytes: u64,
}

/// A line of the manifest.
#[derive(Debug, Serialize)]
struct FileDigest {
    bytes: u64,
    sha256: String,
}

impl FolderWriter {
    /// Starts a folder that will be at `out`. Missing parents are created.
    ///
    /// # Errors
    /// If `out` is a file or a folder that is not empty, or its parent cannot be written to.
    pub fn create(out: &Path) -> Result<Self> {
        let mut output = out.to_owned();
        if let Ok(metadata) = fs::symlink_metadata(out) {
            // Resolved, so that a link to an empty folder is kept and `.` has a name.
            output = fs::canonicalize(out).map_err(io("read", out))?;
            let holds_something = || -> Result<bool> {
                let mut entries = fs::read_dir(&output).map_err(io("read", out))?;
                Ok(entries.next().is_some())
            };
            let found = if !output.is_dir() {
                Some(if metadata.is_symlink() {
                    "a link to a file"
                } else {
                    "a file"
                })
            } else if holds_something()? {
                Some("a folder that is not empty")
            } else {
                None
            };
            if let Some(found) = found {
                let path = out.to_owned();
                return Err(Error::OutputExists { path, found });
            }
        }
        let temporary = temporary_folder(&output)?;
        Ok(Self {
            temporary,
            output,
            files: BTreeMap::new(),
            weight_map: BTreeMap::new(),
            tensor_bytes: 0,
        })
    }

    /// The temporary folder, for reading back what was written.
    pub fn path(&self) -> &Path {
        self.temporary.path()
    }

    /// Writes a shard: its header from `tensors`, then the bytes of one tensor after another.
    ///
    /// `produce(i)` returns the bytes of `tensors[i]` and is called once for each, in the order of the file: the wider dtypes
    /// first, otherwise in the order of `tensors`. An error of the caller's own is passed through as [`Error::Produce`].
    ///
    /// # Errors
    /// If a name was used before, `produce` fails or returns another number of bytes than its
    /// spec needs, or writing fails. The writer can only be dropped then.
    pub fn add_shard<B: AsRef<[u8]>>(
        &mut self,
        file_name: &str,
        tensors: &[TensorSpec],
        produce: impl FnMut(usize) -> Result<B>,
    ) -> Result<()> {
        // transformers refuses a shard that does not name the framework of its layout.
        let metadata = BTreeMap::from([("format".to_owned(), "pt".to_owned())]);
        for spec in tensors {
            let tensor = spec.name.to_string();
            if let Some(first) = self.weight_map.insert(tensor.clone(), file_name.to_owned()) {
                return Err(Error::DuplicateTensor {
                    tensor,
                    first: self.path().join(first),
                    second: self.path().join(file_name),
                });
            }
            self.tensor_bytes += spec.n_bytes(&self.path().join(file_name))? as u64;
        }
        self.write(file_name, |output, path| {
            stream(output, path, tensors, &metadata, produce)
        })
    }

    /// Writes `model.safetensors.index.json`, unless the only shard is `model.safetensors`.
    ///
    /// # Errors
    /// If writing fails.
    pub fn write_index(&mut self) -> Result<()> {
        if self.weight_map.values().all(|name| name == SINGLE_NAME) {
            return Ok(());
        }
        let index = json!({
            "metadata": { "total_size": self.tensor_bytes },
            "weight_map": self.weight_map,
        });
        self.write_json(INDEX_NAME, &index)
    }

    /// Writes a JSON file, indented as Hugging Face does.
    ///
    /// # Errors
    /// If the name was used before, or writing fails.
    pub fn write_json(&mut self, name: &str, value: &Value) -> Result<()> {
        self.write_bytes(name, format!("{value:#}\n").as_bytes())
    }

    /// Writes a file; `FOLDER/FILE` goes into a folder of its own.
    ///
    /// # Errors
    /// If the name was used before, or writing fails.
    pub fn write_bytes(&mut self, name: &str, bytes: &[u8]) -> Result<()> {
        self.write(name, |output, path| {
            output.write_all(bytes).map_err(io("write", path))
        })
    }

    /// Copies a file from elsewhere.
    ///
    /// # Errors
    /// If `from` cannot be read, the name was used before, or writing fails.
    pub fn copy_file(&mut self, from: &Path, name: &str) -> Result<()> {
        const COPY_CHUNK_BYTES: usize = 1 << 20;

        expect_file(from)?;
        let mut input = File::open(from).map_err(io("open", from))?;
        self.write(name, |output, path| {
            let mut chunk = vec![0; COPY_CHUNK_BYTES];
            loop {
                // Not `io::copy`: the error must say which of the two files it is about.
                let n_bytes = input.read(&mut chunk).map_err(io("read", from))?;
                if n_bytes == 0 {
                    return Ok(());
                }
                output
                    .write_all(&chunk[..n_bytes])
                    .map_err(io("write", path))?;
            }
        })
    }

    /// Writes `moeforge.manifest.json` (size and SHA-256 of every file), flushes everything to
    /// the disk, and gives the folder its name.
    ///
    /// # Errors
    /// If writing or renaming fails; nothing is left behind then.
    pub fn finish(mut self) -> Result<()> {
        let manifest = json!({ "files": self.files });
        self.write_json(MANIFEST_NAME, &manifest)?;
        sync_folder(self.path())?;
        name_folder(self.temporary, &self.output)
    }

    /// Lets `fill` write a new file, hashes what it writes, and flushes it to the disk.
    fn write(
        &mut self,
        name: &str,
        fill: impl FnOnce(&mut HashingFile, &Path) -> Result<()>,
    ) -> Result<()> {
        // A folder within the folder is as deep as models go.
        let (within, file) = match name.split_once('/') {
            Some((within, file)) => (Some(within), file),
            None => (None, name),
        };
        if !is_plain_file_name(file) || !within.is_none_or(is_plain_file_name) {
            return Err(Error::FileName {
                place: self.output.clone(),
                found: shown(name),
            });
        }
        let path = self.path().join(name);
        if self.files.contains_key(name) {
            return Err(Error::WrittenTwice { path });
        }
        if let Some(within) = within {
            let folder = self.path().join(within);
            fs::create_dir_all(&folder).map_err(io("create", &folder))?;
        }
        let mut output = HashingFile {
            file: File::create(&path).map_err(io("create", &path))?,
            hash: Sha256::new(),
            n_bytes: 0,
        };
        fill(&mut output, &path)?;
        output.file.sync_all().map_err(io("flush", &path))?;
        let hash = output.hash.finalize();
        let digest = FileDigest {
            bytes: output.n_bytes,
            sha256: hash.iter().map(|byte| format!("{byte:02x}")).collect(),
        };
        self.files.insert(name.to_owned(), digest);
        match within {
            Some(within) => sync_folder(&self.path().join(within)),
            None => Ok(()),
        }
    }
}

/// Hashes while writing, so that a file of gigabytes is not read again.
struct HashingFile {
    file: File,
    hash: Sha256,
    n_bytes: u64,
}

impl Write for HashingFile {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        let n_written = self.file.write(bytes)?;
        self.hash.update(&bytes[..n_written]);
        self.n_bytes += n_written as u64;
        Ok(n_written)
    }

    fn flush(&mut self) -> std::io::Result<()> {
        self.file.flush()
    }
}

#[cfg(test)]
mod tests {
    use std::borrow::Cow;

    use super::*;
    use crate::{DType, Folder};

    fn specs(names: &[&str]) -> Vec<TensorSpec> {
        let spec = |name: &&str| TensorSpec {
            name: (*name).into(),
            dtype: DType::BF16,
            shape: vec![2],
        };
        names.iter().map(spec).collect()
    }

    fn n_entries(path: &Path) -> usize {
        fs::read_dir(path).unwrap().count()
    }

    #[test]
    fn a_finished_folder_opens_with_its_tensors_index_and_manifest() {
        let parent = tempfile::tempdir().unwrap();
        let out = parent.path().join("new/model");
        let mut writer = FolderWriter::create(&out).unwrap();
        writer
            .write_json("config.json", &json!({"b": 1, "a": 2}))
            .unwrap();
        writer
            .add_shard("x.safetensors", &specs(&["a", "b"]), |i| {
                Ok(vec![i as u8; 4])
            })
            .unwrap();
        writer
            .add_shard("y.safetensors", &specs(&["c"]), |_| {
                Ok(Cow::Borrowed([9; 4].as_slice()))
            })
            .unwrap();
        writer.write_index().unwrap();
        writer
            .copy_file(&writer.path().join("x.safetensors"), "copy")
            .unwrap();
        writer.write_bytes("within/a", b"1").unwrap();
        writer.write_bytes("within/b", b"2").unwrap();
        assert!(
            Folder::open(writer.path()).unwrap().contains("c"),
            "readable before the end"
        );
        assert!(!out.exists());
        writer.finish().unwrap();

        assert_eq!(n_entries(out.parent().unwrap()), 1);
        let folder = Folder::open(&out).unwrap();
        assert_eq!(folder.names().collect::<Vec<_>>(), ["a", "b", "c"]);
        assert_eq!(*folder.tensor("b").unwrap().bytes, [1; 4]);
        let text = fs::read_to_string(out.join("config.json")).unwrap();
        assert_eq!(text, "{\n  \"b\": 1,\n  \"a\": 2\n}\n");
        let read =
            |name| -> Value { serde_json::from_slice(&fs::read(out.join(name)).unwrap()).unwrap() };
        assert_eq!(read(INDEX_NAME)["metadata"]["total_size"], 12);
        let files = &read(MANIFEST_NAME)["files"];
        assert_eq!(files.as_object().unwrap().len(), 7);
        assert_eq!(fs::read(out.join("within/b")).unwrap(), b"2");
        assert_eq!(files["copy"], files["x.safetensors"]);
        // printf '{\n  "b": 1,\n  "a": 2\n}\n' | sha256sum
        let expected = "dd6841067dcb55a636629b56cb45722d09c6a354f92a5b54183cea3b61b9a1e9";
        assert_eq!(
            files["config.json"],
            json!({"bytes": 23, "sha256": expected})
        );
    }

    #[test]
    fn a_single_shard_of_the_usual_name_has_no_index() {
        let parent = tempfile::tempdir().unwrap();
        let mut writer = FolderWriter::create(&parent.path().join("model")).unwrap();
        writer
            .add_shard(SINGLE_NAME, &specs(&["a"]), |_| Ok([0; 4]))
            .unwrap();
        writer.write_index().unwrap();
        assert!(!writer.path().join(INDEX_NAME).exists());
    }

    #[test]
    fn a_failure_leaves_nothing_behind() {
        let parent = tempfile::tempdir().unwrap();
        let out = parent.path().join("model");
        let check = |run: &dyn Fn(&mut FolderWriter) -> Result<()>, expected: &str| {
            let mut writer = FolderWriter::create(&out).unwrap();
            let error = run(&mut writer).unwrap_err().to_string();
            assert!(
                error.contains(expected),
                "expected {expected:?} in {error:?}"
            );
            drop(writer);
            assert_eq!(n_entries(parent.path()), 0, "{expected}");
        };
        check(
            &|writer| {
                writer.add_shard("x", &specs(&["a", "b"]), |i| match i {
                    0 => Ok([0; 4]),
                    _ => Err(Error::Produce {
                        tensor: "b".into(),
                        cause: "not finite".into(),
                    }),
                })
            },
            "tensor `b`: not finite",
        );
        check(
            &|writer| writer.add_shard("x", &specs(&["a"]), |_| Ok([0; 3])),
            "tensor `a`: expected 4 bytes, found 3",
        );
        check(
            &|writer| writer.add_shard("x", &specs(&["a", "a"]), |_| Ok([0; 4])),
            "tensor `a`: expected in one file",
        );
        check(
            &|writer| {
                writer.add_shard("x", &specs(&["a"]), |_| Ok([0; 4]))?;
                writer.add_shard("y", &specs(&["a"]), |_| Ok([0; 4]))
            },
            "tensor `a`: expected in one file",
        );
        check(
            &|writer| writer.write_bytes("../x", b""),
            "expected a plain file name, found `../x`",
        );
        for name in ["/x", "a/b/c", "a/", "a/..", "../a"] {
            check(
                &|writer| writer.write_bytes(name, b""),
                &format!("expected a plain file name, found `{name}`"),
            );
        }
        check(
            &|writer| writer.copy_file(Path::new("absent"), "x"),
            "cannot read `absent`",
        );
        check(
            &|writer| {
                writer.write_bytes("x", b"")?;
                writer.write_bytes("x", b"")
            },
            "file written twice",
        );
    }

    #[cfg(target_os = "linux")]
    #[test]
    fn a_full_disk_leaves_nothing_behind() {
        let parent = tempfile::tempdir().unwrap();
        let mut writer = FolderWriter::create(&parent.path().join("model")).unwrap();
        std::os::unix::fs::symlink("/dev/full", writer.path().join("x")).unwrap();
        let error = writer
            .add_shard("x", &specs(&["a"]), |_| Ok([0; 4]))
            .unwrap_err();
        assert!(error.to_string().contains("No space left"), "{error}");
        drop(writer);
        assert_eq!(n_entries(parent.path()), 0);
    }

    #[test]
    fn an_output_that_holds_something_is_refused_and_an_empty_one_is_used() {
        let parent = tempfile::tempdir().unwrap();
        let file = parent.path().join("file");
        fs::write(&file, b"mine").unwrap();
        let refuse = |path: &Path, expected: &str| {
            let error = FolderWriter::create(path).unwrap_err().to_string();
            assert!(error.ends_with(expected), "{error}");
        };
        refuse(&file, "found a file");
        refuse(parent.path(), "found a folder that is not empty");
        refuse(Path::new("/"), "found a folder that is not empty");
        assert_eq!(fs::read(&file).unwrap(), b"mine");

        let empty = parent.path().join("empty");
        fs::create_dir(&empty).unwrap();
        FolderWriter::create(&empty).unwrap().finish().unwrap();
        assert!(empty.join(MANIFEST_NAME).exists());
    }
}
