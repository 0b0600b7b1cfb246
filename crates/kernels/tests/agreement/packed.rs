//! Attention over packed rows: each sequence has the result it has alone.

use super::*;

/// Starts of the sequences of two rows of 140 positions: one alone, short ones, one longer than a tile.
fn starts() -> Vec<Vec<usize>> {
    vec![vec![0, 1, 4, 70, 139], vec![0, 135]]
}

const SEQ: usize = 140;

/// The attention mask `[2, 1, SEQ, SEQ]`, true for hidden positions.
fn walls() -> Tensor<4, Bool> {
    let segment = |starts: &[usize], at: usize| starts.partition_point(|&start| start <= at);
    let hidden =
        |starts: &[usize], i: usize, j: usize| j > i || segment(starts, i) != segment(starts, j);
    let mut mask = Vec::new();
    for starts in starts() {
        mask.extend((0..SEQ * SEQ).map(|at| hidden(&starts, at / SEQ, at % SEQ)));
    }
    Tensor::from_data(TensorData::new(mask, [2, 1, SEQ, SEQ]), &device())
}

/// `[2, SEQ, heads, dim]` of each of `kv_heads` repeated to `heads`, as `[2, heads, SEQ, dim]`.
fn spread(x: Tensor<4>, heads: usize) -> Tensor<4> {
    let [_, _, kv_heads, dim] = x.dims();
    x.swap_dims(1, 2)
        .unsqueeze_dim::<5>(2)
        .repeat_dim(2, heads / kv_heads)
        .reshape([2, heads, SEQ, dim])
}

fn plain(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>) -> Tensor<4> {
    let heads = q.dims()[2];
    let scores = q.swap_dims(1, 2).matmul(spread(k, heads).swap_dims(2, 3)) * 0.7;
    let scores = scores.mask_fill(walls().repeat_dim(1, heads), f32::NEG_INFINITY);
    softmax(scores, 3).matmul(spread(v, heads)).swap_dims(1, 2)
}

#[test]
fn grouped_queries_agree() {
    let (q, k, v) = (
        random([2, SEQ, 4, 6]),
        random([2, SEQ, 2, 6]),
        random([2, SEQ, 2, 3]),
    );
    let segments = Segments::packed(starts());
    agree!(
        "packed attention",
        [q, k, v],
        attention(q.clone(), k.clone(), v.clone(), 0.7, &segments),
        plain(q.clone(), k.clone(), v.clone())
    );
}

#[test]
fn expanded_latents_agree() {
    let (heads, nope, rope, v_dim) = (3, 5, 4, 2);
    let (q, kv) = (
        random([2, SEQ, heads, nope + rope]),
        random([2, SEQ, heads, nope + v_dim]),
    );
    let latents = random([2, SEQ, 1, 7]);
    let segments = Segments::packed(starts());
    let assembled = |q: Tensor<4>, kv: Tensor<4>, latents: Tensor<4>| {
        let cut = |range| kv.clone().slice([0..2, 0..SEQ, 0..heads, range]);
        let shared = latents
            .slice([0..2, 0..SEQ, 0..1, 7 - rope..7])
            .repeat_dim(2, heads);
        let k = Tensor::cat(vec![cut(0..nope), shared], 3);
        plain(q, k, cut(nope..nope + v_dim))
    };
    agree!(
        "packed expanded attention",
        [q, kv, latents],
        expanded_attention(
            q.clone(),
            kv.clone(),
            latents.clone(),
            v_dim,
            0.7,
            &segments
        ),
        assembled(q.clone(), kv.clone(), latents.clone())
    );
}

#[test]
fn a_sequence_gives_the_same_bits_wherever_it_is_packed() {
    let [q, k, v] = [0; 3].map(|_| random([1, 90, 2, 6]));
    let alone = attention(q.clone(), k.clone(), v.clone(), 0.7, &Segments::whole());
    let before = |x: Tensor<4>| Tensor::cat(vec![random([1, 33, 2, 6]), x], 1);
    let segments = Segments::packed(vec![vec![0, 33]]);
    let packed = attention(before(q), before(k), before(v), 0.7, &segments);
    let packed = packed.slice([0..1, 33..123, 0..2, 0..6]);
    assert_eq!(values(&packed), values(&alone));
}

#[test]
#[should_panic(expected = "starts of packed sequences")]
fn sequences_that_leave_out_the_first_position_are_refused() {
    Segments::packed(vec![vec![1, 3]]);
}
