//! Readers between a file and its text: one that counts, and one that unpacks up to a limit.

use flate2::bufread::MultiGzDecoder;
use ruzstd::decoding::{FrameDecoder, StreamingDecoder};
use std::cell::Cell;
use std::io::{self, BufRead, ErrorKind, Read};
use std::rc::Rc;

/// The largest window of a Zstandard stream that is read: what `zstd -19` needs, and some.
const MAX_WINDOW_BYTES: u64 = 32 << 20;

/// A reader that tells how many bytes were read.
#[derive(Debug)]
pub(super) struct Counted<R> {
    inner: R,
    count: Rc<Cell<u64>>,
}

impl<R> Counted<R> {
    pub(super) fn new(inner: R, count: &Rc<Cell<u64>>) -> Self {
        Self {
            inner,
            count: Rc::clone(count),
        }
    }
}

impl<R: Read> Read for Counted<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.count.set(self.count.get() + n as u64);
        Ok(n)
    }
}

/// The unpacked bytes of a file, up to a limit.
pub(super) struct Unpacked<R> {
    inner: R,
    limit: u64,
    left: u64,
}

impl<R: BufRead> Unpacked<MultiGzDecoder<R>> {
    pub(super) fn gzip(packed: R, limit: u64) -> Self {
        Self::new(MultiGzDecoder::new(packed), limit)
    }
}

impl<R: BufRead> Unpacked<Zstd<R>> {
    pub(super) fn zstd(packed: R, limit: u64) -> Self {
        Self::new(Zstd::Between(packed), limit)
    }
}

impl<R> Unpacked<R> {
    fn new(inner: R, limit: u64) -> Self {
        Self {
            inner,
            limit,
            left: limit,
        }
    }
}

impl<R: Read> Read for Unpacked<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        let n = self.inner.read(buffer)?;
        self.left = self.left.checked_sub(n as u64).ok_or_else(|| {
            let limit = self.limit;
            io::Error::new(
                ErrorKind::InvalidData,
                format!("it unpacks to more than {limit} bytes"),
            )
        })?;
        Ok(n)
    }
}

/// The frames of a Zstandard stream, one after another.
pub(super) enum Zstd<R: Read> {
    /// At the end of a frame, or of the file.
    Between(R),
    Frame(Box<StreamingDecoder<R, FrameDecoder>>),
    Failed,
}

impl<R: BufRead> Read for Zstd<R> {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        loop {
            match std::mem::replace(self, Self::Failed) {
                Self::Between(mut packed) => {
                    if packed.fill_buf()?.is_empty() {
                        *self = Self::Between(packed);
                        return Ok(0);
                    }
                    let decoder =
                        StreamingDecoder::new_with_max_window_size(packed, MAX_WINDOW_BYTES);
                    let decoder = decoder.map_err(|problem| broken(&problem))?;
                    *self = Self::Frame(Box::new(decoder));
                }
                Self::Frame(mut decoder) => match decoder.read(buffer)? {
                    0 if !buffer.is_empty() => *self = Self::Between(decoder.into_inner()),
                    n => {
                        *self = Self::Frame(decoder);
                        return Ok(n);
                    }
                },
                Self::Failed => return Err(broken(&"an earlier error")),
            }
        }
    }
}

fn broken(problem: &dyn std::fmt::Display) -> io::Error {
    io::Error::new(
        ErrorKind::InvalidData,
        format!("malformed Zstandard data: {problem}"),
    )
}
