//! Allocator that recycles large blocks.
//!
//! A training step frees and requests the same large blocks over and over. The system's allocator returns each of them
//! to the operating system, which clears every page of the next one: a fifth of a full fine-tuning step. This allocator
//! keeps a freed block for the next request of its size instead.

#![expect(unsafe_code, reason = "an allocator")]

use std::alloc::{GlobalAlloc, Layout, System};
use std::cell::Cell;
use std::ptr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Mutex, MutexGuard, PoisonError};

/// Blocks of at least this size are large.
const LARGE: usize = 1 << 20;
/// The most large blocks that can wait at once. A model's step has some hundred sizes, most of them alike.
const SLOTS: usize = 256;

/// Freed blocks from this size up to [`NOT_MEDIUM`] wait in their thread: glibc would search and join such blocks,
/// which took a tenth of a decoding step.
const MEDIUM: usize = 1 << 10;
/// The first size that is no longer medium.
const NOT_MEDIUM: usize = 1 << 18;
/// The most bytes of medium blocks that can wait in a thread.
const SHELF: usize = 8 << 20;
/// Bins for the sizes, and places in each. A decoding step has some thirty sizes.
const BINS: usize = 64;
const PLACES: usize = 4;

/// Blocks of at least this size count in [`AllocatedBytes`]. A decoding step has few of them, so counting costs it nothing.
const COUNTED: usize = 1 << 16;

static IN_USE: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// Bytes in blocks of 64 KiB or more, of a program with a [`RecyclingAllocator`]; zeros in another.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct AllocatedBytes {
    /// In use now.
    pub now: usize,
    /// The most that were in use at once since the last call.
    pub peak: usize,
}

/// The bytes in use. The next call has a peak of its own.
pub fn allocated_bytes() -> AllocatedBytes {
    let now = IN_USE.load(Ordering::Relaxed);
    let peak = PEAK.swap(now, Ordering::Relaxed).max(now);
    AllocatedBytes { now, peak }
}

fn count_allocated(size: usize) {
    if size >= COUNTED {
        let now = IN_USE.fetch_add(size, Ordering::Relaxed) + size;
        PEAK.fetch_max(now, Ordering::Relaxed);
    }
}

fn count_freed(size: usize) {
    if size >= COUNTED {
        IN_USE.fetch_sub(size, Ordering::Relaxed);
    }
}

fn is_medium(layout: Layout) -> bool {
    (MEDIUM..NOT_MEDIUM).contains(&layout.size())
}

thread_local! {
    static MEDIUM_BLOCKS: Shelf = const { Shelf::new() };
}

/// The waiting medium blocks of a thread; they are freed with it.
struct Shelf {
    /// Addresses, 0 for none, and layouts. Sizes share bins.
    bins: [[Cell<(usize, Layout)>; PLACES]; BINS],
    /// Bytes that wait.
    waiting: Cell<usize>,
}

impl Shelf {
    const fn new() -> Self {
        Self {
            bins: [const { [const { Cell::new((0, Layout::new::<()>())) }; PLACES] }; BINS],
            waiting: Cell::new(0),
        }
    }

    fn bin(&self, size: usize) -> &[Cell<(usize, Layout)>; PLACES] {
        // Fibonacci hashing: its upper bits tell apart what differs anywhere.
        let hash = (size as u64).wrapping_mul(0x9E37_79B9_7F4A_7C15) >> 32;
        &self.bins[hash as usize % BINS]
    }

    /// A waiting block of exactly this layout.
    fn take(&self, layout: Layout) -> Option<*mut u8> {
        let fits = |block: &&Cell<(usize, Layout)>| block.get().0 != 0 && block.get().1 == layout;
        let block = self.bin(layout.size()).iter().find(fits)?;
        let (address, _) = block.replace((0, layout));
        self.waiting.update(|waiting| waiting - layout.size());
        Some(ptr::with_exposed_provenance_mut(address))
    }

