//! Products with stored bytes on all threads: one of them, or several in one parallel loop, because threads wait for
//! each other at the end of every loop.

use std::ops::Range;

use super::packed_weight::{GemvInput, PackedWeight};
use crate::formats::ROWS;
use crate::memory::MatMut;
use crate::settings::Accumulate;
use crate::threads::{Pieces, prefetch_after, spin_for};

/// Bytes of a weight per task, for tasks of microseconds.
const ROW_TASK: usize = 1 << 13;
/// The most tasks per thread and weight.
const ROW_TASKS: usize = 16;

/// `y = x · wᵀ` for the given rows of an input.
#[derive(Debug)]
pub(crate) struct GemvProduct<'a> {
    pub(crate) weight: PackedWeight<'a>,
    pub(crate) input: &'a GemvInput<'a>,
    /// The indices of the input's rows.
    pub(crate) rows: &'a [usize],
    /// `[rows, out]`.
    pub(crate) y: MatMut<'a>,
    pub(crate) accumulate: Accumulate,
}

impl GemvProduct<'_> {
    /// The weight's rows, cut into equal tasks.
    fn pieces(&self) -> Pieces {
        let outs = self.y.cols();
        let most = ROW_TASKS * rayon::current_num_threads();
        let n = (outs * self.weight.row_bytes())
            .div_ceil(ROW_TASK)
            .clamp(1, most);
        // Whole strips: otherwise two tasks would read the strip they share.
        Pieces::new(outs, outs.div_ceil(n).next_multiple_of(ROWS))
    }

    /// Computes a range of outputs and returns them.
    ///
    /// # Safety
    /// No other thread writes or reads them at the same time.
    #[expect(unsafe_code, reason = "disjoint columns of one output")]
    unsafe fn make(&self, outs: Range<usize>) -> MatMut<'_> {
        // SAFETY: the caller's promise; of two views the first is done with.
        let part = |outs| unsafe { self.y.part(0..self.rows.len(), outs) };
        let y = part(outs.clone());
        self.weight
            .multiply(self.input, self.rows, outs.clone(), y, self.accumulate);
        part(outs)
    }
}

/// Computes products in one parallel loop. `then` is called with each part once it is done: the index of the product,
/// the range of outputs, and their values `[rows, outs]`.
///
/// # Panics
/// If the sizes do not fit.
pub(crate) fn multiply_all(
    products: &[GemvProduct<'_>],
    then: impl Fn(usize, Range<usize>, MatMut<'_>) + Sync,
) {
    let pieces: Vec<Pieces> = products.iter().map(GemvProduct::pieces).collect();
    let of_product = |i: usize| (0..pieces[i].len()).map(move |piece| (i, piece));
    let tasks: Vec<(usize, usize)> = (0..products.len()).flat_map(of_product).collect();
    if let Some(last) = products.last() {
        // Weights lie in memory in the order in which they are read.
        prefetch_after(last.weight.end());
    }
    spin_for(tasks.len(), |task| {
        let (product, piece) = tasks[task];
        let outs = pieces[product].get(piece);
        // SAFETY: tasks are different outputs, or different products, whose outputs are unique borrows.
        #[expect(unsafe_code, reason = "disjoint columns of the outputs")]
        let made = unsafe { products[product].make(outs.clone()) };
        then(product, outs, made);
    });
}

/// Computes one product.
///
/// # Panics
/// If the sizes do not fit.
pub(crate) fn multiply(product: GemvProduct<'_>) {
    multiply_all(&[product], |_, _, _| ());
}
