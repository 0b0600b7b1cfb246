//! The operations on the CPU backend: burn's tensors in, slices to the kernels, tensors out.

mod gradients;

use std::ops::Range;
use std::sync::Arc;

use burn::backend::Flex;
use burn::tensor::{Bytes, DType, Shape};
use burn_flex::{FlexTensor, Layout};
use half::{bf16, f16};
use rayon::prelude::*;

use crate::adamw::{self, AdamWStep};
use crate::attention::{self, Place};
use crate::backend::kept::{Form, Kept};
use crate::backend::ops::{
    Direction, FactorsPrimitive, HeadRows, Kernels, Merge, RoutingPrimitive, StacksPrimitive,
};
use crate::cross_entropy::{self, Head};
use crate::experts::{self, Experts, Factors, Slots, Source};
use crate::fp8::Tiles;
use crate::product::gemm;
use crate::product::strided::{Mat, MatMut, Write};
use crate::product::weights::{Folded, Weights};
use crate::{
    Choice, Compute, Dropout, ExpertBank, ExpertLora, Matrix, Pairs, rms_norm, rope, route, swiglu,
};

/// A tensor's f32 values in row-major order: in place where they lie so, copied otherwise.
pub(crate) struct Floats {
    tensor: FlexTensor,
    range: Range<usize>,
}

impl Floats {
    pub(crate) fn new(tensor: &FlexTensor) -> Self {
        let widened = |widen: fn(&FlexTensor) -> Vec<f32>| {
            let tensor = tensor.to_contiguous();
            Self::in_place(floats(widen(&tensor), tensor.layout().shape().clone()))
        };
        match tensor.dtype() {
            DType::F32 => Self::in_place(if tensor.is_contiguous() {
                tensor.clone()
            } else {
                tensor.to_contiguous()
            }),
            DType::BF16 => widened(|t| t.storage::<bf16>().iter().map(|v| v.to_f32()).collect()),
            DType::F16 => widened(|t| t.storage::<f16>().iter().map(|v| v.to_f32()).collect()),
            other => panic!("our kernels take f32, f16 and bf16 tensors, not {other:?}"),
        }
    }

    /// A contiguous tensor may be a part of a larger buffer.
    fn in_place(tensor: FlexTensor) -> Self {
        let start = tensor.layout().start_offset();
        Self {
            range: start..start + tensor.layout().num_elements(),
            tensor,
        }
    }

    /// The values as a product in `compute` sees them that sums over the last axis.
    pub(crate) fn rounded(tensor: &FlexTensor, compute: Compute) -> Self {
        let values = Self::new(tensor);
        let are_rounded = match compute {
            Compute::F32 => true,
            Compute::Bf16 => tensor.dtype() == DType::BF16,
            Compute::F16 => tensor.dtype() == DType::F16,
            Compute::Fp8(_) => false,
        };
        if are_rounded {
            return values;
        }
        values.mapped(ROUNDED_ROWS, |rows, width| compute.round_rows(rows, width))
    }

    /// The values as a product in `compute` sees them that sums over the first axis of two.
    fn rounded_columns(self, compute: Compute) -> Self {
        if compute == Compute::F32 {
            return self;
        }
        self.mapped(ROUNDED_ROWS, |rows, width| {
            compute.round_columns(rows, width)
        })
    }

    /// A copy, changed some rows at a time.
    fn mapped(&self, rows: usize, change: impl Fn(&mut [f32], usize) + Sync) -> Self {
        let shape = self.shape();
        let width = shape.as_slice().last().copied().unwrap_or(1).max(1);
        let mut values = vec![0.0; self.len()];
        values
            .par_chunks_mut(rows * width)
            .zip(self.par_chunks(rows * width))
            .for_each(|(copy, values)| {
                copy.copy_from_slice(values);
                change(copy, width);
            });
        Self::in_place(floats(values, shape))
    }

    /// What was kept for the backward pass, or what it remakes.
    fn kept(kept: &Kept<FlexTensor>) -> Self {
        match kept.form() {
            Form::Float(tensor) => Self::new(tensor),
            Form::Fp8(tiles) => Self::decoded(tiles),
            Form::Norm(x, weight, eps) => {
                let y = <Flex as Kernels>::rms_norm(x.clone(), weight.clone(), *eps);
                Self::in_place(y)
            }
            Form::Swiglu(products) => {
                let [gate, up] = products.each_ref().map(|kept| Self::kept(kept));
                Self::in_place(swiglu_of(&gate, &up))
            }
        }
    }

