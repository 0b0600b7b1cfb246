//! How much memory a call takes at its peak: an allocator that counts what it hands out.

#![expect(unsafe_code, reason = "an allocator hands on the system's blocks")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;

/// The system's allocator, which counts for each thread by itself what is in use and the most that ever was.
struct Counting;

#[global_allocator]
static ALLOCATOR: Counting = Counting;

thread_local! {
    static IN_USE: Cell<isize> = const { Cell::new(0) };
    static PEAK: Cell<isize> = const { Cell::new(0) };
}

fn count(bytes: isize) {
    IN_USE.set(IN_USE.get() + bytes);
    PEAK.set(PEAK.get().max(IN_USE.get()));
}

// SAFETY: blocks and layouts go to the system's allocator and come from it unchanged.
unsafe impl GlobalAlloc for Counting {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        unsafe { System.alloc(layout) }
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count(layout.size() as isize);
        unsafe { System.alloc_zeroed(layout) }
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count(-(layout.size() as isize));
        unsafe { System.dealloc(block, layout) }
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // Both blocks exist while one is copied into the other.
        count(size as isize);
        count(-(layout.size() as isize));
        unsafe { System.realloc(block, layout, size) }
    }
}

/// What a call gives, and the bytes that it had in use at once in this thread.
pub(super) fn with_peak<T>(call: impl FnOnce() -> T) -> (T, usize) {
    let before = IN_USE.get();
    PEAK.set(before);
    let given = call();
    (given, usize::try_from(PEAK.get() - before).unwrap_or(0))
}

#[test]
fn peaks_are_counted() {
    let peak = |call: fn()| with_peak(call).1;
    let both = peak(|| drop((vec![1u8; 1000], vec![0u8; 500])));
    let one_by_one = peak(|| [1000, 500].into_iter().for_each(|n| drop(vec![1u8; n])));
    assert_eq!([both, one_by_one], [1500, 1000]);
    let mut grown = Vec::with_capacity(8);
    let ((), growing) = with_peak(|| grown.resize(1 << 20, 0u8));
    assert!((1 << 20..2 << 20).contains(&growing), "{growing}");
}
