//! Per-thread scratch memory, and large zeroed vectors.

use std::cell::RefCell;
use std::mem::MaybeUninit;

use rayon::prelude::*;

thread_local! {
    static SCRATCH: RefCell<Vec<Vec<f32>>> = const { RefCell::new(Vec::new()) };
}

/// Lends `len` f32 values with unspecified content. Calls may nest; buffers are kept per thread.
pub(crate) fn with_scratch<R>(len: usize, use_it: impl FnOnce(&mut [f32]) -> R) -> R {
    let mut buffer = SCRATCH.with_borrow_mut(|pool| {
        // The smallest buffer that fits: lending a large one to a small request would make another buffer grow.
        let fitting = (0..pool.len()).filter(|i| pool[*i].len() >= len);
        let best = fitting.min_by_key(|i| pool[*i].len());
        match best {
            Some(i) => pool.swap_remove(i),
            None => pool.pop().unwrap_or_default(),
        }
    });
    if buffer.len() < len {
        buffer.resize(len, 0.0);
    }
    let result = use_it(&mut buffer[..len]);
    SCRATCH.with_borrow_mut(|pool| pool.push(buffer));
    result
}

/// [`with_scratch`] of bytes.
pub(crate) fn with_byte_scratch<R>(len: usize, use_it: impl FnOnce(&mut [u8]) -> R) -> R {
    with_scratch(len.div_ceil(4), |values| {
        // SAFETY: f32 values are bytes, four each, and any four bytes are a value.
        #[expect(unsafe_code, reason = "f32 values as bytes")]
        let bytes = unsafe { std::slice::from_raw_parts_mut(values.as_mut_ptr().cast(), len) };
        use_it(bytes)
    })
}

/// Values that one task of [`zeros`] writes.
const ZEROS_TASK: usize = 1 << 16;

/// A new vector of zeros. Large ones are cleared by all threads, because recycled memory has to be cleared.
#[expect(
    unsafe_code,
    reason = "the length of a vector whose values were just written"
)]
pub(crate) fn zeros(len: usize) -> Vec<f32> {
    let mut values = Vec::with_capacity(len);
    values.spare_capacity_mut()[..len]
        .par_chunks_mut(ZEROS_TASK)
        .for_each(|part| part.fill(MaybeUninit::new(0.0)));
    // SAFETY: the first `len` values were written.
    unsafe { values.set_len(len) };
    values
}
