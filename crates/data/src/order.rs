//! The order in which samples are visited: a pure function of the seed and the position.
//!
//! The stream of samples is the concatenation of epochs, each a permutation of all samples, and micro-batch number `n` is the
//! `n`-th piece of that stream (it may contain the end of one epoch and the beginning of the next). So a resumed run needs one
//! number.
//!
//! The shuffle is our own, because a library may change its algorithm and with it every recorded run:
//!
//! - generator: ChaCha8, key = seed, epoch, and the shuffled set (0 for the samples of all folders, a folder's number if
//!   folders are weighted), each 8 bytes, little-endian, then 8 zero bytes; stream 0;
//! - Fisher-Yates from the end: for `i` = `n - 1` down to 1, swap `i` with a uniform `j` in `0..=i`;
//! - uniform below `m`: draw `u64`s until one is below the largest multiple of `m` that fits, and
//!   take it modulo `m`.

use rand_chacha::ChaCha8Rng;
use rand_chacha::rand_core::{RngCore, SeedableRng};

/// Whether epochs are shuffled.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Shuffle {
    /// Every epoch in its own order, drawn from the seed.
    Seeded,
    /// Every epoch in the order of the file.
    FileOrder,
}

/// Batches in a group that is sorted by length: enough for little padding, few enough that every stretch of training sees all
/// lengths.
const BATCHES_PER_GROUP: usize = 50;

/// The shuffled sets besides folders, in the generator's key.
const MIXTURE: u64 = u64::MAX;
const LENGTH_GROUPS: u64 = u64::MAX - 1;

/// The order of samples over all epochs.
#[derive(Clone, Debug)]
pub struct SampleOrder {
    components: Vec<MixtureComponent>,
    epoch_len: usize,
    seed: u64,
    shuffle: Shuffle,
    groups: Option<LengthGroups>,
    /// The last epoch, and its samples.
    cached: Option<(u64, Vec<usize>)>,
}

/// A set of samples that are visited equally often.
#[derive(Clone, Debug)]
struct MixtureComponent {
    /// The number of its first sample.
    first: usize,
    n_samples: usize,
    /// Visits in an epoch: fewer than its samples, or more.
    visits: usize,
}

/// The lengths of samples, for grouping.
#[derive(Clone, Debug)]
struct LengthGroups {
    lengths: Vec<u32>,
    batch_size: usize,
}

impl SampleOrder {
    /// The order of `n_samples` samples.
    pub fn new(n_samples: usize, seed: u64, shuffle: Shuffle) -> Self {
        let all = MixtureComponent {
            first: 0,
            n_samples,
            visits: n_samples,
        };
        Self {
            components: vec![all],
            epoch_len: n_samples,
            seed,
            shuffle,
            groups: None,
            cached: None,
        }
    }

    /// The order of a mixture of components with `sizes` samples each and shares proportional to `weights`. An epoch is as long
    /// as all samples together: it visits only some samples of a component that is larger than its share and continues in the
    /// next epoch, and visits a small component repeatedly.
    ///
    /// # Panics
    /// If a weight is negative, none is positive, or their number is not that of the components.
    pub fn mixed(sizes: &[usize], weights: &[f64], seed: u64, shuffle: Shuffle) -> Self {
        assert_eq!(sizes.len(), weights.len(), "a weight for every component");
        let mut order = Self::new(sizes.iter().sum(), seed, shuffle);
        let visits = shares(order.epoch_len, sizes, weights);
        let mut first = 0;
        order.components.clear();
        for (&n_samples, visits) in sizes.iter().zip(visits) {
            order.components.push(MixtureComponent {
                first,
                n_samples,
                visits,
            });
            first += n_samples;
        }
        order.epoch_len = order
            .components
            .iter()
            .map(|component| component.visits)
            .sum();
        order
    }

    /// Fills every batch with samples of similar lengths: the samples of 50 batches at a time are sorted, and the batches
    /// shuffled. For shuffled orders only; `lengths` has one for every sample, and [`SampleOrder::batch`] must then be called
    /// with this size.
    ///
    /// # Panics
    /// If the number of lengths is not that of samples.
    pub fn grouped_by_length(mut self, lengths: Vec<u32>, batch_size: usize) -> Self {
        let n_samples: usize = self
            .components
            .iter()
            .map(|component| component.n_samples)
            .sum();
        assert_eq!(lengths.len(), n_samples, "a length for every sample");
        self.groups = (self.shuffle == Shuffle::Seeded).then_some(LengthGroups {
            lengths,
            batch_size: batch_size.max(1),
        });
        self
    }

    /// Number of visits in an epoch.
    pub fn epoch_len(&self) -> usize {
        self.epoch_len
    }