    fn decoded(tiles: &Tiles) -> Self {
        let [rows, cols] = tiles.dims();
        let mut values = vec![0.0; rows * cols];
        values
            .par_chunks_mut((ROUNDED_ROWS * cols).max(1))
            .enumerate()
            .for_each(|(i, out)| {
                let start = i * ROUNDED_ROWS;
                tiles.decode(start..rows.min(start + ROUNDED_ROWS), out);
            });
        Self::in_place(floats(values, [rows, cols]))
    }

    fn shape(&self) -> Shape {
        self.tensor.layout().shape().clone()
    }

    fn dims<const D: usize>(&self) -> [usize; D] {
        self.tensor.layout().shape().dims()
    }

    /// As a matrix of rows of the last axis.
    fn mat(&self) -> Mat<'_> {
        let [rows, cols] = self.dims();
        Mat::dense(self, rows, cols)
    }
}

impl std::ops::Deref for Floats {
    type Target = [f32];

    fn deref(&self) -> &[f32] {
        &self.tensor.storage::<f32>()[self.range.clone()]
    }
}

/// Rows per task where activations are rounded: whole tiles of FP8.
const ROUNDED_ROWS: usize = 128;

/// A tensor whose storage is its values and nothing else, so that it can be written.
fn owned(x: FlexTensor) -> FlexTensor {
    let size = x.layout().num_elements() * x.dtype().size();
    let whole = x.is_contiguous() && x.bytes().len() == size;
    if whole { x } else { x.to_contiguous() }
}

pub(crate) fn floats(values: Vec<f32>, shape: impl Into<Shape>) -> FlexTensor {
    FlexTensor::new(
        Bytes::from_elems(values),
        Layout::contiguous(shape.into()),
        DType::F32,
    )
}

fn ints(values: Vec<i32>, shape: impl Into<Shape>) -> FlexTensor {
    FlexTensor::new(
        Bytes::from_elems(values),
        Layout::contiguous(shape.into()),
        DType::I32,
    )
}

/// Integer values of either width; burn's default is i32 here, user data may come as i64.
fn int_values(tensor: &FlexTensor) -> Vec<i32> {
    let tensor = tensor.to_contiguous();
    match tensor.dtype() {
        DType::I32 => tensor.storage::<i32>().to_vec(),
        DType::I64 => tensor.storage::<i64>().iter().map(|v| *v as i32).collect(),
        other => panic!("our kernels take i32 and i64 ids, not {other:?}"),
    }
}

impl Kernels for Flex {
    fn linear_frozen(x: FlexTensor, w: Arc<Matrix>, compute: Compute) -> FlexTensor {
        nt(&Floats::rounded(&x, compute), Weights::frozen(&w, compute))
    }

    fn linear_trained(x: FlexTensor, w: FlexTensor, compute: Compute, _: Compute) -> FlexTensor {
        let w = Floats::new(&w);
        nt(&Floats::rounded(&x, compute), trained(&w, compute))
    }

    fn linear_merged(
        x: FlexTensor,
        a: FlexTensor,
        b: FlexTensor,
        w: Arc<Matrix>,
        merge: Merge,
        compute: Compute,
    ) -> FlexTensor {
        let factors = [&a, &b].map(Floats::new);
        let w = Weights::frozen(&w, compute).folded(folded(&factors, merge));
        nt(&Floats::rounded(&x, compute), w)
    }

    fn linear_add(mut y: FlexTensor, u: FlexTensor, b: FlexTensor) -> FlexTensor {
        let (u, b) = (Floats::new(&u), Floats::new(&b));
        y = owned(y);
        let [rows, cols] = y.layout().shape().dims();
        gemm::nt(
            u.mat(),
            trained(&b, Compute::F32),
            MatMut::dense(y.storage_mut(), rows, cols),
            Write::Add,
        );
        y
    }

