//! Routed experts.

use std::sync::Arc;

use burn::backend::Flex;
use burn::backend::tensor::FloatTensor;

use super::{GRADIENT, VALUE, all_close, ids, ints, noise, shape};
use crate::backend::gradients::{ExpertsSaved, Gradients};
use crate::backend::plain::experts;
use crate::backend::traits::{FactorsPrimitive, Kernels, RoutingPrimitive, StacksPrimitive};
use crate::formats::Matrix;
use crate::ops::dropout::Dropout;
use crate::ops::experts::{ExpertBank, ExpertLora, SharedExperts};
use crate::settings::Compute;
use crate::testing;

const EXPERTS: usize = 5;
const TOP_K: usize = 2;
const HIDDEN: usize = 10;
const INNER: usize = 37;

/// Tokens, and experts that are served elsewhere.
const CASES: [(usize, usize); 6] = [(1, 0), (7, 0), (9, 1), (70, 0), (70, 1), (70, 4)];

/// Routing in which expert 1 has no slot, and the slots of the last `elsewhere` experts are left out.
fn routing(tokens: usize, elsewhere: usize) -> RoutingPrimitive<Flex> {
    let choices = [[0, 2], [2, 3], [4, 0], [3, 4], [0, 3]];
    let chosen = (0..tokens).flat_map(|token| choices[token * token % 5]);
    let (order, offsets) = Flex::dispatch_slots(ids(chosen.collect(), &[tokens, TOP_K]), EXPERTS);
    let own = EXPERTS - elsewhere + 1;
    RoutingPrimitive {
        weights: noise(&[tokens, TOP_K], 1),
        order,
        offsets: ids(ints(&offsets)[..own].to_vec(), &[own]),
        part: None,
    }
}

/// Experts in all formats.
fn bank(experts: usize) -> ExpertBank {
    let stack = |rows, cols, seed: u64| {
        let matrix =
            |e: usize| testing::every_format(rows, cols, seed + 7 * e as u64).remove(e % 4);
        (0..experts).map(matrix).collect::<Vec<Matrix>>()
    };
    ExpertBank::new(
        stack(INNER, HIDDEN, 2),
        stack(INNER, HIDDEN, 3),
        stack(HIDDEN, INNER, 4),
    )
}

/// Factors of gate, up and down, in order.
fn factors(experts: usize, ranks: [usize; 3]) -> FactorsPrimitive<Flex> {
    let [g, u, d] = ranks;
    FactorsPrimitive {
        gate_a: noise(&[experts, g, HIDDEN], 5),
        gate_b: noise(&[experts, INNER, g], 6),
        up_a: noise(&[experts, u, HIDDEN], 7),
        up_b: noise(&[experts, INNER, u], 8),
        down_a: noise(&[experts, d, INNER], 9),
        down_b: noise(&[experts, HIDDEN, d], 10),
    }
}

fn lora(probability: f32) -> ExpertLora {
    ExpertLora {
        scale: [0.5, 0.7, 0.9],
        dropout: Dropout {
            probability,
            seed: 11,
        },
        quantizer: None,
    }
}

fn saved(
    x: &FloatTensor<Flex>,
    routing: &RoutingPrimitive<Flex>,
    products: [&FloatTensor<Flex>; 2],
) -> ExpertsSaved<Flex> {
    let save = |x: &FloatTensor<Flex>| Arc::new(Flex::save_for_backward(x.clone(), Compute::F32));
    ExpertsSaved {
        x: save(x),
        routing: routing.clone(),
        gate: save(products[0]),
        up: save(products[1]),
        compute: Compute::F32,
    }
}