    /// The samples of micro-batch number `step_index`, counted from 0 over the whole run. Empty if there are no samples.
    ///
    /// Depends on nothing except the arguments and the order's own; only the permutation of the latest epoch is cached, so
    /// calls in increasing order are cheap.
    ///
    /// # Panics
    /// If `step_index * batch_size` is beyond 64 bits.
    pub fn batch(&mut self, step_index: u64, batch_size: usize) -> Vec<usize> {
        if self.epoch_len == 0 {
            return Vec::new();
        }
        let batch_size = batch_size as u64;
        let end = step_index
            .checked_add(1)
            .and_then(|next| next.checked_mul(batch_size));
        let end = end.expect("a run visits fewer than 2^64 samples");
        (end - batch_size..end)
            .map(|position| self.sample(position))
            .collect()
    }

    /// The sample at a position of the stream.
    fn sample(&mut self, position: u64) -> usize {
        let epoch_len = self.epoch_len as u64;
        let (epoch, within) = (position / epoch_len, (position % epoch_len) as usize);
        if !matches!(&self.cached, Some((cached, _)) if *cached == epoch) {
            self.cached = Some((epoch, self.epoch(epoch)));
        }
        self.cached
            .as_ref()
            .map_or(0, |(_, samples)| samples[within])
    }

    /// The samples of an epoch.
    fn epoch(&self, epoch: u64) -> Vec<usize> {
        let mut samples = match self.components.as_slice() {
            [all] => self.visited(all, epoch, 0),
            components => {
                let visited = (0..)
                    .zip(components)
                    .map(|(i, component)| self.visited(component, epoch, i));
                self.mix(visited.collect(), epoch)
            }
        };
        if let Some(groups) = &self.groups {
            groups.sort(&mut samples, self.seed, epoch);
        }
        samples
    }

    /// An epoch's samples of a component: the next `visits` of the component's own stream.
    fn visited(&self, component: &MixtureComponent, epoch: u64, number: u64) -> Vec<usize> {
        let n_samples = component.n_samples as u64;
        let mut position = u128::from(epoch) * component.visits as u128;
        let end = position + component.visits as u128;
        let mut samples = Vec::with_capacity(component.visits);
        while position < end {
            let (pass, within) = (
                position / u128::from(n_samples),
                position % u128::from(n_samples),
            );
            let take = (end - position).min(u128::from(n_samples) - within) as usize;
            let within = within as usize;
            match self.shuffle {
                Shuffle::FileOrder => samples.extend(within..within + take),
                Shuffle::Seeded => {
                    let order = permutation(component.n_samples, [self.seed, pass as u64, number]);
                    samples.extend_from_slice(&order[within..within + take]);
                }
            }
            position += take as u128;
        }
        samples
            .iter_mut()
            .for_each(|sample| *sample += component.first);
        samples
    }

    /// One list of the components' samples: shuffled, or with each component spread evenly.
    fn mix(&self, visited: Vec<Vec<usize>>, epoch: u64) -> Vec<usize> {
        if self.shuffle == Shuffle::Seeded {
            let all = visited.concat();
            let order = permutation(all.len(), [self.seed, epoch, MIXTURE]);
            return order.into_iter().map(|i| all[i]).collect();
        }
        let mut spread: Vec<(f64, usize)> = Vec::with_capacity(self.epoch_len);
        for samples in visited {
            let n = samples.len() as f64;
            let placed = samples.into_iter().enumerate();
            spread.extend(placed.map(|(i, sample)| ((i as f64 + 0.5) / n, sample)));
        }
        // Stable, so that components keep their order at equal positions.
        spread.sort_by(|a, b| a.0.total_cmp(&b.0));
        spread.into_iter().map(|(_, sample)| sample).collect()
    }
}

impl LengthGroups {
    /// Sorts an epoch's samples by length in groups of 50 batches, and shuffles the batches of each group. A batch that began in
    /// the previous epoch, and one that ends in the next, keep their places.
    fn sort(&self, samples: &mut [usize], seed: u64, epoch: u64) {
        let (size, epoch_len) = (self.batch_size, samples.len());
        let begun = (epoch % size as u64) as usize * (epoch_len % size) % size;
        let rest = ((size - begun) % size).min(epoch_len);
        let mut rng = generator([seed, epoch, LENGTH_GROUPS]);
        for group in samples[rest..].chunks_mut(size * BATCHES_PER_GROUP) {
            group.sort_by_key(|&sample| self.lengths[sample]);
            let n_batches = group.len() / size;
            for i in (1..n_batches).rev() {
                let j = below(&mut rng, i as u64 + 1) as usize;
                (0..size).for_each(|k| group.swap(i * size + k, j * size + k));
            }
        }
    }
}

