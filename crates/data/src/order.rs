//! In which order samples are visited: a pure function of the seed and the position.
//!
//! The stream of samples is the concatenation of epochs, each a permutation of all samples, and
//! micro-batch number `n` is the `n`-th piece of that stream (it may hold the end of one epoch and
//! the beginning of the next). So a resumed run needs to know one number.
//!
//! The shuffle is ours, because a library may change its algorithm and with it every recorded run:
//!
//! - generator: ChaCha8, key = seed (8 bytes, little-endian), epoch (8 bytes, little-endian), then
//!   16 zero bytes; stream 0;
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
    /// Every epoch as the file has it.
    FileOrder,
}

/// The order of samples over all epochs.
#[derive(Clone, Debug)]
pub struct Order {
    n_samples: usize,
    seed: u64,
    shuffle: Shuffle,
    /// The epoch asked for last, and its permutation.
    cached: Option<(u64, Vec<usize>)>,
}

impl Order {
    /// The order of `n_samples` samples.
    pub fn new(n_samples: usize, seed: u64, shuffle: Shuffle) -> Self {
        Self {
            n_samples,
            seed,
            shuffle,
            cached: None,
        }
    }

    /// The samples of micro-batch number `step_index`, counted from 0 over the whole run. Empty if
    /// there are no samples.
    ///
    /// Depends on nothing but the arguments and those of [`Order::new`]; only the permutation of
    /// the latest epoch is kept, so calls in increasing order are cheap.
    ///
    /// # Panics
    /// If `step_index * batch_size` is beyond 64 bits.
    pub fn batch(&mut self, step_index: u64, batch_size: usize) -> Vec<usize> {
        if self.n_samples == 0 {
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
        let n_samples = self.n_samples as u64;
        let (epoch, within) = (position / n_samples, (position % n_samples) as usize);
        if self.shuffle == Shuffle::FileOrder {
            return within;
        }
        match &self.cached {
            Some((cached, permutation)) if *cached == epoch => permutation[within],
            _ => {
                let permutation = permutation(self.n_samples, self.seed, epoch);
                let sample = permutation[within];
                self.cached = Some((epoch, permutation));
                sample
            }
        }
    }
}

fn permutation(n_samples: usize, seed: u64, epoch: u64) -> Vec<usize> {
    let mut key = [0; 32];
    key[..8].copy_from_slice(&seed.to_le_bytes());
    key[8..16].copy_from_slice(&epoch.to_le_bytes());
    let mut rng = ChaCha8Rng::from_seed(key);

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
        let mut order = Order::new(10, 7, Shuffle::Seeded);
        let epochs: Vec<Vec<usize>> = (0..3).map(|epoch| order.batch(epoch, 10)).collect();
        for epoch in &epochs {
            let mut sorted = epoch.clone();
            sorted.sort_unstable();
            assert_eq!(sorted, (0..10).collect::<Vec<_>>());
        }
        assert_ne!(epochs[0], epochs[1]);
        assert_ne!(epochs[1], epochs[2]);
        assert_ne!(epochs[0], Order::new(10, 8, Shuffle::Seeded).batch(0, 10));
    }

    #[test]
    fn the_order_is_frozen() {
        // A recorded run can be replayed only while this holds. The numbers are from a second
        // implementation of the algorithm described above, in another language.
        assert_eq!(
            Order::new(10, 42, Shuffle::Seeded).batch(0, 10),
            FIRST_EPOCH
        );
        assert_eq!(
            Order::new(10, 42, Shuffle::Seeded).batch(1, 10),
            SECOND_EPOCH
        );
    }
    const FIRST_EPOCH: [usize; 10] = [2, 1, 4, 3, 7, 0, 5, 8, 6, 9];
    const SECOND_EPOCH: [usize; 10] = [2, 6, 1, 5, 4, 3, 0, 9, 8, 7];

    #[test]
    fn a_resumed_run_continues_where_it_stopped() {
        for shuffle in [Shuffle::Seeded, Shuffle::FileOrder] {
            let mut whole = Order::new(7, 3, shuffle);
            let stream: Vec<usize> = (0..12).flat_map(|step| whole.batch(step, 3)).collect();
            for step in [11, 0, 5, 2] {
                let found = Order::new(7, 3, shuffle).batch(step, 3);
                assert_eq!(
                    found,
                    stream[step as usize * 3..][..3],
                    "{shuffle:?} {step}"
                );
            }
            // The same stream in other batch sizes, larger than the data set too.
            assert_eq!(Order::new(7, 3, shuffle).batch(1, 18), stream[18..]);
        }
    }

    #[test]
    fn file_order_is_the_order_of_the_file() {
        let mut order = Order::new(3, 9, Shuffle::FileOrder);
        assert_eq!(
            [order.batch(0, 2), order.batch(1, 2), order.batch(2, 2)],
            [[0, 1], [2, 0], [1, 2]]
        );
        assert!(Order::new(0, 9, Shuffle::Seeded).batch(4, 2).is_empty());
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