    fn heads_linear(x: FlexTensor, w: Arc<Matrix>, rows: HeadRows) -> FlexTensor {
        let x = Floats::new(&x);
        let [tokens, heads, width] = x.dims();
        let out_width = if rows.direction == Direction::Forward {
            rows.len
        } else {
            w.cols()
        };
        let per_head = w.rows() / heads;
        let mut out = vec![0.0; tokens * heads * out_width];
        let all = MatMut::dense(&mut out, tokens, heads * out_width);
        (0..heads).into_par_iter().for_each(|head| {
            // SAFETY: tasks write different columns.
            #[expect(unsafe_code, reason = "disjoint columns of one output")]
            let out = unsafe { all.part(0..tokens, head * out_width..(head + 1) * out_width) };
            let x = Mat::new(&x[head * width..], tokens, width, heads * width);
            let part =
                w.row_range(head * per_head + rows.start..head * per_head + rows.start + rows.len);
            let part = Weights::frozen(&part, Compute::F32);
            match rows.direction {
                Direction::Forward => gemm::nt(x, part, out, Write::Replace),
                Direction::Transposed => gemm::nn(x, part, out, Write::Replace),
            }
        });
        floats(out, [tokens, heads, out_width])
    }

    fn embed_frozen(ids: FlexTensor, w: Arc<Matrix>) -> FlexTensor {
        let (ids, width) = (int_values(&ids), w.cols());
        let mut out = vec![0.0; ids.len() * width];
        out.chunks_mut(width)
            .zip(&ids)
            .for_each(|(row, id)| w.decode(*id as usize..*id as usize + 1, 0..width, row));
        floats(out, [ids.len(), width])
    }

    fn embed_trained(w: FlexTensor, ids: FlexTensor) -> FlexTensor {
        let (w, ids) = (Floats::new(&w), int_values(&ids));
        let [_, width] = w.dims();
        let rows = ids
            .iter()
            .flat_map(|id| &w[*id as usize * width..][..width])
            .copied()
            .collect();
        floats(rows, [ids.len(), width])
    }

    fn rms_norm(x: FlexTensor, weight: FlexTensor, eps: f32) -> FlexTensor {
        let (x, weight) = (Floats::new(&x), Floats::new(&weight));
        let [rows, width] = x.dims();
        floats(rms_norm::forward(&x, width, &weight, eps), [rows, width])
    }

    fn rope(x: FlexTensor, cos: FlexTensor, sin: FlexTensor, pairs: Pairs) -> FlexTensor {
        turn(&x, [&cos, &sin], pairs, rope::Turn::Forth)
    }

    fn swiglu(gate: FlexTensor, up: FlexTensor, _: Compute) -> FlexTensor {
        swiglu_of(&Floats::new(&gate), &Floats::new(&up))
    }

    fn dropout(x: FlexTensor, dropout: Dropout) -> FlexTensor {
        let x = Floats::new(&x);
        let mut out = x.to_vec();
        out.par_chunks_mut(ELEMENTS)
            .enumerate()
            .for_each(|(i, part)| dropout.apply(part, (i * ELEMENTS) as u64));
        floats(out, x.dims::<2>())
    }

    fn causal_attention(
        q: FlexTensor,
        k: FlexTensor,
        v: FlexTensor,
        scale: f32,
    ) -> (FlexTensor, FlexTensor) {
        let (q, k, v) = (Floats::new(&q), Floats::new(&k), Floats::new(&v));
        let context = attention::Context {
            k: &k,
            v: &v,
            shared: &[],
        };
        attend(&q, context, scale, shape_apart(&q, &k, &v))
    }

    fn expanded_attention(
        q: FlexTensor,
        kv: FlexTensor,
        latents: FlexTensor,
        v_dim: usize,
        scale: f32,
    ) -> (FlexTensor, FlexTensor) {
        let (q, kv, latents) = (Floats::new(&q), Floats::new(&kv), Floats::new(&latents));
        let context = attention::Context {
            k: &kv,
            v: &kv,
            shared: &latents,
        };
        attend(&q, context, scale, shape_together(&q, &kv, &latents, v_dim))
    }

    fn latent_attention(
        q: FlexTensor,
        latents: FlexTensor,
        v_dim: usize,
        scale: f32,
    ) -> FlexTensor {
        let (q, latents) = (Floats::new(&q), Floats::new(&latents));
        let mut shape = shape_apart(&q, &latents, &latents);
        shape.v.dim = v_dim;
        let context = attention::Context {
            k: &latents,
            v: &latents,
            shared: &[],
        };
        attend(&q, context, scale, shape).0
    }

