//! What will probably be read next, which threads without work bring into the cache: memory would idle while one thread
//! does what lies between two products.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Bytes that are brought closer at most, a half of a usual second-level cache.
const MOST: usize = 1 << 19;
/// Bytes that one call asks for: a thread looks for work after each.
const STEP: usize = 1 << 10;
/// Bytes of a line of the cache.
const LINE: usize = 64;

/// Addresses that nobody has asked for yet.
#[derive(Debug, Default)]
pub(super) struct PrefetchWindow {
    next: AtomicUsize,
    end: AtomicUsize,
}

impl PrefetchWindow {
    /// Says where it begins. A wrong guess costs time and nothing else.
    pub(super) fn start_at(&self, first: *const u8) {
        // Only ever asked for, never read.
        let first = first.addr();
        self.end.store(first.wrapping_add(MOST), Ordering::Relaxed);
        self.next.store(first, Ordering::Relaxed);
    }

    /// Asks for the next bytes, if there are any.
    pub(super) fn prefetch_next(&self) -> bool {
        let end = self.end.load(Ordering::Relaxed);
        if self.next.load(Ordering::Relaxed) >= end {
            return false;
        }
        let first = self.next.fetch_add(STEP, Ordering::Relaxed);
        for at in (0..STEP).step_by(LINE) {
            prefetch_line(first.wrapping_add(at));
        }
        true
    }
}

/// Asks for the line of an address in the second-level cache; there need not be any memory.
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
