//! Linear layers.

use std::sync::Arc;

use burn::backend::Flex;

use super::{GRADIENT, ROWS, VALUE, all_close, close, noise, shape};
use crate::backend::gradients::{Gradients, UpdateSaved};
use crate::backend::plain::{linear, saved_reals};
use crate::backend::saved::{SavedActivation, SavedForm};
use crate::backend::traits::{Direction, HeadRows, Kernels, Update};
use crate::formats::Matrix;
use crate::settings::Compute;
use crate::testing;

const SIZES: [[usize; 2]; 3] = [[5, 7], [33, 40], [70, 131]];

#[test]
fn products_with_one_weight_agree() {
    for (rows, [out, width]) in ROWS
        .into_iter()
        .flat_map(|rows| SIZES.map(|size| (rows, size)))
    {
        let (x, dy) = (noise(&[rows, width], 1), noise(&[rows, out], 2));
        for w in testing::every_format(out, width, 3) {
            let what = format!("{} of {rows} × {out} × {width}", w.format().name());
            let w = Arc::new(w);
            for compute in [Compute::F32, Compute::MatchWeight] {
                let found = linear::linear_frozen::<Flex>(x.clone(), &w, compute);
                let expected = Flex::linear_frozen(x.clone(), Arc::clone(&w), Compute::F32);
                close(&found, &expected, VALUE, &what);
            }
            let found = linear::linear_frozen_dx::<Flex>(dy.clone(), &w, Compute::F32);
            let expected = Flex::linear_frozen_dx(dy.clone(), &w, Compute::F32);
            close(&found, &expected, GRADIENT, &what);
        }
        let w = noise(&[out, width], 4);
        let what = format!("trained, of {rows} × {out} × {width}");
        let found = linear::linear_trained::<Flex>(x.clone(), w.clone(), Compute::F32);
        let expected = Flex::linear_trained(x.clone(), w.clone(), Compute::F32, Compute::F32);
        close(&found, &expected, VALUE, &what);
        let found = linear::linear_trained_dx::<Flex>(dy.clone(), w.clone(), Compute::F32);
        let expected = Flex::linear_trained_dx(dy.clone(), w, Compute::F32);
        close(&found, &expected, GRADIENT, &what);
        if rows > 0 {
            let x = saved_reals::save_for_backward::<Flex>(x, Compute::F32);
            let found = linear::linear_dw::<Flex>(dy.clone(), &x, Compute::F32);
            let expected = Flex::linear_dw(dy, &x, Compute::F32);
            close(&found, &expected, GRADIENT, &what);
        }
    }
}

#[test]
fn updates_agree() {
    let update = Update {
        scale: 0.7,
        compute: Compute::F32,
        saved_as: Compute::F32,
    };
    for (rows, rank) in ROWS
        .into_iter()
        .flat_map(|rows| [0, 3].map(|rank| (rows, rank)))
    {
        let [out, width] = [33, 40];
        let what = format!("an update of rank {rank} of {rows} rows");
        let (x, dy) = (noise(&[rows, width], 1), noise(&[rows, out], 2));
        let w = Arc::new(testing::every_format(out, width, 3).remove(1));
        let [a, b] = [noise(&[rank, width], 4), noise(&[out, rank], 5)];
        let factors = [a.clone(), b.clone()];
        let (y, low) =
            linear::linear_updated::<Flex>(x.clone(), factors.clone(), Arc::clone(&w), update);
        if rank == 0 {
            let expected = Flex::linear_frozen(x, Arc::clone(&w), Compute::F32);
            close(&y, &expected, VALUE, &what);
            assert_eq!(shape(&low), [rows, 0]);
            continue;
        }
        let (expected, expected_low) =
            Flex::linear_updated(x.clone(), a, b, Arc::clone(&w), update);
        all_close(&[y, low.clone()], &[expected, expected_low], VALUE, &what);
        if rows == 0 {
            continue;
        }
        let saved = UpdateSaved {
            x: Some(Arc::new(SavedActivation::new(SavedForm::Float(x), 0))),
            factors,
        };
        let found = linear::linear_updated_grads::<Flex>(
            dy.clone(),
            saved.clone(),
            low.clone(),
            (&w, update),
            true,
        );
        let expected = Flex::linear_updated_grads(dy, saved, low, &w, update, true);
        close(&found.0.unwrap(), &expected.0.unwrap(), GRADIENT, &what);
        all_close(&found.1.unwrap(), &expected.1.unwrap(), GRADIENT, &what);
    }
}

#[test]
fn sums_with_a_factor_and_norms_of_rows_agree() {
    for (rows, rank) in [(1, 0), (1, 2), (9, 3), (70, 3)] {
        let [out, width] = [33, 40];
        let (y, u, b) = (
            noise(&[rows, out], 1),
            noise(&[rows, rank], 2),
            noise(&[out, rank], 3),
        );
        let found = linear::linear_add::<Flex>(y.clone(), u.clone(), b.clone());
        close(
            &found,
            &Flex::linear_add(y, u, b.clone()),
            VALUE,
            "linear_add",
        );
        let a = noise(&[rank, width], 4);
        for w in testing::every_format(out, width, 5) {
            let found = linear::row_norms::<Flex>([a.clone(), b.clone()], &w, 0.7);
            let expected = Flex::row_norms(a.clone(), b.clone(), Arc::new(w), 0.7);
            close(&found, &expected, VALUE, "row_norms");
        }
    }
}

#[test]
fn products_of_heads_agree() {
    let [heads, nope, v, rank] = [3, 5, 4, 7];
    let keys = Matrix::from_f32(heads * rank, nope, &testing::noise(heads * rank * nope, 1));
    let values = Matrix::from_f32(heads * v, rank, &testing::noise(heads * v * rank, 2));
    let mut weights = testing::every_format(heads * (nope + v), rank, 3);
    weights.push(Matrix::from_split_kv_b(keys, values, heads).unwrap());
    for w in weights.into_iter().map(Arc::new) {
        for (tokens, direction) in [1, 9, 70].into_iter().flat_map(|tokens| {
            [Direction::Forward, Direction::Transposed].map(|direction| (tokens, direction))
        }) {
            for (start, len) in [(0, nope), (nope, v), (1, 3)] {
                let width = if direction == Direction::Forward {
                    rank
                } else {
                    len
                };
                let rows = HeadRows {
                    heads,
                    start,
                    len,
                    direction,
                };
                let x = noise(&[tokens, heads, width], 4);
                let found = linear::heads_linear::<Flex>(x.clone(), &w, rows, Compute::F32);
                let expected = Flex::heads_linear(x, Arc::clone(&w), rows, Compute::F32);
                close(
                    &found,
                    &expected,
                    VALUE,
                    &format!("{tokens} tokens, {rows:?}"),
                );
            }
        }
    }
}