    fn choose_experts(scores: FlexTensor, choice: Choice) -> FlexTensor {
        let scores = Floats::new(&scores);
        let [tokens, experts] = scores.dims();
        ints(
            route::choose(&scores, experts, choice),
            [tokens, choice.top_k],
        )
    }

    fn dispatch_slots(ids: FlexTensor, experts: usize) -> (FlexTensor, FlexTensor) {
        let (order, offsets) = route::dispatch(&int_values(&ids), experts);
        let slots = order.len();
        (ints(order, [slots]), ints(offsets, [experts + 1]))
    }

    fn experts_frozen(
        x: FlexTensor,
        routing: RoutingPrimitive<Self>,
        factors: FactorsPrimitive<Self>,
        bank: Arc<ExpertBank>,
        lora: ExpertLora,
        compute: Compute,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        let factors = FactorValues::new(&factors);
        let (x, routing) = (Floats::rounded(&x, compute), RoutingValues::new(&routing));
        let experts = frozen_experts(&bank, &factors, lora, compute);
        experts_forward(experts, &routing, &x)
    }

    fn experts_trained(
        x: FlexTensor,
        routing: RoutingPrimitive<Self>,
        stacks: StacksPrimitive<Self>,
        compute: Compute,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        let stacks = StackValues::new(&stacks);
        let (x, routing) = (Floats::rounded(&x, compute), RoutingValues::new(&routing));
        experts_forward(stacks.experts(compute), &routing, &x)
    }

    fn cross_entropy_frozen(
        h: FlexTensor,
        u: FlexTensor,
        b: FlexTensor,
        targets: FlexTensor,
        w: Arc<Matrix>,
        compute: Compute,
    ) -> (FlexTensor, FlexTensor) {
        loss_forward(
            &h,
            Some((&u, &b)),
            Weights::frozen(&w, compute),
            &targets,
            compute,
        )
    }

    fn cross_entropy_trained(
        h: FlexTensor,
        w: FlexTensor,
        targets: FlexTensor,
        compute: Compute,
    ) -> (FlexTensor, FlexTensor) {
        let w = Floats::new(&w);
        loss_forward(&h, None, trained(&w, compute), &targets, compute)
    }

    fn adamw_step(
        p: FlexTensor,
        g: FlexTensor,
        m: FlexTensor,
        v: FlexTensor,
        step: AdamWStep,
    ) -> (FlexTensor, FlexTensor, FlexTensor) {
        let (mut p, mut m, mut v) = (owned(p), owned(m), owned(v));
        let (values, g) = (p.storage_mut(), Floats::new(&g));
        match m.dtype() {
            DType::BF16 => {
                let (m, v) = (m.storage_mut::<bf16>(), v.storage_mut());
                adamw::update(values, &g, m, v, step);
            }
            _ => adamw::update::<f32>(values, &g, m.storage_mut(), v.storage_mut(), step),
        }
        (p, m, v)
    }

    fn sum_of_squares_f32(x: FlexTensor) -> FlexTensor {
        floats(vec![adamw::sum_of_squares(&Floats::new(&x)) as f32], [1])
    }
}

/// Elements per task of a cheap elementwise operation.
const ELEMENTS: usize = 1 << 14;

fn trained(w: &Floats, compute: Compute) -> Weights<'_> {
    Weights::trained(w, w.dims::<2>()[1], compute)
}

/// A low-rank update `[a, b]` as a part of its weight.
fn folded(factors: &[Floats; 2], merge: Merge) -> Folded<'_> {
    let [a, b] = factors.each_ref().map(Floats::mat);
    Folded {
        quantizer: merge.quantizer,
        update: (a.rows() > 0).then_some((a, b, merge.scale)),
    }
}

fn swiglu_of(gate: &Floats, up: &Floats) -> FlexTensor {
    let mut out = vec![0.0; gate.len()];
    out.par_chunks_mut(ELEMENTS)
        .zip(gate.par_chunks(ELEMENTS).zip(up.par_chunks(ELEMENTS)))
        .for_each(|(out, (gate, up))| swiglu::forward(gate, up, out));
    floats(out, gate.dims::<2>())
}

fn nt(x: &Floats, w: Weights<'_>) -> FlexTensor {
    let (rows, cols) = (x.mat().rows(), w.out_width());
    let mut y = vec![0.0; rows * cols];
    gemm::nt(
        x.mat(),
        w,
        MatMut::dense(&mut y, rows, cols),
        Write::Replace,
    );
    floats(y, [rows, cols])
}

