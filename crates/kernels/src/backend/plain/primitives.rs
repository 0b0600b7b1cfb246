//! What the plain operations stand on, and a GPU has kernels for: stored matrices as numbers, counting, and products of
//! slots, each with the matrix of its expert.

use burn::backend::tensor::{Device, FloatTensor, IntTensor};
use burn::backend::{Backend, Dispatch};

use crate::backend::plain::ints::{Ints, Mask};
use crate::backend::plain::reals::Reals;
use crate::formats::Matrix;

/// Slots sorted by expert, as tables on the device.
#[derive(Clone, Debug)]
pub struct SlotTable<B: Backend> {
    /// `[slots]`: the expert of each place, ascending; `n_experts` for those that are served elsewhere.
    pub(crate) experts: IntTensor<B>,
    /// `[slots]`: the token of each place.
    pub(crate) tokens: IntTensor<B>,
    /// `[slots]`: the slot (`token × top_k + choice`) of each place.
    pub(crate) order: IntTensor<B>,
    /// `[slots]`: the place of each slot.
    pub(crate) places: IntTensor<B>,
    /// `[experts + 1]`: where the places of each expert begin.
    #[cfg_attr(
        not(feature = "gpu"),
        expect(dead_code, reason = "kernels of GPUs read it")
    )]
    pub(crate) offsets: IntTensor<B>,
    /// Number of experts.
    pub(crate) n_experts: usize,
}

impl<B: Backend> SlotTable<B> {
    /// `[slots, 1]`: which rows are an expert's.
    fn rows_of(&self, expert: usize) -> Mask<B> {
        let experts = Ints::<B>::new(self.experts.clone());
        let n = experts.len();
        experts.equals(expert as i32).reshape(&[n, 1])
    }
}

/// The matrices of all experts.
#[derive(Clone, Debug)]
pub enum Stack<'a, B: Backend> {
    /// Stored, `[out, in]` each.
    Stored(&'a [Matrix]),
    /// `[experts, out, in]`, f32.
    Dense(FloatTensor<B>),
}

impl<B: Primitives> Stack<'_, B> {
    /// The matrix of an expert, `[out, in]`.
    fn of(&self, expert: usize, device: &Device<B>) -> Reals<B> {
        match self {
            Self::Stored(matrices) => Reals::decoded(&matrices[expert], device),
            Self::Dense(stack) => {
                let stack = Reals::<B>::new(stack.clone());
                let [_, rows, cols] = stack.dims();
                stack.narrow(0, expert..expert + 1).reshape(&[rows, cols])
            }
        }
    }

    /// Output and input width.
    fn widths(&self) -> [usize; 2] {
        match self {
            Self::Stored(matrices) => matrices.first().map_or([0, 0], |w| [w.rows(), w.cols()]),
            Self::Dense(stack) => {
                let [_, rows, cols] = Reals::<B>::new(stack.clone()).dims();
                [rows, cols]
            }
        }
    }
}

/// What the plain operations stand on. The default bodies upload, and multiply all rows with all experts.
pub trait Primitives: Backend {
    /// A stored matrix in f32, `[rows, cols]`.
    fn decoded(w: &Matrix, device: &Device<Self>) -> FloatTensor<Self> {
        uploaded::<Self>(w, device)
    }

    /// `0..n`, `[n]`.
    fn count(n: usize, device: &Device<Self>) -> IntTensor<Self> {
        Ints::<Self>::upload((0..n as i32).collect(), &[n], device).into_tensor()
    }

    /// The tables of slots in `order` `[slots]` with `offsets` `[experts + 1]`.
    fn slot_table(
        order: IntTensor<Self>,
        offsets: IntTensor<Self>,
        top_k: usize,
    ) -> SlotTable<Self> {
        slot_table(order, offsets, top_k)
    }

    /// `y[i] = w[expert of i] · x[i]`: `[slots, in]` → `[slots, out]`; 0 for slots that are served elsewhere.
    fn slots_nt(
        x: FloatTensor<Self>,
        w: Stack<'_, Self>,
        slots: &SlotTable<Self>,
    ) -> FloatTensor<Self> {
        nt(x, &w, slots)
    }

    /// `dx[i] = w[expert of i]ᵀ · dy[i]`: `[slots, out]` → `[slots, in]`; 0 for slots that are served elsewhere.
    fn slots_nn(
        dy: FloatTensor<Self>,
        w: Stack<'_, Self>,
        slots: &SlotTable<Self>,
    ) -> FloatTensor<Self> {
        nn(dy, &w, slots)
    }

