//! Attention over a row that all heads share.

use moeforge_kernels::latent_attention;

use super::*;

fn absorbed(q: Tensor<4>, latents: Tensor<4>) -> Tensor<4> {
    latent_attention(q, latents, 5, 0.3)
}

#[test]
fn latent_attention_is_attention_over_a_shared_row() {
    // The last ones are a decoding step: around the size of its tasks.
    for [batch, seq, kv_seq, heads] in [
        [2, 3, 9, 4],
        [2, 1, 9, 4],
        [1, 1, 1, 3],
        [1, 1, 300, 7],
        [1, 2, 2, 3],
        [1, 8, 300, 7],
        [1, 9, 300, 2],
    ] {
        let (q, latents) = (
            random([batch, seq, heads, 7]),
            random([batch, kv_seq, 1, 7]),
        );
        let v = latents.clone().slice([0..batch, 0..kv_seq, 0..1, 0..5]);
        let expected = attention(q.clone(), latents.clone(), v, 0.3, &Segments::whole());
        close(&absorbed(q, latents), &expected, "latent");
    }
}

#[test]
fn a_few_queries_of_latent_attention_get_the_bits_each_gets_alone() {
    for [seq, kv_seq, heads] in [[2, 2, 3], [2, 65, 16], [5, 130, 7], [8, 300, 1]] {
        let (q, latents) = (random([1, seq, heads, 7]), random([1, kv_seq, 1, 7]));
        let together = values(&absorbed(q.clone(), latents.clone()));
        let alone = (0..seq).flat_map(|at| {
            let q = q.clone().slice([0..1, at..at + 1]);
            let seen = latents.clone().slice([0..1, 0..kv_seq - seq + at + 1]);
            values(&absorbed(q, seen))
        });
        let same = together.iter().map(|value| value.to_bits());
        assert!(
            same.eq(alone.map(f32::to_bits)),
            "{seq} of {kv_seq}, {heads} heads"
        );
    }
}