fn nn(dy: &Floats, w: Weights<'_>) -> FlexTensor {
    let (rows, cols) = (dy.mat().rows(), w.in_width());
    let mut dx = vec![0.0; rows * cols];
    gemm::nn(
        dy.mat(),
        w,
        MatMut::dense(&mut dx, rows, cols),
        Write::Replace,
    );
    floats(dx, [rows, cols])
}

fn turn(
    x: &FlexTensor,
    [cos, sin]: [&FlexTensor; 2],
    pairs: Pairs,
    turn: rope::Turn,
) -> FlexTensor {
    let (x, cos, sin) = (Floats::new(x), Floats::new(cos), Floats::new(sin));
    floats(
        rope::rotate(&x, &cos, &sin, x.dims(), pairs, turn),
        x.dims::<4>(),
    )
}

/// Keys and values in two tensors.
fn shape_apart(q: &Floats, k: &Floats, v: &Floats) -> attention::Shape {
    let ([batch, seq, heads, dim], [_, kv_seq, kv_heads, _], [.., v_dim]) =
        (q.dims::<4>(), k.dims::<4>(), v.dims::<4>());
    attention::Shape {
        batch,
        seq,
        kv_seq,
        q: Place::whole(heads, dim),
        k: Place::whole(kv_heads, dim),
        v: Place::whole(kv_heads, v_dim),
        shared: Place::whole(1, 0),
    }
}

/// Keys and values of all heads in one tensor; the end of `latents` is the end of every key.
fn shape_together(q: &Floats, kv: &Floats, latents: &Floats, v_dim: usize) -> attention::Shape {
    let ([batch, seq, heads, dim], [_, kv_seq, _, width], [.., latent]) =
        (q.dims::<4>(), kv.dims::<4>(), latents.dims::<4>());
    let (own, whole) = (width - v_dim, Place::whole(heads, width));
    let shared = dim - own;
    attention::Shape {
        batch,
        seq,
        kv_seq,
        q: Place::whole(heads, dim),
        k: Place { dim: own, ..whole },
        v: Place {
            start: own,
            dim: v_dim,
            ..whole
        },
        shared: Place {
            start: latent - shared,
            dim: shared,
            ..Place::whole(1, latent)
        },
    }
}

/// Output `[batch, seq, heads, v_dim]` and log-sum-exp `[batch, heads, seq]`.
fn attend(
    q: &Floats,
    context: attention::Context<'_>,
    scale: f32,
    shape: attention::Shape,
) -> (FlexTensor, FlexTensor) {
    let (out, lse) = attention::forward(q, context, scale, shape);
    let (batch, seq, heads) = (shape.batch, shape.seq, shape.q.heads);
    (
        floats(out, [batch, seq, heads, shape.v.dim]),
        floats(lse, [batch, heads, seq]),
    )
}

struct RoutingValues {
    weights: Floats,
    order: Vec<i32>,
    offsets: Vec<i32>,
}

impl RoutingValues {
    fn new(routing: &RoutingPrimitive<Flex>) -> Self {
        Self {
            weights: Floats::new(&routing.weights),
            order: int_values(&routing.order),
            offsets: int_values(&routing.offsets),
        }
    }

    fn slots(&self) -> Slots<'_> {
        Slots {
            order: &self.order,
            offsets: &self.offsets,
            top_k: self.weights.dims::<2>()[1],
        }
    }
}

struct FactorValues([[Floats; 2]; 3]);

impl FactorValues {
    fn new(f: &FactorsPrimitive<Flex>) -> Self {
        Self(
            [
                [&f.gate_a, &f.gate_b],
                [&f.up_a, &f.up_b],
                [&f.down_a, &f.down_b],
            ]
            .map(|pair| pair.map(Floats::new)),
        )
    }
}

fn frozen_experts<'a>(
    bank: &'a ExpertBank,
    factors: &'a FactorValues,
    lora: ExpertLora,
    compute: Compute,
) -> Experts<'a> {
    Experts {
        weights: Source::Frozen(bank),
        factors: factors.0.each_ref().map(|[a, b]| Factors {
            a,
            b,
            rank: a.dims::<3>()[1],
        }),
        lora,
        compute,
        hidden: bank.gate[0].cols(),
        inner: bank.gate[0].rows(),
        n_experts: bank.gate.len(),
    }
}

