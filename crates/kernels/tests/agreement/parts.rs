//! A layer's experts in two calls, each with the slots of its own experts, and the norms of updated rows.

use moeforge_kernels::row_norms;

use super::*;

/// The routing of the experts in `numbers` alone: the others' slots come last and are left out.
fn part_of(
    ids: &Tensor<2, Int>,
    experts: usize,
    numbers: &[usize],
    weights: &Tensor<2>,
) -> Routing {
    let (n, [tokens, top_k]) = (numbers.len(), ids.dims());
    let mut places = vec![n as i32; experts];
    (0..)
        .zip(numbers)
        .for_each(|(place, number)| places[*number] = place);
    let places: Tensor<1, Int> = super::ids(places, [experts]);
    let local = places.select(0, ids.clone().reshape([tokens * top_k]));
    let (order, offsets) = dispatch(local.reshape([tokens, top_k]), n + 1);
    Routing {
        weights: weights.clone(),
        order,
        offsets: offsets.select(0, Tensor::arange(0..n as i64 + 1, &device())),
        part: None,
    }
}

#[test]
fn experts_in_two_parts_are_all_of_them() {
    let [tokens, experts, top_k, hidden, inner] = [130, 6, 3, 10, 7];
    let choice = TopK {
        top_k,
        n_group: 1,
        topk_group: 1,
        group_score: GroupScore::Max,
    };
    let ids = choose_experts(random([tokens, experts]), choice);
    let (order, offsets) = dispatch(ids.clone(), experts);
    let (x, weights) = (random([tokens, hidden]), random([tokens, top_k]));
    let (gate, up, down) = (
        random([experts, inner, hidden]),
        random([experts, inner, hidden]),
        random([experts, hidden, inner]),
    );
    let numbers = [vec![1, 4], vec![0, 2, 3, 5]];
    agree!(
        "experts_trained in parts",
        [x, weights, gate, up, down],
        numbers
            .iter()
            .map(|numbers| {
                let own: Vec<i32> = numbers.iter().map(|n| *n as i32).collect();
                let own = super::ids(own, [numbers.len()]);
                experts_trained(
                    x.clone(),
                    part_of(&ids, experts, numbers, &weights),
                    [&gate, &up, &down].map(|stack| stack.clone().select(0, own.clone())),
                    Compute::F32,
                )
            })
            .reduce(|a, b| a + b)
            .unwrap(),
        experts_trained(
            x.clone(),
            Routing {
                weights: weights.clone(),
                order,
                offsets,
                part: None,
            },
            [gate.clone(), up.clone(), down.clone()],
            Compute::F32
        )
    );
}

#[test]
fn row_norms_are_those_of_the_updated_weight() {
    for [out, inner, rank] in [[5, 7, 2], [64, 256, 0], [130, 300, 3], [65, 513, 4]] {
        let (a, b) = (random([rank, inner]), random([out, rank]));
        for w in stored(&random([out, inner])) {
            let mut whole = dense(&w);
            if rank > 0 {
                whole = whole + b.clone().matmul(a.clone()) * 0.7;
            }
            let expected = whole.powi_scalar(2).sum_dim(1).squeeze_dim::<1>(1).sqrt();
            let found = row_norms(&Arc::new(w), [a.clone(), b.clone()], 0.7);
            close(&found, &expected, "row_norms");
        }
    }
}
