//! Attention over packed rows: each sequence has the result it has alone.

use std::ops::Range;

use super::*;

const SEQ: usize = 140;

/// The segments of two rows.
type Rows = [Vec<Range<usize>>; 2];

/// Two rows of 140 positions: sequences one after another, and sequences that continue others. In both there are short ones, and
/// one longer than a tile.
fn cases() -> [(Segments, Rows); 2] {
    let ranges = |starts: &[usize]| -> Vec<Range<usize>> {
        let ends = starts[1..].iter().chain([&SEQ]);
        starts
            .iter()
            .zip(ends)
            .map(|(start, end)| *start..*end)
            .collect()
    };
    let starts = [vec![0, 1, 4, 70, 139], vec![0, 135]];
    let apart = starts.each_ref().map(|starts| ranges(starts));
    let tree = [
        vec![0..SEQ, 66..100, 67..68, 68..100, 100..SEQ],
        vec![0..80, 5..80, 80..SEQ, 139..SEQ],
    ];
    [
        (Segments::packed(starts.to_vec()), apart),
        (Segments::tree(tree.to_vec()), tree),
    ]
}

/// The attention mask `[2, 1, SEQ, SEQ]`, true for hidden positions: later ones, and those of segments that have ended.
fn walls(rows: &Rows) -> Tensor<4, Bool> {
    let mut mask = Vec::new();
    for row in rows {
        let hidden = |i: usize, j: usize| {
            let segment = row.iter().rfind(|segment| segment.start <= j).unwrap();
            j > i || i >= segment.end
        };
        mask.extend((0..SEQ * SEQ).map(|at| hidden(at / SEQ, at % SEQ)));
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

fn plain(q: Tensor<4>, k: Tensor<4>, v: Tensor<4>, rows: &Rows) -> Tensor<4> {
    let heads = q.dims()[2];
    let scores = q.swap_dims(1, 2).matmul(spread(k, heads).swap_dims(2, 3)) * 0.7;
    let scores = scores.mask_fill(walls(rows).repeat_dim(1, heads), f32::NEG_INFINITY);
    softmax(scores, 3).matmul(spread(v, heads)).swap_dims(1, 2)
}

#[test]
fn grouped_queries_agree() {
    let (q, k, v) = (
        random([2, SEQ, 4, 6]),
        random([2, SEQ, 2, 6]),
        random([2, SEQ, 2, 3]),
    );
    for (segments, rows) in cases() {
        agree!(
            "packed attention",
            [q, k, v],
            attention(q.clone(), k.clone(), v.clone(), 0.7, &segments),
            plain(q.clone(), k.clone(), v.clone(), &rows)
        );
    }
}

#[test]
fn expanded_latents_agree() {
    let (heads, nope, rope, v_dim) = (3, 5, 4, 2);
    let (q, kv) = (
        random([2, SEQ, heads, nope + rope]),
        random([2, SEQ, heads, nope + v_dim]),
    );
    let latents = random([2, SEQ, 1, 7]);
    let assembled = |q: Tensor<4>, kv: Tensor<4>, latents: Tensor<4>, rows: &Rows| {
        let cut = |range| kv.clone().slice([0..2, 0..SEQ, 0..heads, range]);
        let shared = latents
            .slice([0..2, 0..SEQ, 0..1, 7 - rope..7])
            .repeat_dim(2, heads);
        let k = Tensor::cat(vec![cut(0..nope), shared], 3);
        plain(q, k, cut(nope..nope + v_dim), rows)
    };
    for (segments, rows) in cases() {
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
            assembled(q.clone(), kv.clone(), latents.clone(), &rows)
        );
    }
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
fn a_sequence_gives_the_result_it_has_alone_after_what_it_continues() {
    // 60 positions, continued by 30 after 5 others have continued them.
    let [q, k, v] = [0; 3].map(|_| random([1, 90, 2, 6]));
    let alone = attention(q.clone(), k.clone(), v.clone(), 0.7, &Segments::whole());
    let between = |x: Tensor<4>| {
        let cut = |range| x.clone().slice([0..1, range, 0..2, 0..6]);
        Tensor::cat(vec![cut(0..60), random([1, 5, 2, 6]), cut(60..90)], 1)
    };
    let segments = Segments::tree(vec![vec![0..95, 60..65, 65..95]]);
    let found = attention(between(q), between(k), between(v), 0.7, &segments);
    let cut = |x: Tensor<4>, range| x.slice([0..1, range, 0..2, 0..6]);
    let first = cut(found.clone(), 0..60);
    assert_eq!(values(&first), values(&cut(alone.clone(), 0..60)));
    close(&cut(found, 65..95), &cut(alone, 60..90), "the second");
}

#[test]
#[should_panic(expected = "starts of packed sequences")]
fn sequences_that_leave_out_the_first_position_are_refused() {
    Segments::packed(vec![vec![1, 3]]);
}