struct StackValues([Floats; 3]);

impl StackValues {
    fn new(stacks: &StacksPrimitive<Flex>) -> Self {
        Self([&stacks.gate, &stacks.up, &stacks.down].map(Floats::new))
    }

    fn experts(&self, compute: Compute) -> Experts<'_> {
        let [n_experts, inner, hidden] = self.0[0].dims();
        Experts {
            weights: Source::Trained(self.0.each_ref().map(|stack| &**stack)),
            factors: [Factors::default(); 3],
            lora: ExpertLora {
                scale: [0.0; 3],
                dropout: Dropout::OFF,
                quantizer: None,
            },
            compute,
            hidden,
            inner,
            n_experts,
        }
    }
}

fn experts_forward(
    experts: Experts<'_>,
    routing: &RoutingValues,
    x: &Floats,
) -> (FlexTensor, FlexTensor, FlexTensor) {
    let (y, gate, up) = experts::forward(experts, routing.slots(), x, &routing.weights);
    let products = [routing.order.len(), experts.inner];
    (
        floats(y, x.dims::<2>()),
        floats(gate, products),
        floats(up, products),
    )
}

/// The tokens of a loss that have a target, gathered.
struct TrainedTokens {
    /// Their positions in the batch.
    at: Vec<usize>,
    targets: Vec<usize>,
    h: Vec<f32>,
    u: Vec<f32>,
    hidden: usize,
    rank: usize,
}

impl TrainedTokens {
    fn new(h: &FlexTensor, u: Option<&FlexTensor>, targets: &FlexTensor, compute: Compute) -> Self {
        let targets = int_values(targets);
        let at = cross_entropy::trained(&targets);
        let (h, u) = (Floats::rounded(h, compute), u.map(Floats::new));
        let (hidden, rank) = (h.dims::<2>()[1], u.as_ref().map_or(0, |u| u.dims::<2>()[1]));
        let gather = |x: &[f32], width: usize| {
            at.iter()
                .flat_map(|i| &x[i * width..(i + 1) * width])
                .copied()
                .collect::<Vec<_>>()
        };
        Self {
            targets: at.iter().map(|i| targets[*i] as usize).collect(),
            h: gather(&h, hidden),
            u: u.map_or(vec![], |u| gather(&u, rank)),
            at,
            hidden,
            rank,
        }
    }

    fn head<'a>(&'a self, w: Weights<'a>, b: Option<&'a Floats>) -> Head<'a> {
        let n = self.at.len();
        let b = b.map_or(Weights::trained(&[], 0, Compute::F32), |b| {
            Weights::trained(b, self.rank, Compute::F32)
        });
        Head {
            h: Mat::dense(&self.h, n, self.hidden),
            w,
            u: Mat::dense(&self.u, n, self.rank),
            b,
        }
    }

    /// Spreads rows of the trained tokens over the whole batch.
    fn scatter(&self, rows: &[f32], width: usize, n_tokens: usize) -> FlexTensor {
        let mut all = vec![0.0; n_tokens * width];
        if width > 0 {
            self.at
                .iter()
                .zip(rows.chunks(width))
                .for_each(|(at, row)| all[at * width..(at + 1) * width].copy_from_slice(row));
        }
        floats(all, [n_tokens, width])
    }
}

fn loss_forward(
    h: &FlexTensor,
    low_rank: Option<(&FlexTensor, &FlexTensor)>,
    w: Weights<'_>,
    targets: &FlexTensor,
    compute: Compute,
) -> (FlexTensor, FlexTensor) {
    let tokens = TrainedTokens::new(h, low_rank.map(|(u, _)| u), targets, compute);
    let b = low_rank.map(|(_, b)| Floats::new(b));
    assert!(
        tokens.targets.iter().all(|t| *t < w.out_width()),
        "a target is not below {}",
        w.out_width()
    );
    let (loss, lse): (Vec<_>, Vec<_>) =
        cross_entropy::forward(tokens.head(w, b.as_ref()), &tokens.targets)
            .into_iter()
            .unzip();
    let n = h.layout().shape().as_slice()[0];
    let [loss, lse] = [loss, lse].map(|values| {
        let mut all = vec![0.0; n];
        tokens
            .at
            .iter()
            .zip(values)
            .for_each(|(at, value)| all[*at] = value);
        floats(all, [n])
    });
    (loss, lse)
}
