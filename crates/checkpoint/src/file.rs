//! Writes files whole or not at all: into a temporary sibling, flushed to the disk, renamed.

use std::fs::{self, File, Metadata};
use std::io::{ErrorKind, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use crate::error::io;
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

/// Lets `write` fill a temporary sibling of `path`, and renames it if all went well.
///
/// # Errors
/// What `write` returns, or what the operating system says.
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
    let (mut file, temporary) = Temporary::create(path, |path| File::create_new(path))?;
    write(&mut file, temporary.path())?;
    file.sync_all().map_err(io("flush", temporary.path()))?;
    drop(file);
    temporary.rename(path)
}

/// A temporary file or folder beside its final place. Dropped, it is removed.
#[derive(Debug)]
pub(crate) struct Temporary {
    path: Option<PathBuf>,
}

impl Temporary {
    /// Creates a new entry beside `path`, whose folder is created if need be.
    pub(crate) fn create<T>(
        path: &Path,
        create: impl Fn(&Path) -> std::io::Result<T>,
    ) -> Result<(T, Self)> {
        // Names are taken by what a killed process left behind, so a few are tried.
        const ATTEMPTS: usize = 100;
        static N_CREATED: AtomicU64 = AtomicU64::new(0);

        let Some(name) = path.file_name() else {
            return Err(Error::FileName {
                place: path.to_owned(),
                found: path.display().to_string(),
            });
        };
        let parent = parent(path);
        fs::create_dir_all(parent).map_err(io("create", parent))?;
        let mut attempts = 0;
        loop {
            attempts += 1;
            let n = N_CREATED.fetch_add(1, Ordering::Relaxed);
            let name = format!(".{}.{}-{n}.tmp", name.display(), std::process::id());
            let temporary = parent.join(name);
            match create(&temporary) {
                Ok(entry) => {
                    let path = Some(temporary);
                    return Ok((entry, Self { path }));
                }
                Err(error) if error.kind() == ErrorKind::AlreadyExists && attempts < ATTEMPTS => {}
                Err(error) => return Err(io("create", &temporary)(error)),
            }
        }
    }

    /// Where it is now.
    pub(crate) fn path(&self) -> &Path {
        // Only `rename` takes the path, and it consumes the value.
        self.path.as_deref().unwrap_or(Path::new(""))
    }

    /// Moves it to its final place and flushes the folder, so that the new name survives a
    /// loss of power.
    pub(crate) fn rename(mut self, path: &Path) -> Result<()> {
        fs::rename(self.path(), path).map_err(io("rename to", path))?;
        self.path = None;
        sync_folder(parent(path))
    }
}

impl Drop for Temporary {
    fn drop(&mut self) {
        // An error here would hide the one that led here, and cannot be returned.
        if let Some(path) = &self.path {
            let _ = if path.is_dir() {
                fs::remove_dir_all(path)
            } else {
                fs::remove_file(path)
            };
        }
    }
}

/// Flushes a folder's entries to the disk.
pub(crate) fn sync_folder(path: &Path) -> Result<()> {
    let folder = File::open(path).map_err(io("open", path))?;
    folder.sync_all().map_err(io("flush", path))
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
}