    /// Lets a block wait. If its bin is full, it takes the place of another block.
    fn put(&self, block: *mut u8, layout: Layout) {
        let block = (block.expose_provenance(), layout);
        if self.waiting.get() + layout.size() > SHELF {
            return free(block);
        }
        let bin = self.bin(layout.size());
        let place = bin.iter().find(|place| place.get().0 == 0);
        let old = place.unwrap_or(&bin[0]).replace(block);
        let freed = if old.0 == 0 { 0 } else { old.1.size() };
        self.waiting
            .update(|waiting| waiting + layout.size() - freed);
        free(old);
    }
}

impl Drop for Shelf {
    fn drop(&mut self) {
        let blocks = self.bins.iter().flatten();
        blocks.for_each(|block| free(block.get()));
    }
}

/// Returns a block that waited to the system.
fn free((address, layout): (usize, Layout)) {
    if address != 0 {
        // SAFETY: it came from `System` with this layout, and nobody else has it.
        unsafe { System.dealloc(ptr::with_exposed_provenance_mut(address), layout) }
    }
}

/// A program's allocator, `#[global_allocator]`, that keeps freed large blocks.
///
/// Blocks in use and waiting blocks together never exceed the most bytes that were in use at once, so the program's
/// peak does not rise. On Linux, large blocks are backed by huge pages, of which a block needs hundreds of times fewer.
#[derive(Debug)]
pub struct RecyclingAllocator(Mutex<FreeBlocks>);

#[derive(Debug)]
struct FreeBlocks {
    /// Bytes of large blocks in use, now and at the peak.
    in_use: usize,
    peak: usize,
    /// Bytes of the blocks that wait.
    waiting: usize,
    /// The waiting blocks, the oldest first.
    blocks: [(usize, Layout); SLOTS],
    len: usize,
}

impl RecyclingAllocator {
    /// An allocator that keeps nothing yet.
    pub const fn new() -> Self {
        Self(Mutex::new(FreeBlocks {
            in_use: 0,
            peak: 0,
            waiting: 0,
            blocks: [(0, Layout::new::<()>()); SLOTS],
            len: 0,
        }))
    }

    /// Counts a block as in use and returns a waiting one that fits, if there is any.
    fn claim(&self, layout: Layout) -> Option<*mut u8> {
        let mut free_blocks = self.free_blocks();
        let waiting = free_blocks.take(layout);
        free_blocks.enter(layout.size());
        waiting
    }

    /// A block fresh from the system.
    fn prepared(&self, block: *mut u8, layout: Layout) -> *mut u8 {
        if block.is_null() {
            self.free_blocks().in_use -= layout.size();
        } else {
            ask_for_huge_pages(block, layout.size());
        }
        block
    }

    fn free_blocks(&self) -> MutexGuard<'_, FreeBlocks> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Default for RecyclingAllocator {
    fn default() -> Self {
        Self::new()
    }
}

impl FreeBlocks {
    /// Counts a block as in use, and frees waiting blocks beyond the peak.
    fn enter(&mut self, size: usize) {
        self.in_use += size;
        self.peak = self.peak.max(self.in_use);
        while self.in_use + self.waiting > self.peak {
            self.free_oldest();
        }
    }

    /// A waiting block of exactly this layout, the one that was freed last.
    fn take(&mut self, layout: Layout) -> Option<*mut u8> {
        let waiting = &self.blocks[..self.len];
        let i = waiting.iter().rposition(|block| block.1 == layout)?;
        Some(self.remove(i))
    }

    fn put(&mut self, block: *mut u8, layout: Layout) {
        if self.len == SLOTS {
            self.free_oldest();
        }
        self.blocks[self.len] = (block.expose_provenance(), layout);
        self.len += 1;
        self.waiting += layout.size();
    }

    fn free_oldest(&mut self) {
        let layout = self.blocks[0].1;
        let block = self.remove(0);
        free((block.expose_provenance(), layout));
    }

    fn remove(&mut self, i: usize) -> *mut u8 {
        let (block, layout) = self.blocks[i];
        self.blocks.copy_within(i + 1..self.len, i);
        self.len -= 1;
        self.waiting -= layout.size();
        ptr::with_exposed_provenance_mut(block)
    }
}

