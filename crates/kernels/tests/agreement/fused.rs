//! Fused operations against the separate ones, which autodiff uses: the same bits, for every stored format and number
//! of rows.

use moeforge_kernels::{
    Absorbed, Ggml, SharedExperts, absorbed_attention, latent_attention, linear_frozen_pair,
    moe_frozen,
};

use super::cached::held;
use super::*;

/// Weights in floats, and in blocks with products in int8.
fn weights(rows: usize, cols: usize) -> Vec<Matrix> {
    let w = random([rows, cols]);
    let mut all = stored(&w);
    for (format, bytes_of_256) in [(Ggml::Q8_0, 8 * 34), (Ggml::Q4K, 144)] {
        let mut bytes = vec![0; rows * cols / 256 * bytes_of_256];
        format.encode(&values(&w), &mut bytes);
        all.push(Matrix::dense(rows, cols, Format::Ggml(format), bytes.into()).unwrap());
    }
    all
}

/// Without autodiff, where operations are fused.
fn plainly<const D: usize>(x: &Tensor<D>) -> Tensor<D> {
    Tensor::from_data(x.to_data(), &moeforge_kernels::device::of_tests())
}

fn same<const D: usize>(found: &Tensor<D>, expected: &Tensor<D>, what: &str) {
    assert_eq!(found.dims(), expected.dims(), "{what}");
    let bits = |x: &Tensor<D>| values(x).into_iter().map(f32::to_bits).collect::<Vec<_>>();
    assert!(bits(found) == bits(expected), "{what}");
    assert!(values(found).iter().any(|v| *v != 0.0), "{what}");
}

#[test]
fn a_pair_of_products_is_two_products() {
    for (first, second) in weights(37, 256).into_iter().zip(weights(80, 256)) {
        let (first, second) = (Arc::new(first), Arc::new(second));
        for tokens in [1, 5, 8, 9, 70] {
            let x = random([tokens, 256]);
            let pair = linear_frozen_pair(plainly(&x), [&first, &second], Compute::MatchWeight);
            let [y, z] =
                [&first, &second].map(|w| linear_frozen(x.clone(), w, Compute::MatchWeight));
            let what = format!("{} of {tokens}", first.format().name());
            same(&pair[0], &y, &what);
            same(&pair[1], &z, &what);
        }
    }
}

#[test]
fn shared_experts_beside_routed_ones_are_added_to_them() {
    let [experts, top_k, hidden, inner] = [5, 2, 256, 256];
    for kind in 0..weights(1, 256).len() {
        let pick = |rows, cols| weights(rows, cols).swap_remove(kind);
        let list = |rows, cols| (0..experts).map(|_| pick(rows, cols)).collect();
        let bank = Arc::new(ExpertBank::new(
            list(inner, hidden),
            list(inner, hidden),
            list(hidden, inner),
        ));
        let shared = SharedExperts {
            gate: pick(512, hidden).into(),
            up: pick(512, hidden).into(),
            down: pick(hidden, 512).into(),
            compute: Compute::MatchWeight,
        };
        for tokens in [1, 3, 8, 9] {
            let (x, weights) = (random([tokens, hidden]), random([tokens, top_k]));
            let (routing, _) = routing(tokens, experts, top_k, weights);
            let at_once = Routing {
                weights: plainly(&routing.weights),
                order: Tensor::from_data(
                    routing.order.to_data(),
                    &moeforge_kernels::device::of_tests(),
                ),
                offsets: Tensor::from_data(
                    routing.offsets.to_data(),
                    &moeforge_kernels::device::of_tests(),
                ),
                part: None,
            };
            let found = moe_frozen(
                plainly(&x),
                at_once,
                &bank,
                shared.clone(),
                Compute::MatchWeight,
            );
            let apart = moe_frozen(x, routing, &bank, shared.clone(), Compute::MatchWeight);
            same(&found, &apart, &format!("kind {kind}, {tokens} tokens"));
        }
    }
}

#[test]
fn absorbed_attention_is_its_three_steps() {
    let (heads, nope, rope, v_dim, rank) = (3, 32, 8, 20, 256);
    for w in weights(heads * (nope + v_dim), rank) {
        let w = Arc::new(w);
        for (seq, kv_seq) in [(1, 1), (1, 150), (3, 70)] {
            let (q, latents) = (
                plainly(&random([1, seq, heads, nope + rope])),
                held(
                    CacheType::F32,
                    &plainly(&random([1, kv_seq, 1, rank + rope])),
                ),
            );
            let part = |start, len, direction| HeadRows {
                heads,
                start,
                len,
                direction,
            };
            let of = |range| q.clone().slice([0..1, 0..seq, 0..heads, range]);
            let keys = part(0, nope, Direction::Transposed);
            let q_latent = heads_linear(
                of(0..nope).reshape([seq, heads, nope]),
                &w,
                keys,
                Compute::MatchWeight,
            );
            let queries = vec![
                q_latent.reshape([1, seq, heads, rank]),
                of(nope..nope + rope),
            ];
            let out = latent_attention(Tensor::cat(queries, 3), &latents, rank, 0.3);
            let values = part(nope, v_dim, Direction::Forward);
            let expected = heads_linear(
                out.reshape([seq, heads, rank]),
                &w,
                values,
                Compute::MatchWeight,
            )
            .reshape([1, seq, heads, v_dim]);
            let absorbed = Absorbed {
                nope,
                v_dim,
                scale: 0.3,
            };
            let found = absorbed_attention(q, &latents, &w, absorbed, Compute::MatchWeight);
            same(&found, &expected, w.format().name());
        }
    }
}
