//! Exchanges between ranks that are threads, against the sums written out. Values are small integers, so every order of a sum
//! has the same bits, and a row that is lost, doubled or in another's place shows.

use std::time::Duration;

use burn::tensor::TensorData;
use parallel::{Arrival, Wire, threads};

use super::*;

/// One case: what each rank's routers chose.
#[derive(Clone, Debug)]
struct Case {
    ep: usize,
    experts: usize,
    top_k: usize,
    kind: ExchangeKind,
    /// Of every rank: the experts of each token.
    chosen: Vec<Vec<Vec<usize>>>,
}

const HIDDEN: usize = 3;

/// What an expert multiplies rows by.
fn factor(expert: usize) -> f32 {
    (expert + 1) as f32
}

/// The value at a place of one rank's tensor.
fn value(seed: usize, at: usize) -> f32 {
    ((seed * 7 + at * 5) % 11) as f32 - 5.0
}

fn values(seed: usize, n: usize) -> Vec<f32> {
    (0..n).map(|at| value(seed, at)).collect()
}

/// What a rank ends with: the sum, and the gradients of rows and weights.
type Outcome = [Vec<f32>; 3];

/// What a rank should end with.
fn expected(case: &Case, rank: usize) -> Outcome {
    let (chosen, k) = (&case.chosen[rank], case.top_k);
    let n = chosen.len();
    let [x, dy] = [rank, rank + 100].map(|seed| values(seed, n * HIDDEN));
    let weights = values(rank + 50, n * k);
    let (mut y, mut dx) = (vec![0.0; n * HIDDEN], vec![0.0; n * HIDDEN]);
    let mut dweights = vec![0.0; n * k];
    for (token, experts) in chosen.iter().enumerate() {
        for (slot, expert) in (token * k..).zip(experts) {
            for at in token * HIDDEN..(token + 1) * HIDDEN {
                y[at] += weights[slot] * factor(*expert) * x[at];
                dx[at] += weights[slot] * factor(*expert) * dy[at];
                dweights[slot] += factor(*expert) * x[at] * dy[at];
            }
        }
    }
    [y, dx, dweights]
}

/// Experts that multiply: `y = x · Σ w · factor`.
fn multiply(rows: ServedRows, first: usize) -> Tensor<2> {
    let [n, k] = rows.routing.weights.dims();
    let order = ints(&rows.routing.order);
    let offsets = ints(&rows.routing.offsets);
    let mut factors = vec![0.0; n * k];
    for (expert, places) in offsets.windows(2).enumerate() {
        for slot in &order[places[0]..places[1]] {
            factors[*slot] = factor(first + expert);
        }
    }
    let factors = TensorData::new(factors, [n, k]);
    let factors = Tensor::<2>::from_data(factors, &rows.x.device());
    rows.x * (rows.routing.weights * factors).sum_dim(1)
}

/// One rank's exchange, there and back.
fn run(case: &Case, world: World) -> Outcome {
    let rank = world.rank();
    let device = Device::flex().autodiff();
    let chosen = &case.chosen[rank];
    let (n, k) = (chosen.len(), case.top_k);
    let tensor = |values: Vec<f32>, width: usize| {
        Tensor::<2>::from_data(TensorData::new(values, [n, width]), &device).require_grad()
    };
    let (x, weights) = (
        tensor(values(rank, n * HIDDEN), HIDDEN),
        tensor(values(rank + 50, n * k), k),
    );
    let ids: Vec<i32> = chosen
        .iter()
        .flatten()
        .map(|expert| *expert as i32)
        .collect();
    let ids = Tensor::<2, Int>::from_data(TensorData::new(ids, [n, k]), &device);
    let (order, offsets) = kernels::dispatch(ids.clone(), case.experts);
    let routed = Routed {
        scores: weights.clone(),
        ids,
        weights: weights.clone(),
    };
    let routing = Routing {
        weights: weights.clone(),
        order,
        offsets,
        part: None,
    };
    let ranks = ExpertRanks::new(world, case.ep, case.kind, RowWire::F32);
    let ranges = ranks.ranges(case.experts);
    let first = ranges[ranks.place()].start;
    let of = ShardedExperts {
        ranks: &ranks,
        ranges: &ranges,
        name: "test".into(),
        // Small whole numbers are values of E4M3.
        scales: case.experts.is_multiple_of(3).then_some(Scales::One),
    };
    let serve = |rows: ServedRows| {
        let part = rows.routing.part.expect("a part of a micro-batch");
        assert!(
            rows.dropout_seed
                .is_some_and(|of| case.chosen[of as usize].len() == part.tokens)
        );
        multiply(rows, first)
    };
    let mut running = RunningExperts::send(of, (x.clone(), &routed), &routing, Some(rank as u64));
    running.serve(serve);
    let (y, exchanged) = running.finish();
    let sum = read(y.clone());
    let dy = tensor(values(rank + 100, n * HIDDEN), HIDDEN);
    let mut exchanged = exchanged.expect("a graph");
    exchanged.send(&dy.clone().inner());
    exchanged.serve(|_| {});
    exchanged.finish();
    let found = (y * Tensor::from_inner(dy.inner())).sum().backward();
    let [dx, dweights] = [x, weights].map(|of| read(of.grad(&found).expect("a gradient")));
    [sum, dx, dweights]
}