/// A medium block of this thread that waits. A thread that ends has none.
fn waiting(layout: Layout) -> Option<*mut u8> {
    if !is_medium(layout) {
        return None;
    }
    MEDIUM_BLOCKS
        .try_with(|shelf| shelf.take(layout))
        .ok()
        .flatten()
}

// SAFETY: every block comes from `System` with the layout it was asked for, and goes back to it with the same one; a
// block that waits is in nobody's hands and is handed out once, for the same layout. Nothing here panics or allocates.
unsafe impl GlobalAlloc for RecyclingAllocator {
    unsafe fn alloc(&self, layout: Layout) -> *mut u8 {
        count_allocated(layout.size());
        if layout.size() < LARGE {
            // SAFETY: the caller's layout.
            return waiting(layout).unwrap_or_else(|| unsafe { System.alloc(layout) });
        }
        // SAFETY: the caller's layout.
        let fresh = || unsafe { System.alloc(layout) };
        self.claim(layout)
            .unwrap_or_else(|| self.prepared(fresh(), layout))
    }

    unsafe fn alloc_zeroed(&self, layout: Layout) -> *mut u8 {
        count_allocated(layout.size());
        if layout.size() < LARGE {
            if let Some(block) = waiting(layout) {
                // SAFETY: a block of this size that nobody else has.
                unsafe { block.write_bytes(0, layout.size()) };
                return block;
            }
            // SAFETY: the caller's layout.
            return unsafe { System.alloc_zeroed(layout) };
        }
        if let Some(block) = self.claim(layout) {
            // SAFETY: a block of this size that nobody else has.
            unsafe { block.write_bytes(0, layout.size()) };
            return block;
        }
        // SAFETY: the caller's layout.
        self.prepared(unsafe { System.alloc_zeroed(layout) }, layout)
    }

    unsafe fn dealloc(&self, block: *mut u8, layout: Layout) {
        count_freed(layout.size());
        if layout.size() < LARGE {
            let put = |shelf: &Shelf| shelf.put(block, layout);
            if !is_medium(layout) || MEDIUM_BLOCKS.try_with(put).is_err() {
                // SAFETY: a block of the caller's, that came from `System` with this layout.
                unsafe { System.dealloc(block, layout) };
            }
            return;
        }
        let mut free_blocks = self.free_blocks();
        free_blocks.in_use -= layout.size();
        free_blocks.put(block, layout);
    }

    unsafe fn realloc(&self, block: *mut u8, layout: Layout, size: usize) -> *mut u8 {
        // SAFETY: a block of the caller's, that came from `System` with this layout.
        let grown = unsafe { System.realloc(block, layout, size) };
        if !grown.is_null() {
            count_freed(layout.size());
            count_allocated(size);
        }
        if !grown.is_null() && layout.size().max(size) >= LARGE {
            let large = |size: usize| if size < LARGE { 0 } else { size };
            let mut free_blocks = self.free_blocks();
            free_blocks.in_use -= large(layout.size());
            free_blocks.enter(large(size));
        }
        grown
    }
}

/// Trades speed for memory from now on: glibc maps each large block by itself, so that all of it is returned when it is
/// freed. By default glibc starts cutting blocks of up to 32 MiB from its heap, which leaves gaps of a third of a
/// training run's memory at 4 × 2048 tokens. New pages for every block cost a tenth of a step at 4 × 256. Without glibc
/// this does nothing.
pub fn map_large_blocks() {
    set_mapped(LARGE);
}

/// Takes [`map_large_blocks`] back: blocks up to glibc's largest threshold come from its heap, which is faster.
pub fn keep_large_blocks() {
    /// As far as glibc raises the threshold by itself.
    const MOST: usize = 32 << 20;
    set_mapped(MOST);
}

/// Has glibc map each block from a size on by itself.
#[cfg(all(target_os = "linux", target_env = "gnu"))]
fn set_mapped(size: usize) {
    const M_TRIM_THRESHOLD: i32 = -1;
    const M_MMAP_THRESHOLD: i32 = -3;
    /// What the heap may keep at its end: what glibc comes to by itself.
    const TRIMMED: i32 = 64 << 20;
    unsafe extern "C" {
        fn mallopt(parameter: i32, value: i32) -> i32;
    }
    let settings = [(M_MMAP_THRESHOLD, size as i32), (M_TRIM_THRESHOLD, TRIMMED)];
    for (parameter, value) in settings {
        // SAFETY: settings of the allocator, which change no block. A refusal is fine.
        let _ = unsafe { mallopt(parameter, value) };
    }
}

