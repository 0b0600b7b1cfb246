//! Advice to the operating system about parts of mapped files: prefetch them, or release their pages.
#![expect(
    unsafe_code,
    reason = "releasing pages is unsafe for maps that could be written to, see below"
)]

#[cfg(unix)]
use crate::map::map_of;

/// Bytes per call. Linux prefetches no more per call than its read-ahead window, which has this size by default.
#[cfg(unix)]
const READ_AHEAD_BYTES: usize = 128 << 10;

/// Linux maps up to this many bytes around one that is read.
#[cfg(unix)]
const MAPPED_AROUND_BYTES: usize = 64 << 10;

/// Releases the pages of a part of a mapped file, for example after a copy of it was made in another form, with those around
/// that reading it has mapped. The bytes do not change; the next access reads them from the file again. Does nothing for other
/// bytes.
pub fn advise_dontneed(bytes: &[u8]) {
    #[cfg(unix)]
    if let Some((mapped, start)) = map_of(bytes) {
        let first = start / MAPPED_AROUND_BYTES * MAPPED_AROUND_BYTES;
        let end = (start + bytes.len()).next_multiple_of(MAPPED_AROUND_BYTES);
        let end = end.min(mapped.map.len());
        // SAFETY: pages of a read-only map of a file are filled from it again.
        let _ = unsafe {
            let advice = memmap2::UncheckedAdvice::DontNeed;
            mapped
                .map
                .unchecked_advise_range(advice, first, end - first)
        };
    }
}

/// Prefetches a part of a mapped file from the disk in the background. Does nothing for other bytes.
pub fn advise_willneed(bytes: &[u8]) {
    #[cfg(unix)]
    if let Some((mapped, start)) = map_of(bytes) {
        for part in (0..bytes.len()).step_by(READ_AHEAD_BYTES) {
            let len = READ_AHEAD_BYTES.min(bytes.len() - part);
            let _ = mapped
                .map
                .advise_range(memmap2::Advice::WillNeed, start + part, len);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::map::map;

    #[test]
    fn released_pages_are_read_again() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder.path().join("bytes");
        let expected: Vec<u8> = (0..100_000).map(|i| (i % 251) as u8).collect();
        std::fs::write(&path, &expected).unwrap();
        let bytes = map(&path).unwrap();
        assert_eq!(bytes, expected);
        advise_dontneed(&bytes[10..50_000]);
        advise_willneed(&bytes[10..50_000]);
        advise_dontneed(&bytes);
        advise_dontneed(&expected);
        assert_eq!(bytes, expected);
    }
}
