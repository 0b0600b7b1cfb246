//! Attention over whole sequences and over cached rows.

use std::sync::Arc;

use burn::backend::Flex;
use burn::backend::tensor::FloatTensor;

use super::{GRADIENT, VALUE, all_close, close, noise};
use crate::backend::gradients::Gradients;
use crate::backend::plain::reals::Reals;
use crate::backend::plain::{attention, decoding};
use crate::backend::traits::{Absorbed, Kernels, KvBufferPrimitive};
use crate::formats::Matrix;
use crate::ops::attention::Segments;
use crate::settings::Compute;
use crate::testing;

const SCALE: f32 = 0.8;
/// Sizes of tiles: one that cuts, and one that does not.
const TILES: [usize; 2] = [16, 512];

/// `[batch, seq, kv_seq, heads, kv_heads]`, and the starts of sequences.
fn cases() -> Vec<([usize; 5], Segments)> {
    let packed = |starts: [&[usize]; 2]| Segments::packed(starts.map(<[usize]>::to_vec).to_vec());
    vec![
        ([1, 1, 1, 1, 1], Segments::whole()),
        ([2, 7, 9, 3, 3], Segments::whole()),
        ([1, 1, 40, 4, 2], Segments::whole()),
        ([2, 70, 70, 4, 2], Segments::whole()),
        ([1, 33, 70, 6, 1], Segments::whole()),
        ([2, 9, 9, 2, 1], packed([&[0, 4], &[0]])),
        ([2, 70, 70, 4, 2], packed([&[0, 8, 41], &[0, 20]])),
        (
            [2, 70, 70, 4, 2],
            Segments::tree(vec![
                vec![0..40, 17..30, 30..40, 40..70],
                vec![0..70, 20..70],
            ]),
        ),
    ]
}

fn values(tensors: &[FloatTensor<Flex>]) -> Vec<Reals<Flex>> {
    tensors.iter().cloned().map(Reals::new).collect()
}

/// Compares the gradients of queries, keys and values. One key alone has a probability of 1, which no score changes.
fn same_gradients(
    found: &[FloatTensor<Flex>; 3],
    expected: &[FloatTensor<Flex>; 3],
    kv_seq: usize,
    what: &str,
) {
    if kv_seq > 1 {
        all_close(found, expected, GRADIENT, what);
    } else {
        close(&found[2], &expected[2], GRADIENT, what);
    }
}

#[test]
fn whole_sequences_agree() {
    let [dim, v_dim] = [13, 9];
    for ([batch, seq, kv_seq, heads, kv_heads], segments) in cases() {
        let what = format!("{batch} × {seq} of {kv_seq}, {heads} over {kv_heads}, {segments:?}");
        let q = noise(&[batch, seq, heads, dim], 1);
        let k = noise(&[batch, kv_seq, kv_heads, dim], 2);
        let v = noise(&[batch, kv_seq, kv_heads, v_dim], 3);
        let dout = noise(&[batch, seq, heads, v_dim], 4);
        let (out, lse) =
            Flex::causal_attention(q.clone(), k.clone(), v.clone(), SCALE, segments.clone());
        let saved = [q, k, v, out.clone(), lse.clone()];
        let expected = Flex::attention_grads(dout.clone(), saved.clone(), SCALE, &segments);
        let inputs: [Reals<Flex>; 3] = values(&saved[..3]).try_into().unwrap();
        for tile in TILES {
            let (found, found_lse) = attention::attend(&inputs, SCALE, &segments, tile);
            let found = [found, found_lse].map(Reals::into_tensor);
            all_close(&found, &[out.clone(), lse.clone()], VALUE, &what);
            let saved: [Reals<Flex>; 5] = values(&saved).try_into().unwrap();
            let dout = Reals::new(dout.clone());
            let grads = attention::backward(dout, &saved, SCALE, &segments, tile);
            same_gradients(&grads.map(Reals::into_tensor), &expected, kv_seq, &what);
        }
        let [q, k, v, ..] = saved.clone();
        let (found, _) = attention::causal_attention::<Flex>([q, k, v], SCALE, &segments);
        close(&found, &out, VALUE, &what);
        let found = attention::attention_grads::<Flex>(dout, saved, SCALE, &segments);
        same_gradients(&found, &expected, kv_seq, &what);
    }
}