/// Has an effect with glibc only.
#[cfg(not(all(target_os = "linux", target_env = "gnu")))]
fn set_mapped(_: usize) {}

/// Asks Linux to back a block with pages of 2 MiB; does nothing on other systems.
#[cfg(target_os = "linux")]
fn ask_for_huge_pages(block: *mut u8, size: usize) {
    const MADV_HUGEPAGE: i32 = 14;
    const PAGE: usize = 1 << 12;
    const WORTH_IT: usize = 4 << 20;
    unsafe extern "C" {
        fn madvise(start: *mut u8, len: usize, advice: i32) -> i32;
    }
    if size < WORTH_IT {
        return;
    }
    let start = block.map_addr(|address| address.next_multiple_of(PAGE));
    let len = (size - (start.addr() - block.addr())) & !(PAGE - 1);
    // SAFETY: whole pages inside the block; advice changes no content. A refusal (no huge pages, larger pages) is fine.
    let _ = unsafe { madvise(start, len, MADV_HUGEPAGE) };
}

#[cfg(not(target_os = "linux"))]
fn ask_for_huge_pages(_: *mut u8, _: usize) {}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_medium_block_waits_in_its_thread_for_its_size() {
        let buffers = RecyclingAllocator::new();
        let block = filled(&buffers, 4096, 7);
        // SAFETY: blocks of this allocator, with their layouts.
        unsafe {
            buffers.dealloc(block, layout(4096));
            let other = buffers.alloc(layout(4097));
            assert_ne!(other, block);
            let zeroed = buffers.alloc_zeroed(layout(4096));
            assert_eq!(zeroed, block);
            assert!((0..4096).all(|i| *zeroed.add(i) == 0));
            buffers.dealloc(zeroed, layout(4096));
            buffers.dealloc(other, layout(4097));
        }
        // More than can wait; and a thread that ends with some.
        std::thread::spawn(move || {
            let blocks: Vec<usize> = (0..3 * SHELF / 2048)
                .map(|_| filled(&buffers, 2048, 3).expose_provenance())
                .collect();
            for block in blocks {
                // SAFETY: as above.
                unsafe {
                    buffers.dealloc(ptr::with_exposed_provenance_mut(block), layout(2048));
                }
            }
        })
        .join()
        .expect("the thread ends well");
    }

    fn layout(size: usize) -> Layout {
        Layout::array::<u8>(size).expect("a size in range")
    }

    /// A block filled with a byte.
    fn filled(buffers: &RecyclingAllocator, size: usize, byte: u8) -> *mut u8 {
        // SAFETY: the size is not zero, and the block is written where it was just allocated.
        unsafe {
            let block = buffers.alloc(layout(size));
            block.write_bytes(byte, size);
            block
        }
    }

    fn free(buffers: &RecyclingAllocator, block: *mut u8, size: usize) {
        // SAFETY: the tests free what `filled` gave them, with its size.
        unsafe { buffers.dealloc(block, layout(size)) }
    }

    fn bytes(block: *mut u8, size: usize) -> &'static [u8] {
        // SAFETY: the tests look at blocks that are in use.
        unsafe { std::slice::from_raw_parts(block, size) }
    }

    #[test]
    fn a_freed_block_is_the_next_of_its_size_and_of_no_other() {
        let buffers = RecyclingAllocator::new();
        let (first, other) = (filled(&buffers, LARGE, 1), filled(&buffers, LARGE + 64, 2));
        free(&buffers, first, LARGE);
        let smaller = filled(&buffers, LARGE - 1, 3);
        assert_ne!(smaller, first);
        let again = filled(&buffers, LARGE, 4);
        assert_eq!(again, first);
        assert!(bytes(other, LARGE + 64).iter().all(|byte| *byte == 2));
        free(&buffers, smaller, LARGE - 1);
        free(&buffers, other, LARGE + 64);
        free(&buffers, again, LARGE);
    }

    #[test]
    fn a_block_used_again_is_zero_where_zeros_are_asked_for() {
        let buffers = RecyclingAllocator::new();
        let size = 5 << 20;
        let block = filled(&buffers, size, 0xAB);
        free(&buffers, block, size);
        // SAFETY: the size is not zero.
        let zeroed = unsafe { buffers.alloc_zeroed(layout(size)) };
        assert_eq!(zeroed, block);
        assert!(bytes(zeroed, size).iter().all(|byte| *byte == 0));
        free(&buffers, zeroed, size);
    }

    #[test]
    fn a_grown_block_keeps_its_bytes_and_is_counted_as_grown() {
        let buffers = RecyclingAllocator::new();
        let sizes = [LARGE / 2, 3 * LARGE, 9 * LARGE, LARGE, LARGE / 4];
        let mut block = filled(&buffers, sizes[0], 7);
        for pair in sizes.windows(2) {
            // SAFETY: the block is in use and has the first of the two sizes.
            block = unsafe { buffers.realloc(block, layout(pair[0]), pair[1]) };
            assert!(bytes(block, LARGE / 4).iter().all(|byte| *byte == 7));
            let large = if pair[1] < LARGE { 0 } else { pair[1] };
            assert_eq!(buffers.free_blocks().in_use, large);
        }
        free(&buffers, block, LARGE / 4);
    }

    /// Thousands of allocations of uneven sizes: what waits and what is in use stay below the peak, and no two blocks
    /// share a byte.
    #[test]
    fn what_waits_never_raises_the_peak() {
        let buffers = RecyclingAllocator::new();
        let mut held: Vec<(*mut u8, usize, u8)> = vec![];
        let mut peak = 0;
        let mut bits = 1u64;
        for i in 0..4000u32 {
            bits = bits
                .wrapping_mul(6_364_136_223_846_793_005)
                .wrapping_add(1_442_695_040_888_963_407);
            let draw = (bits >> 33) as usize;
            if held.len() < 12 && !draw.is_multiple_of(3) {
                let size = LARGE + (draw % 7) * 4096;
                let byte = i as u8;
                held.push((filled(&buffers, size, byte), size, byte));
            } else if !held.is_empty() {
                let (block, size, byte) = held.swap_remove(draw % held.len());
                assert!(bytes(block, size).iter().all(|found| *found == byte));
                free(&buffers, block, size);
            }
            let in_use: usize = held.iter().map(|block| block.1).sum();
            peak = peak.max(in_use);
            let free_blocks = buffers.free_blocks();
            assert_eq!((free_blocks.in_use, free_blocks.peak), (in_use, peak));
            assert!(free_blocks.in_use + free_blocks.waiting <= peak);
            let waiting = free_blocks.blocks[..free_blocks.len]
                .iter()
                .map(|block| block.1.size());
            assert_eq!(free_blocks.waiting, waiting.sum::<usize>());
        }
    }

    #[test]
    fn more_blocks_than_can_wait_lose_the_oldest() {
        let buffers = RecyclingAllocator::new();
        let blocks: Vec<_> = (0..SLOTS + 3).map(|_| filled(&buffers, LARGE, 1)).collect();
        blocks
            .iter()
            .for_each(|block| free(&buffers, *block, LARGE));
        let free_blocks = buffers.free_blocks();
        assert_eq!(
            (free_blocks.len, free_blocks.waiting),
            (SLOTS, SLOTS * LARGE)
        );
    }

    #[test]
    fn threads_share_blocks_without_mixing_them() {
        let buffers = RecyclingAllocator::new();
        std::thread::scope(|scope| {
            for thread in 1..=4u8 {
                let buffers = &buffers;
                scope.spawn(move || {
                    for round in 0..200usize {
                        let size = LARGE + (round % 3) * 4096;
                        let block = filled(buffers, size, thread);
                        std::thread::yield_now();
                        assert!(bytes(block, size).iter().all(|byte| *byte == thread));
                        free(buffers, block, size);
                    }
                });
            }
        });
        assert_eq!(buffers.free_blocks().in_use, 0);
    }
}