#[test]
fn updated_experts_agree() {
    for (tokens, elsewhere) in CASES {
        for (ranks, probability) in [([0, 0, 0], 0.0), ([3, 3, 3], 0.0), ([2, 0, 5], 0.3)] {
            let what = format!("{tokens} tokens, {elsewhere} elsewhere, ranks {ranks:?}");
            let experts = EXPERTS - elsewhere;
            let (routing, factors) = (routing(tokens, elsewhere), factors(experts, ranks));
            let (bank, lora) = (Arc::new(bank(experts)), lora(probability));
            let (x, dy) = (noise(&[tokens, HIDDEN], 12), noise(&[tokens, HIDDEN], 13));
            let settings = (lora, Compute::F32);
            let (y, gate, up) = experts::experts_frozen::<Flex>(
                x.clone(),
                routing.clone(),
                &factors,
                &bank,
                settings,
            );
            let (ey, egate, eup) = Flex::experts_frozen(
                x.clone(),
                routing.clone(),
                factors.clone(),
                Arc::clone(&bank),
                lora,
                Compute::F32,
            );
            let saved = || saved(&x, &routing, [&egate, &eup]);
            let (inputs, grads) = experts::experts_frozen_grads::<Flex>(
                dy.clone(),
                saved(),
                &factors,
                (&bank, lora),
                true,
            );
            let (einputs, egrads) =
                Flex::experts_frozen_grads(dy, saved(), &factors, &bank, lora, true);
            all_close(&[y, gate, up], &[ey, egate, eup], VALUE, &what);
            all_close(&inputs, &einputs, GRADIENT, &what);
            all_close(&grads.unwrap(), &egrads.unwrap(), GRADIENT, &what);
        }
    }
}

#[test]
fn trained_experts_agree() {
    for (tokens, elsewhere) in CASES {
        let what = format!("{tokens} tokens, {elsewhere} elsewhere");
        let experts = EXPERTS - elsewhere;
        let routing = routing(tokens, elsewhere);
        let stacks = StacksPrimitive {
            gate: noise(&[experts, INNER, HIDDEN], 2),
            up: noise(&[experts, INNER, HIDDEN], 3),
            down: noise(&[experts, HIDDEN, INNER], 4),
        };
        let (x, dy) = (noise(&[tokens, HIDDEN], 12), noise(&[tokens, HIDDEN], 13));
        let compute = Compute::F32;
        let (y, gate, up) =
            experts::experts_trained::<Flex>(x.clone(), routing.clone(), &stacks, compute);
        let (ey, egate, eup) =
            Flex::experts_trained(x.clone(), routing.clone(), stacks.clone(), compute);
        let saved = || saved(&x, &routing, [&egate, &eup]);
        let (inputs, grads) = experts::experts_trained_grads::<Flex>(dy.clone(), saved(), &stacks);
        let (einputs, egrads) = Flex::experts_trained_grads(dy, saved(), &stacks);
        all_close(&[y, gate, up], &[ey, egate, eup], VALUE, &what);
        all_close(&inputs, &einputs, GRADIENT, &what);
        all_close(&grads, &egrads, GRADIENT, &what);
    }
}

#[test]
fn routed_and_shared_experts_agree() {
    let matrix = |rows, cols, seed| Arc::new(testing::every_format(rows, cols, seed).remove(1));
    for tokens in [1, 9] {
        let shared = SharedExperts {
            gate: matrix(21, HIDDEN, 20),
            up: matrix(21, HIDDEN, 21),
            down: matrix(HIDDEN, 21, 22),
            compute: Compute::F32,
        };
        let (x, routing, bank) = (
            noise(&[tokens, HIDDEN], 12),
            routing(tokens, 0),
            Arc::new(bank(EXPERTS)),
        );
        let plain = experts::moe_frozen::<Flex>;
        let found = plain(
            x.clone(),
            routing.clone(),
            Arc::clone(&bank),
            shared.clone(),
            Compute::F32,
        );
        let expected = Flex::moe_frozen(x, routing, bank, shared, Compute::F32);
        all_close(&[found], &[expected], VALUE, "moe_frozen");
    }
}

#[test]
fn no_tokens_have_no_outputs() {
    let (routing, factors, bank) = (routing(0, 0), factors(EXPERTS, [3; 3]), bank(EXPERTS));
    let (x, settings) = (noise(&[0, HIDDEN], 1), (lora(0.3), Compute::F32));
    let (y, gate, up) =
        experts::experts_frozen::<Flex>(x.clone(), routing.clone(), &factors, &bank, settings);
    assert_eq!(
        [&y, &gate, &up].map(shape),
        [[0, HIDDEN], [0, INNER], [0, INNER]].map(Vec::from)
    );
    let saved = saved(&x, &routing, [&gate, &up]);
    let (inputs, grads) =
        experts::experts_frozen_grads::<Flex>(y, saved, &factors, (&bank, settings.0), true);
    assert_eq!(
        inputs.each_ref().map(shape),
        [[0, HIDDEN], [0, TOP_K]].map(Vec::from)
    );
    let f = &factors;
    let expected = [&f.gate_a, &f.gate_b, &f.up_a, &f.up_b, &f.down_a, &f.down_b];
    assert_eq!(grads.unwrap().each_ref().map(shape), expected.map(shape));
}
