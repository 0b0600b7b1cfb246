//! Products straight on the stored bytes of weights, on all threads: one of them, or several in one parallel part, since
//! each part has an end at which threads wait for each other.

use std::ops::Range;

use super::packed::{GemvInput, PackedWeight};
use crate::formats::ROWS;
use crate::memory::MatMut;
use crate::settings::Accumulate;
use crate::threads::{Pieces, prefetch_after, spin_for};

/// Bytes of a weight that are worth a task of microseconds.
const ROW_TASK: usize = 1 << 13;
/// Tasks per thread and weight at most.
const ROW_TASKS: usize = 16;

/// `y = x · wᵀ` for some rows of an input.
#[derive(Debug)]
pub(crate) struct GemvProduct<'a> {
    pub(crate) weight: PackedWeight<'a>,
    pub(crate) input: &'a GemvInput<'a>,
    /// Numbers of the input's rows.
    pub(crate) rows: &'a [usize],
    /// `[rows, out]`.
    pub(crate) y: MatMut<'a>,
    pub(crate) accumulate: Accumulate,
}

impl GemvProduct<'_> {
    /// Equal pieces of the weight's rows, worth a task each.
    fn pieces(&self) -> Pieces {
        let outs = self.y.cols();
        let most = ROW_TASKS * rayon::current_num_threads();
        let n = (outs * self.weight.row_bytes())
            .div_ceil(ROW_TASK)
            .clamp(1, most);
        // Whole strips: two tasks would read one that they share.
        Pieces::new(outs, outs.div_ceil(n).next_multiple_of(ROWS))
    }

    /// Makes some outputs, which it returns.
    ///
    /// # Safety
    /// Nobody else makes or reads them at the same time.
    #[expect(unsafe_code, reason = "disjoint columns of one output")]
    unsafe fn make(&self, outs: Range<usize>) -> MatMut<'_> {
        // SAFETY: the caller's promise; of two views the first is done with.
        let part = |outs| unsafe { self.y.part(0..self.rows.len(), outs) };
        let (input, y) = ((self.input, self.rows), part(outs.clone()));
        self.weight
            .multiply(input, outs.clone(), y, self.accumulate);
        part(outs)
    }
}

/// Makes products in one parallel part, and then does more with what was made: the number of the product, which of its
/// outputs, and their values `[rows, outs]`.
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
        // Weights are laid out in the order in which they are read.
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

/// Makes one product.
///
/// # Panics
/// If the sizes do not fit.
pub(crate) fn multiply(product: GemvProduct<'_>) {
    multiply_all(&[product], |_, _, _| ());
}
