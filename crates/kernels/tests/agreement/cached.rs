//! Attention over a KV cache of every data type, against attention over the decoded values.

use moeforge_kernels::latent_attention;

use super::*;

/// Rows in a cache, appended in several steps.
pub(super) fn held(cache_type: CacheType, rows: &Tensor<4>) -> KvBuffer {
    let [_, len, ..] = rows.dims();
    let mut held = KvBuffer::new(cache_type);
    for piece in [0..len / 3, len / 3..len] {
        if !piece.is_empty() {
            held.append(rows.clone().slice([0..1, piece]));
        }
    }
    held
}

/// Keys and values of latents of width 40, of which 33 are the value.
fn over_latents(q: Tensor<4>, latents: &KvBuffer) -> Tensor<4> {
    latent_attention(q, latents, 33, 0.3)
}

/// `[seq, kv_seq, heads]`: around the size of tasks, and more queries than are few.
const LATENT_SHAPES: [[usize; 3]; 10] = [
    [1, 1, 3],
    [3, 9, 4],
    [1, 63, 2],
    [1, 64, 5],
    [1, 65, 1],
    [2, 2, 3],
    [1, 200, 16],
    [8, 200, 7],
    [9, 200, 2],
    [1, 300, 1],
];

/// `[seq, kv_seq, heads, kv_heads]`.
const SHAPES: [[usize; 4]; 9] = [
    [1, 1, 2, 1],
    [1, 63, 6, 2],
    [1, 64, 4, 4],
    [2, 65, 6, 3],
    [1, 200, 7, 1],
    [5, 200, 6, 2],
    [8, 8, 2, 2],
    [8, 130, 12, 3],
    [9, 200, 4, 2],
];

#[test]
fn attention_over_held_latents_is_attention_over_their_numbers() {
    for cache_type in CacheType::ALL {
        for [seq, kv_seq, heads] in LATENT_SHAPES {
            let q = random([1, seq, heads, 40]);
            let latents = held(cache_type, &random([1, kv_seq, 1, 40]));
            let keys = latents.floats();
            let values = keys.clone().slice([0..1, 0..kv_seq, 0..1, 0..33]);
            let expected = attention(q.clone(), keys, values, 0.3, &Segments::whole());
            let what = format!("{cache_type:?}: {seq} of {kv_seq}, {heads} heads");
            close(&over_latents(q, &latents), &expected, &what);
        }
    }
}

#[test]
fn attention_over_held_keys_and_values_is_attention_over_their_numbers() {
    for cache_type in CacheType::ALL {
        for [seq, kv_seq, heads, kv_heads] in SHAPES {
            let q = random([1, seq, heads, 24]);
            let k = held(cache_type, &random([1, kv_seq, kv_heads, 24]));
            let v = held(cache_type, &random([1, kv_seq, kv_heads, 35]));
            let whole = Segments::whole();
            let expected = attention(q.clone(), k.floats(), v.floats(), 0.3, &whole);
            let found = cached_attention(q, &k, &v, 0.3);
            let what = format!("{cache_type:?}: {seq} of {kv_seq}, {heads} heads over {kv_heads}");
            close(&found, &expected, &what);
        }
    }
}

/// Checks that the result of each query has the bits it has without the queries after it.
fn check_alone(
    q: &Tensor<4>,
    context: &[KvBuffer],
    what: &str,
    attend: impl Fn(Tensor<4>, &[KvBuffer]) -> Tensor<4>,
) {
    let [_, seq, ..] = q.dims();
    let together = values(&attend(q.clone(), context));
    let alone = (0..seq).flat_map(|at| {
        let mut seen = context.to_vec();
        let len = seen[0].len() - seq + at + 1;
        seen.iter_mut().for_each(|rows| rows.truncate(len));
        values(&attend(q.clone().slice([0..1, at..at + 1]), &seen))
    });
    let same = together.iter().map(|value| value.to_bits());
    assert!(same.eq(alone.map(f32::to_bits)), "{what}");
}

#[test]
fn a_few_queries_get_the_bits_each_gets_alone() {
    for cache_type in CacheType::ALL {
        for [seq, kv_seq, heads] in [[2, 2, 3], [2, 65, 16], [5, 130, 7], [8, 300, 1]] {
            let q = random([1, seq, heads, 40]);
            let latents = [held(cache_type, &random([1, kv_seq, 1, 40]))];
            let what = format!("{cache_type:?}: {seq} of {kv_seq}, {heads} heads");
            check_alone(&q, &latents, &what, |q, seen| over_latents(q, &seen[0]));
        }
        for [seq, kv_seq, heads, kv_heads] in [[2, 2, 4, 2], [3, 66, 6, 2], [8, 200, 3, 3]] {
            let q = random([1, seq, heads, 24]);
            let context =
                [24, 35].map(|width| held(cache_type, &random([1, kv_seq, kv_heads, width])));
            let what = format!("{cache_type:?}: {seq} of {kv_seq}, {heads} heads over {kv_heads}");
            check_alone(&q, &context, &what, |q, seen| {
                cached_attention(q, &seen[0], &seen[1], 0.3)
            });
        }
    }
}

#[test]
fn numbers_are_held_to_half_a_step() {
    // Of 11 and 8 significant bits, and of 127 codes with a step that is rounded to 8 bits.
    let steps = [
        (CacheType::F32, 0.0),
        (CacheType::F16, 0.5 / 2048.0),
        (CacheType::Bf16, 0.5 / 256.0),
        (CacheType::Q8_0, 0.5 * (1.0 + 1.0 / 512.0) / 127.0),
    ];
    for (cache_type, most) in steps {
        let rows = random([1, 300, 2, 70]);
        let found = held(cache_type, &rows).floats();
        for (found, expected) in values(&found).into_iter().zip(values(&rows)) {
            // All are below 1.
            assert!(
                (found - expected).abs() <= most,
                "{cache_type:?}: {found} {expected}"
            );
        }
    }
}

#[test]
fn rows_that_were_forgotten_leave_no_trace() {
    for cache_type in CacheType::ALL {
        // More than there is memory for at first.
        let rows = random([1, 600, 2, 40]);
        let piece = |range| rows.clone().slice([0..1, range]);
        let expected = held(cache_type, &rows);
        let mut found = KvBuffer::new(cache_type);
        found.append(piece(0..200));
        let before = found.clone();
        for guess in [1, 8, 300] {
            found.append(random([1, guess, 2, 40]));
            found.truncate(200);
            found.truncate(1000);
            assert_eq!(found.len(), 200);
        }
        assert_eq!(
            values(&found.floats()),
            values(&before.floats()),
            "{cache_type:?}"
        );
        (200..600).for_each(|at| found.append(piece(at..at + 1)));
        assert_eq!(
            values(&found.floats()),
            values(&expected.floats()),
            "{cache_type:?}"
        );
        assert_eq!(before.len(), 200);
    }
}