/// All ranks' outcomes over some engines.
fn outcomes<W: Wire + 'static>(case: &Case, wires: Vec<W>) -> Vec<Outcome> {
    std::thread::scope(|scope| {
        let ranks = wires.into_iter();
        let ranks = ranks.map(|wire| scope.spawn(|| run(case, World::new(wire))));
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// Numbers that look random.
struct Numbers(u64);

impl Numbers {
    fn below(&mut self, n: usize) -> usize {
        self.0 = self
            .0
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (self.0 >> 33) as usize % n
    }

    /// `n` different experts below `experts`.
    fn experts(&mut self, experts: usize, n: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..experts).collect();
        (0..n).map(|_| all.remove(self.below(all.len()))).collect()
    }
}

fn cases() -> Vec<Case> {
    let mut numbers = Numbers(1);
    let mut cases = Vec::new();
    for kind in [ExchangeKind::Slots, ExchangeKind::Rows] {
        for (ranks, ep) in [(1, 1), (2, 1), (2, 2), (3, 3), (4, 2), (4, 4)] {
            for _ in 0..12 {
                let experts = ep.max(2) + numbers.below(9);
                let top_k = 1 + numbers.below(experts.min(4));
                // A rank has no tokens at times, and few at others.
                let tokens = |numbers: &mut Numbers| [0, 1, 7, 8, 9, 40][numbers.below(6)];
                let chosen = (0..ranks).map(|_| {
                    let n = tokens(&mut numbers);
                    (0..n).map(|_| numbers.experts(experts, top_k)).collect()
                });
                let chosen = chosen.collect();
                cases.push(Case {
                    ep,
                    experts,
                    top_k,
                    kind,
                    chosen,
                });
            }
            // All tokens choose the same expert, and the last ones.
            for expert in [0, 4] {
                let chosen = vec![vec![vec![expert]; 9]; ranks];
                cases.push(Case {
                    ep,
                    experts: 5,
                    top_k: 1,
                    kind,
                    chosen,
                });
            }
        }
    }
    cases
}

#[test]
fn every_row_comes_once_and_returns_to_its_slot() {
    for case in cases() {
        let wires = threads::ranks(case.chosen.len(), Duration::from_secs(60));
        for (rank, found) in outcomes(&case, wires).into_iter().enumerate() {
            assert_eq!(found, expected(&case, rank), "rank {rank} of {case:?}");
        }
    }
}

/// An engine that spoils messages of rows.
#[derive(Debug)]
struct Spoiled<W> {
    wire: W,
    spoil: fn(&mut [u8]),
}

impl<W: Wire> Wire for Spoiled<W> {
    fn rank(&self) -> usize {
        self.wire.rank()
    }

    fn ranks(&self) -> usize {
        self.wire.ranks()
    }

    fn post(&self, name: &str, messages: Vec<Vec<u8>>) -> Arrival {
        let arrival = self.wire.post(name, messages);
        let (spoil, is_first) = (self.spoil, name.starts_with("rows of"));
        Box::new(move || {
            let mut messages = arrival()?;
            let spoiled = messages.iter_mut().filter(|_| is_first);
            spoiled.for_each(|message| spoil(message));
            Ok(messages)
        })
    }
}

/// Two rows that change places, and one that is lost, do show.
#[test]
fn spoiled_rows_are_seen() {
    const ROW: usize = 4 * HIDDEN;
    let swap = |message: &mut [u8]| {
        let (rest, last) = message.split_at_mut(message.len() - ROW);
        let at = rest.len() - ROW;
        rest[at..].swap_with_slice(last);
    };
    let lose = |message: &mut [u8]| {
        let at = message.len() - ROW;
        message[at..].fill(0);
    };
    for kind in [ExchangeKind::Slots, ExchangeKind::Rows] {
        let chosen = (0..2).map(|_| {
            (0..9)
                .map(|token| vec![token % 4, (token + 1) % 4])
                .collect()
        });
        let case = Case {
            ep: 2,
            experts: 4,
            top_k: 2,
            kind,
            chosen: chosen.collect(),
        };
        let spoils: [fn(&mut [u8]); 3] = [|_| {}, swap, lose];
        for (i, spoil) in spoils.into_iter().enumerate() {
            let wires = threads::ranks(2, Duration::from_secs(60)).into_iter();
            let wires = wires.map(|wire| Spoiled { wire, spoil });
            let found = outcomes(&case, wires.collect());
            let is_right = (0..2).all(|rank| found[rank] == expected(&case, rank));
            assert_eq!(is_right, i == 0, "{kind:?} {i}");
        }
    }
}

/// Rows for products in FP8 take a quarter of the bytes, and arrive as those products would round them.
#[test]
fn rows_for_fp8_travel_in_eight_bits() {
    let (tokens, shape) = ([2, 0, 2], [3, 200]);
    let x = values(9, 600);
    let read_back = |scales: Option<Scales>| {
        let mut message = MessageWriter::default();
        OutgoingRows::new(x.clone(), shape, scales).write(&mut message, &tokens);
        let message = message.finish();
        let rows = OutgoingRows::read(&mut MessageReader::new(&message), shape[1]);
        (message.len(), rows.unwrap())
    };
    let (len, rows) = read_back(None);
    let expected = tokens.map(|token| &x[token * 200..][..200]).concat();
    assert_eq!((len, rows), (16 + 4 * 600, expected.clone()));
    for kind in [Scales::F32, Scales::PowerOfTwo] {
        let (len, rows) = read_back(Some(kind));
        let tiles = kernels::fp8::encode_tiles(&expected, shape, [1, 128], kind);
        let mut rounded = vec![0.0; 600];
        tiles.decode(0..3, &mut rounded);
        assert_eq!((len, rows), (24 + 600 + 4 * 6, rounded));
    }
}