    /// `out[e] = Σ over the slots i of e of a[i] ⊗ b[i]`: `[slots, m]`, `[slots, n]` → `[experts, m, n]`.
    fn slots_tn(
        a: FloatTensor<Self>,
        b: FloatTensor<Self>,
        slots: &SlotTable<Self>,
    ) -> FloatTensor<Self> {
        let (a, b) = (Reals::<Self>::new(a), Reals::new(b));
        let ([rows, m], [_, n]) = (a.dims(), b.dims());
        if rows * m * n * slots.n_experts == 0 {
            return Reals::<Self>::zeros(&[slots.n_experts, m, n], &a.device()).into_tensor();
        }
        let of_expert = |expert| {
            let own = a.clone().filled(slots.rows_of(expert).not(), 0.0);
            own.t().matmul(b.clone()).reshape(&[1, m, n])
        };
        let products = (0..slots.n_experts).map(of_expert).collect();
        Reals::cat(products, 0).into_tensor()
    }
}

/// See [`Primitives::slots_nt`].
pub(crate) fn nt<B: Primitives>(
    x: FloatTensor<B>,
    w: &Stack<'_, B>,
    slots: &SlotTable<B>,
) -> FloatTensor<B> {
    let [out, _] = w.widths();
    expert_by_expert(x, out, slots, |x, expert| {
        let w = w.of(expert, &x.device());
        x.matmul_t(w)
    })
}

/// See [`Primitives::slots_nn`].
pub(crate) fn nn<B: Primitives>(
    dy: FloatTensor<B>,
    w: &Stack<'_, B>,
    slots: &SlotTable<B>,
) -> FloatTensor<B> {
    let [_, width] = w.widths();
    expert_by_expert(dy, width, slots, |dy, expert| {
        let w = w.of(expert, &dy.device());
        dy.matmul(w)
    })
}

/// A stored matrix, decoded on the host and uploaded.
pub(crate) fn uploaded<B: Backend>(w: &Matrix, device: &Device<B>) -> FloatTensor<B> {
    Reals::<B>::upload(w.to_f32(), &[w.rows(), w.cols()], device).into_tensor()
}

/// See [`Primitives::slot_table`].
fn slot_table<B: Primitives>(
    order: IntTensor<B>,
    offsets: IntTensor<B>,
    top_k: usize,
) -> SlotTable<B> {
    let (sorted, ends) = (
        Ints::<B>::new(order.clone()),
        Ints::<B>::new(offsets.clone()),
    );
    let (n, n_experts, device) = (sorted.len(), ends.len() - 1, sorted.device());
    let tables = |experts, tokens, places| SlotTable {
        experts,
        tokens,
        places,
        order: order.clone(),
        offsets: offsets.clone(),
        n_experts,
    };
    if n == 0 || n_experts == 0 {
        let tokens = sorted.clone().over(top_k.max(1) as i32).into_tensor();
        return tables(
            sorted.clone().into_tensor(),
            tokens,
            sorted.inverse().into_tensor(),
        );
    }
    // A place's expert is the number of experts that end at it or before.
    let ends = ends.narrow(0, 1..n_experts + 1).reshape(&[1, n_experts]);
    let places = Ints::count(n, &device).reshape(&[n, 1]);
    let ended = places.lower(ends).not().into_values().sum(1);
    tables(
        ended.reshape(&[n]).into_ints().into_tensor(),
        sorted.clone().over(top_k as i32).into_tensor(),
        sorted.inverse().into_tensor(),
    )
}

/// The rows `product(x, expert)` of every expert for its own slots: `[slots, any]` → `[slots, width]`.
fn expert_by_expert<B: Backend>(
    x: FloatTensor<B>,
    width: usize,
    slots: &SlotTable<B>,
    product: impl Fn(Reals<B>, usize) -> Reals<B>,
) -> FloatTensor<B> {
    let x = Reals::<B>::new(x);
    let [n, _] = x.dims();
    let mut y = Reals::zeros(&[n, width], &x.device());
    if x.is_empty() || width == 0 {
        return y.into_tensor();
    }
    for expert in 0..slots.n_experts {
        let own = slots.rows_of(expert).expand(&[n, width]);
        y = y.replaced(&own, product(x.clone(), expert));
    }
    y.into_tensor()
}

/// A call is handed to the backend of its tensors before any product of slots.
impl Primitives for Dispatch {}
