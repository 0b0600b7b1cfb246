//! Writes files whole or not at all: into a temporary sibling, flushed to the disk, renamed.

use std::ffi::{OsStr, OsString};
use std::fs::{self, File, Metadata};
use std::io::{ErrorKind, Read, Write};
use std::path::Path;

use sha2::{Digest, Sha256};
use tempfile::{NamedTempFile, TempDir, TempPath};

use crate::error::{broken_link, io};
use crate::{Error, Result};

/// Writes a file in one step: afterwards `path` has either its old content or all of the new.
///
/// # Errors
/// If writing fails; nothing is left behind then.
pub fn write_file(path: &Path, bytes: &[u8]) -> Result<()> {
    write_atomically(path, |file, temporary| {
        file.write_all(bytes).map_err(io("write", temporary))
    })
}

/// The SHA-256 of bytes, in hexadecimal.
pub fn sha256_of(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

fn hexadecimal(hash: &[u8]) -> String {
    hash.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// The SHA-256 of a file, in hexadecimal.
///
/// # Errors
/// If it cannot be read.
pub fn sha256(path: &Path) -> Result<String> {
    const CHUNK_BYTES: usize = 1 << 20;

    let mut file = File::open(path).map_err(io("open", path))?;
    let (mut hash, mut chunk) = (Sha256::new(), vec![0; CHUNK_BYTES]);
    loop {
        let n_bytes = file.read(&mut chunk).map_err(io("read", path))?;
        if n_bytes == 0 {
            return Ok(hexadecimal(&hash.finalize()));
        }
        hash.update(&chunk[..n_bytes]);
    }
}

/// Lets `write` fill a temporary sibling of `path`, and renames it if all went well.
///
/// # Errors
/// If `write` fails, or writing fails.
pub(crate) fn write_atomically(
    path: &Path,
    write: impl FnOnce(&mut File, &Path) -> Result<()>,
) -> Result<()> {
    if path.is_dir() {
        return Err(Error::NotAFile {
            path: path.to_owned(),
            found: "a folder",
        });
    }
    let (mut file, temporary) = temporary_file(path)?.into_parts();
    write(&mut file, &temporary)?;
    name_file(&file, temporary, path)
}

/// A new temporary sibling of `path`. The folder of `path` is created if need be; the file is removed when dropped.
///
/// # Errors
/// If it cannot be created.
pub(crate) fn temporary_file(path: &Path) -> Result<NamedTempFile> {
    let (folder, prefix) = place(path)?;
    // `tempfile` alone would make a file that only its owner may read.
    let file = naming(&prefix).make_in(folder, |path| File::create_new(path));
    file.map_err(io("create a file in", folder))
}

/// Flushes a temporary file, gives it its name, and flushes the folder around it.
///
/// # Errors
/// If renaming or flushing fails.
pub(crate) fn name_file(file: &File, temporary: TempPath, path: &Path) -> Result<()> {
    file.sync_all().map_err(io("flush", &temporary))?;
    let named = temporary.persist(path);
    named.map_err(|error| io("rename to", path)(error.error))?;
    sync_folder(parent(path))
}

/// A new temporary folder that is a sibling of `path`. The parent is created if need be; the folder is removed when dropped.
///
/// # Errors
/// If it cannot be created.
pub(crate) fn temporary_folder(path: &Path) -> Result<TempDir> {
    let (parent, prefix) = place(path)?;
    let folder = naming(&prefix).tempdir_in(parent);
    folder.map_err(io("create a folder in", parent))
}

/// Gives a temporary folder its name, and flushes the folder around it, so that the new name
/// survives a loss of power.
///
/// # Errors
/// If renaming or flushing fails.
pub(crate) fn name_folder(mut folder: TempDir, path: &Path) -> Result<()> {
    fs::rename(folder.path(), path).map_err(io("rename to", path))?;
    folder.disable_cleanup(true);
    sync_folder(parent(path))
}

/// The names of incomplete files: `.NAME.*.tmp`.
fn naming(prefix: &OsStr) -> tempfile::Builder<'_, 'static> {
    let mut naming = tempfile::Builder::new();
    naming.prefix(prefix).suffix(".tmp");
    naming
}

/// The folder of `path`, created if need be, and the start of temporary names in it.
fn place(path: &Path) -> Result<(&Path, OsString)> {
    let Some(name) = path.file_name() else {
        return Err(Error::FileName {
            place: path.to_owned(),
            found: path.display().to_string(),
        });
    };
    let parent = parent(path);
    fs::create_dir_all(parent).map_err(io("create", parent))?;
    let mut prefix = OsString::from(".");
    prefix.push(name);
    prefix.push(".");
    Ok((parent, prefix))
}

/// Flushes a folder's entries to the disk.
pub(crate) fn sync_folder(path: &Path) -> Result<()> {
    let folder = File::open(path).map_err(io("open", path))?;
    folder.sync_all().map_err(io("flush", path))
}

/// Whether there is something at a path.
///
/// # Errors
/// If it is a link to nothing, or cannot be looked at: a file that is hidden so is not absent.
pub fn is_present(path: &Path) -> Result<bool> {
    match fs::metadata(path) {
        Ok(_) => Ok(true),
        Err(cause) => match (cause.kind(), broken_link(path, &cause)) {
            (ErrorKind::NotFound, None) | (ErrorKind::NotADirectory, _) => Ok(false),
            _ => Err(io("read", path)(cause)),
        },
    }
}

/// Checks that nothing is at a path where a file will be written.
///
/// # Errors
/// If there is something, a link to nothing included.
pub fn expect_absent(path: &Path) -> Result<()> {
    match fs::symlink_metadata(path) {
        Err(_) => Ok(()),
        Ok(metadata) => Err(Error::OutputExists {
            path: path.to_owned(),
            found: if metadata.is_dir() {
                "a folder"
            } else {
                "a file"
            },
        }),
    }
}

/// Checks that bytes, the first of a file or all, are not what git-lfs puts in place of a large file.
///
/// # Errors
/// If they are.
pub(crate) fn expect_no_pointer(path: &Path, bytes: &[u8]) -> Result<()> {
    match bytes.starts_with(b"version https://git-lfs.github.com/spec/") {
        true => Err(Error::LfsPointer {
            path: path.to_owned(),
        }),
        false => Ok(()),
    }
}

/// Checks that a path is a regular file. Opening a pipe would wait for its other end.
pub(crate) fn expect_file(path: &Path) -> Result<Metadata> {
    let metadata = fs::metadata(path).map_err(io("read", path))?;
    if metadata.is_file() {
        return Ok(metadata);
    }
    Err(Error::NotAFile {
        path: path.to_owned(),
        found: if metadata.is_dir() {
            "a folder"
        } else {
            "a pipe or device"
        },
    })
}

/// The folder of a path; of a bare name, the current one.
fn parent(path: &Path) -> &Path {
    match path.parent() {
        Some(parent) if parent != Path::new("") => parent,
        _ => Path::new("."),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_is_replaced_whole_and_its_folder_is_created() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("new/file");
        write_file(&path, b"old").unwrap();
        write_file(&path, b"new").unwrap();
        assert_eq!(fs::read(&path).unwrap(), b"new");
        assert_eq!(fs::read_dir(path.parent().unwrap()).unwrap().count(), 1);
    }

    #[test]
    fn a_failure_keeps_the_old_content_and_leaves_nothing_behind() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("file");
        write_file(&path, b"old").unwrap();
        let error = write_atomically(&path, |file, temporary| {
            file.write_all(b"half").map_err(io("write", temporary))?;
            Err(io("write", temporary)(ErrorKind::StorageFull.into()))
        });
        assert!(matches!(error, Err(Error::Io { act: "write", .. })));
        assert_eq!(fs::read(&path).unwrap(), b"old");
        assert_eq!(fs::read_dir(folder.path()).unwrap().count(), 1);
    }

    #[test]
    fn a_folder_in_the_way_is_refused() {
        let folder = tempfile::tempdir().unwrap();
        let error = write_file(folder.path(), b"").unwrap_err();
        assert!(
            error
                .to_string()
                .ends_with("expected a file, found a folder"),
            "{error}"
        );
    }

    #[cfg(unix)]
    #[test]
    fn absent_is_told_from_a_link_to_nothing() {
        use std::os::unix::fs::symlink;

        let folder = tempfile::tempdir().unwrap();
        let at = |name: &str| folder.path().join(name);
        fs::write(at("file"), b"").unwrap();
        symlink("file", at("good")).unwrap();
        symlink("gone", at("broken")).unwrap();
        for (name, expected) in [("file", true), ("good", true), ("none", false)] {
            assert_eq!(is_present(&at(name)).unwrap(), expected, "{name}");
        }
        assert!(!is_present(&at("file/inside")).unwrap());
        assert!(!is_present(&at("none/inside")).unwrap());
        let problem = is_present(&at("broken")).unwrap_err().to_string();
        assert!(
            problem.ends_with("broken`: it is a link to `gone`, which does not exist"),
            "{problem}"
        );
        let problem = expect_file(&at("broken/inside")).unwrap_err().to_string();
        assert!(problem.contains("inside`: `"), "{problem}");
        assert!(
            problem.ends_with("broken` is a link to `gone`, which does not exist"),
            "{problem}"
        );
        assert!(expect_absent(&at("none")).is_ok());
        for name in ["file", "good", "broken"] {
            assert!(expect_absent(&at(name)).is_err(), "{name}");
        }
    }

    #[test]
    fn a_pointer_of_git_lfs_is_called_that() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("model.safetensors");
        let pointer = "version https://git-lfs.github.com/spec/v1\noid sha256:ab\nsize 3\n";
        fs::write(&path, pointer).unwrap();
        let read = [
            crate::Safetensors::open(&path).map(drop),
            crate::Gguf::open(&path).map(drop),
            crate::json::read_object(&path, 1 << 10).map(drop),
        ];
        for found in read {
            let problem = found.unwrap_err().to_string();
            assert!(
                problem.contains("model.safetensors`: this is a git-lfs pointer"),
                "{problem}"
            );
        }
    }
}