/// `total` in whole shares proportional to the weights, by largest remainders; nothing for a component without samples, and at
/// least one for any other of positive weight.
fn shares(total: usize, sizes: &[usize], weights: &[f64]) -> Vec<usize> {
    let weights: Vec<f64> = sizes
        .iter()
        .zip(weights)
        .map(|(&size, &weight)| if size == 0 { 0.0 } else { weight })
        .collect();
    let sum: f64 = weights.iter().sum();
    let valid = weights.iter().all(|weight| *weight >= 0.0) && sum > 0.0;
    assert!(
        valid || total == 0,
        "weights of at least 0, not all 0: {weights:?}"
    );
    let exact = |weight: f64| weight / sum * total as f64;
    let mut shares: Vec<usize> = weights
        .iter()
        .map(|&weight| exact(weight) as usize)
        .collect();
    let mut by_remainder: Vec<usize> = (0..weights.len()).collect();
    by_remainder.sort_by(|&a, &b| {
        let remainder = |i: usize| exact(weights[i]).fract();
        remainder(b).total_cmp(&remainder(a)).then(a.cmp(&b))
    });
    let missing = total.saturating_sub(shares.iter().sum());
    by_remainder
        .iter()
        .take(missing)
        .for_each(|&i| shares[i] += 1);
    for (share, weight) in shares.iter_mut().zip(weights) {
        *share = (*share).max(usize::from(weight > 0.0));
    }
    shares
}

/// The generator of one purpose: seed, epoch, and what for.
fn generator(key: [u64; 3]) -> ChaCha8Rng {
    let mut bytes = [0; 32];
    for (bytes, number) in bytes.chunks_mut(8).zip(key) {
        bytes.copy_from_slice(&number.to_le_bytes());
    }
    ChaCha8Rng::from_seed(bytes)
}

fn permutation(n_samples: usize, key: [u64; 3]) -> Vec<usize> {
    let mut rng = generator(key);
    let mut permutation: Vec<usize> = (0..n_samples).collect();
    for i in (1..n_samples).rev() {
        let j = below(&mut rng, i as u64 + 1) as usize;
        permutation.swap(i, j);
    }
    permutation
}