#[test]
fn expanded_attention_agrees() {
    let [nope, rope, v_dim, latent] = [6, 4, 5, 11];
    for ([batch, seq, kv_seq, heads, _], segments) in cases() {
        for shared in [rope, 0] {
            let what = format!("{batch} × {seq} of {kv_seq}, {heads} heads, {shared} shared");
            let q = noise(&[batch, seq, heads, nope + shared], 1);
            let kv = noise(&[batch, kv_seq, heads, nope + v_dim], 2);
            let latents = noise(&[batch, kv_seq, 1, latent], 3);
            let dout = noise(&[batch, seq, heads, v_dim], 4);
            let inputs = [q.clone(), kv.clone(), latents.clone()];
            let (found, found_lse) =
                attention::expanded_attention::<Flex>(inputs, v_dim, SCALE, segments.clone());
            let (out, lse) = Flex::expanded_attention(
                q.clone(),
                kv.clone(),
                latents.clone(),
                v_dim,
                SCALE,
                segments.clone(),
            );
            all_close(
                &[found, found_lse],
                &[out.clone(), lse.clone()],
                VALUE,
                &what,
            );
            let saved = [q, kv, latents, out, lse];
            let plain = attention::expanded_attention_grads::<Flex>;
            let [dq, dkv, dlatents] = plain(dout.clone(), saved.clone(), v_dim, SCALE, &segments);
            let [eq, ekv, elatents] =
                Flex::expanded_attention_grads(dout, saved, v_dim, SCALE, &segments);
            // One key alone has a probability of 1, which no score changes.
            if kv_seq > 1 {
                close(&dq, &eq, GRADIENT, &what);
                if shared > 0 {
                    close(&dlatents, &elatents, GRADIENT, &what);
                }
            }
            close(&dkv, &ekv, GRADIENT, &what);
        }
    }
}

#[test]
fn cached_rows_agree() {
    let [dim, v_dim] = [13, 9];
    for (seq, kv_seq, heads, kv_heads) in [(1, 1, 3, 3), (1, 70, 4, 2), (8, 90, 6, 1), (3, 9, 4, 4)]
    {
        let q = noise(&[1, seq, heads, dim], 1);
        let rows =
            |width, seed| KvBufferPrimitive::Numbers(noise(&[kv_seq, kv_heads, width], seed));
        let (k, v): (KvBufferPrimitive<Flex>, _) = (rows(dim, 2), rows(v_dim, 3));
        let found = decoding::cached_attention::<Flex>(q.clone(), [k.clone(), v.clone()], SCALE);
        close(
            &found,
            &Flex::cached_attention(q, k, v, SCALE),
            VALUE,
            "cached_attention",
        );
    }
}

#[test]
fn latents_agree() {
    let [heads, rank, nope, rope, v_dim] = [3, 7, 5, 4, 6];
    let values = testing::noise(heads * (nope + v_dim) * rank, 5);
    let w = Arc::new(Matrix::from_f32(heads * (nope + v_dim), rank, &values));
    let absorbed = Absorbed {
        nope,
        v_dim,
        scale: SCALE,
    };
    for (seq, kv_seq) in [(1, 1), (1, 70), (8, 8), (5, 66)] {
        let latents = KvBufferPrimitive::<Flex>::Numbers(noise(&[kv_seq, 1, rank + rope], 2));
        let q = noise(&[1, seq, heads, rank + rope], 1);
        let found = decoding::latent_attention::<Flex>(q.clone(), latents.clone(), rank, SCALE);
        let expected = Flex::latent_attention(q, latents.clone(), rank, SCALE);
        close(&found, &expected, VALUE, "latent_attention");
        let q = noise(&[1, seq, heads, nope + rope], 3);
        let plain = decoding::absorbed_attention::<Flex>;
        let found = plain(
            q.clone(),
            latents.clone(),
            Arc::clone(&w),
            absorbed,
            Compute::F32,
        );
        let expected = Flex::absorbed_attention(q, latents, Arc::clone(&w), absorbed, Compute::F32);
        close(&found, &expected, VALUE, "absorbed_attention");
    }
}
