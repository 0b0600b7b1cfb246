//! Prefetching: idle threads bring the bytes that will probably be read next into the cache. Otherwise memory would
//! idle while one thread works between two products.

use std::sync::atomic::{AtomicUsize, Ordering};

/// The most bytes to prefetch: half of a usual second-level cache.
const MAX_BYTES_AHEAD: usize = 1 << 19;
/// Bytes per call: a thread looks for work after each.
const BYTES_PER_CALL: usize = 1 << 10;
/// Bytes of a line of the cache.
const LINE: usize = 64;

/// The addresses that are still to be prefetched.
#[derive(Debug, Default)]
pub(super) struct PrefetchWindow {
    next: AtomicUsize,
    end: AtomicUsize,
}

impl PrefetchWindow {
    /// Sets where to prefetch. A wrong guess costs time and nothing else.
    pub(super) fn start_at(&self, first: *const u8) {
        // The address is only prefetched, never read.
        let first = first.addr();
        self.end
            .store(first.wrapping_add(MAX_BYTES_AHEAD), Ordering::Relaxed);
        self.next.store(first, Ordering::Relaxed);
    }

    /// Prefetches the next bytes; returns whether there were any.
    pub(super) fn prefetch_next(&self) -> bool {
        let end = self.end.load(Ordering::Relaxed);
        if self.next.load(Ordering::Relaxed) >= end {
            return false;
        }
        let first = self.next.fetch_add(BYTES_PER_CALL, Ordering::Relaxed);
        for at in (0..BYTES_PER_CALL).step_by(LINE) {
            prefetch_line(first.wrapping_add(at));
        }
        true
    }
}

/// Prefetches the cache line of an address into the second-level cache. The address may be invalid.
#[inline(always)]
#[expect(unsafe_code, reason = "a hint to the CPU")]
pub(crate) fn prefetch_line(address: usize) {
    #[cfg(target_arch = "x86_64")]
    {
        use std::arch::x86_64::{_MM_HINT_T1, _mm_prefetch};
        // SAFETY: a hint, which never fails.
        unsafe { _mm_prefetch::<_MM_HINT_T1>(std::ptr::without_provenance(address)) }
    }
    #[cfg(target_arch = "aarch64")]
    // SAFETY: a hint, which never fails.
    unsafe {
        std::arch::asm!(
            "prfm pldl2keep, [{0}]",
            in(reg) address,
            options(readonly, nostack, preserves_flags)
        );
    }
    #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
    let _ = address;
}