/// A uniform number below `bound`, without bias.
fn below(rng: &mut ChaCha8Rng, bound: u64) -> u64 {
    let limit = u64::MAX - u64::MAX % bound;
    loop {
        let draw = rng.next_u64();
        if draw < limit {
            return draw % bound;
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_epoch_visits_every_sample_once_in_its_own_order() {
        let mut order = SampleOrder::new(10, 7, Shuffle::Seeded);
        let epochs: Vec<Vec<usize>> = (0..3).map(|epoch| order.batch(epoch, 10)).collect();
        for epoch in &epochs {
            let mut sorted = epoch.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(epochs[0], epochs[1]);
        assert_ne!(epochs[1], epochs[2]);
        assert_ne!(
            epochs[0],
            SampleOrder::new(10, 8, Shuffle::Seeded).batch(0, 10)
        );
    }

    #[test]
    fn the_order_is_frozen() {
        // A recorded run can be replayed only while this holds. The numbers are from a second
        // implementation of the algorithm described above, in another language.
        assert_eq!(
            SampleOrder::new(10, 42, Shuffle::Seeded).batch(0, 10),
            FIRST_EPOCH
        );
        assert_eq!(
            SampleOrder::new(10, 42, Shuffle::Seeded).batch(1, 10),
            SECOND_EPOCH
        );
    }
    const FIRST_EPOCH: [usize; 10] = [2, 1, 4, 3, 7, 0, 5, 8, 6, 9];
    const SECOND_EPOCH: [usize; 10] = [2, 6, 1, 5, 4, 3, 0, 9, 8, 7];

    #[test]
    fn a_resumed_run_continues_where_it_stopped() {
        for shuffle in [Shuffle::Seeded, Shuffle::FileOrder] {
            let mut whole = SampleOrder::new(7, 3, shuffle);
            let stream: Vec<usize> = (0..12).flat_map(|step| whole.batch(step, 3)).collect();
            for step in [11, 0, 5, 2] {
                let found = SampleOrder::new(7, 3, shuffle).batch(step, 3);
                assert_eq!(
                    found,
                    stream[step as usize * 3..][..3],
                    "{shuffle:?} {step}"
                );
            }
            // The same stream in other batch sizes, larger than the data set too.
            assert_eq!(SampleOrder::new(7, 3, shuffle).batch(1, 18), stream[18..]);
        }
    }

    #[test]
    fn file_order_is_the_order_of_the_file() {
        let mut order = SampleOrder::new(3, 9, Shuffle::FileOrder);
        assert_eq!(
            [order.batch(0, 2), order.batch(1, 2), order.batch(2, 2)],
            [[0, 1], [2, 0], [1, 2]]
        );
        assert!(
            SampleOrder::new(0, 9, Shuffle::Seeded)
                .batch(4, 2)
                .is_empty()
        );
    }

    #[test]
    fn weighted_components_have_their_shares_and_are_visited_evenly() {
        for shuffle in [Shuffle::Seeded, Shuffle::FileOrder] {
            // An epoch of 40: 10 of the first component's 30, and each of the second's 10 three times.
            let mut order = SampleOrder::mixed(&[30, 10], &[1.0, 3.0], 5, shuffle);
            assert_eq!(order.epoch_len(), 40);
            let visits: Vec<usize> = (0..3).flat_map(|epoch| order.batch(epoch, 40)).collect();
            let count = |visits: &[usize], sample| visits.iter().filter(|&&i| i == sample).count();
            for epoch in visits.chunks(40) {
                assert_eq!(epoch.iter().filter(|&&sample| sample < 30).count(), 10);
                assert!((30..40).all(|sample| count(epoch, sample) == 3));
            }
            // Three epochs go once through the large component.
            assert!(
                (0..30).all(|sample| count(&visits, sample) == 1),
                "{shuffle:?}"
            );
            let mut resumed = SampleOrder::mixed(&[30, 10], &[1.0, 3.0], 5, shuffle);
            assert_eq!(resumed.batch(11, 7), visits[77..84]);
        }
        let mut order = SampleOrder::mixed(&[2, 4], &[1.0, 2.0], 0, Shuffle::FileOrder);
        assert_eq!(order.batch(0, 6), [2, 0, 3, 4, 1, 5]);
    }

    #[test]
    fn shares_are_whole_and_no_weighted_component_is_left_out() {
        assert_eq!(shares(10, &[5, 5], &[1.0, 2.0]), [3, 7]);
        assert_eq!(shares(10, &[9, 1], &[1e9, 1e-9]), [10, 1]);
        assert_eq!(shares(10, &[10, 0], &[1.0, 1.0]), [10, 0]);
        assert_eq!(shares(10, &[5, 5], &[0.0, 2.0]), [0, 10]);
    }

    #[test]
    fn batches_hold_similar_lengths_and_every_sample_once() {
        let lengths: Vec<u32> = (0..1003)
            .map(|i: u32| i.wrapping_mul(2_654_435_761) % 512)
            .collect();
        let grouped =
            || SampleOrder::new(1003, 3, Shuffle::Seeded).grouped_by_length(lengths.clone(), 4);
        let padding = |order: &mut SampleOrder| -> u32 {
            let of_batch = |batch: Vec<usize>| {
                let longest = batch.iter().map(|&i| lengths[i]).max().unwrap_or(0);
                batch.iter().map(|&i| longest - lengths[i]).sum::<u32>()
            };
            (0..1003).map(|step| of_batch(order.batch(step, 4))).sum()
        };
        let mut plain = SampleOrder::new(1003, 3, Shuffle::Seeded);
        assert!(padding(&mut grouped()) * 10 < padding(&mut plain));
        // 1003 is no multiple of 4: epochs begin inside of batches.
        let mut order = grouped();
        let stream: Vec<usize> = (0..1003).flat_map(|step| order.batch(step, 4)).collect();
        for epoch in stream.chunks(1003) {
            let mut epoch = epoch.to_vec();
            epoch.sort_unstable();
            assert_eq!(epoch, (0..1003).collect::<Vec<_>>());
        }
        // A resumed run goes on where it stopped.
        for step in [900, 3, 251] {
            assert_eq!(grouped().batch(step, 4), stream[step as usize * 4..][..4]);
        }
        // Batches do not grow along the epoch.
        let longest: Vec<u32> = stream.chunks(4).take(50).map(|b| lengths[b[3]]).collect();
        assert!(!longest.is_sorted() && !longest.is_sorted_by(|a, b| a >= b));
    }

    #[test]
    fn small_numbers_are_drawn_evenly() {
        let mut rng = ChaCha8Rng::from_seed([1; 32]);
        let mut counts = [0_u32; 6];
        (0..60_000).for_each(|_| counts[below(&mut rng, 6) as usize] += 1);
        // Five standard deviations of a count of 10,000 among 60,000 draws.
        assert!(
            counts.iter().all(|count| count.abs_diff(10_000) < 460),
            "{counts:?}"
        );
    }
}
