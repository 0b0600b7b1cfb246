//! Python's `random.Random`: what the evaluation harness draws its few-shot examples and its bootstraps with.
//!
//! Source: M. Matsumoto, T. Nishimura: Mersenne Twister (1998); python/cpython: Lib/random.py, Modules/_randommodule.c.

/// Words of the state.
const STATE_WORDS: usize = 624;
/// How far apart the words are that make a new one.
const SHIFT: usize = 397;

/// A Mersenne Twister that is seeded and read as Python's.
#[derive(Clone, Debug)]
pub struct PythonRandom {
    state: [u32; STATE_WORDS],
    /// Words of the state that are used up.
    used: usize,
}

impl PythonRandom {
    /// `random.Random(seed)`.
    pub fn new(seed: u64) -> Self {
        let [low, high] = [seed as u32, (seed >> 32) as u32];
        let key = [low, high];
        let mut random = Self {
            state: initial(19_650_218),
            used: STATE_WORDS,
        };
        random.mix(if high == 0 { &key[..1] } else { &key });
        random
    }

    /// Mixes a key into the state.
    fn mix(&mut self, key: &[u32]) {
        let mut at = 1;
        for round in 0..STATE_WORDS {
            let from = round % key.len();
            let added = key[from].wrapping_add(from as u32);
            at = self.mix_word(at, 1_664_525, added);
        }
        for _ in 1..STATE_WORDS {
            let subtracted = (at as u32).wrapping_neg();
            at = self.mix_word(at, 1_566_083_941, subtracted);
        }
        self.state[0] = 1 << 31;
    }

    /// Mixes a word with the one before it; returns the place of the next.
    fn mix_word(&mut self, at: usize, factor: u32, added: u32) -> usize {
        let mixed = self.state[at] ^ scrambled(self.state[at - 1]).wrapping_mul(factor);
        self.state[at] = mixed.wrapping_add(added);
        if at + 1 < STATE_WORDS {
            return at + 1;
        }
        self.state[0] = self.state[at];
        1
    }

    /// The next 32 bits.
    fn next_word(&mut self) -> u32 {
        if self.used == STATE_WORDS {
            self.twist();
        }
        let mut word = self.state[self.used];
        self.used += 1;
        word ^= word >> 11;
        word ^= (word << 7) & 0x9d2c_5680;
        word ^= (word << 15) & 0xefc6_0000;
        word ^ (word >> 18)
    }

    fn twist(&mut self) {
        for at in 0..STATE_WORDS {
            let (this, next) = (self.state[at], self.state[(at + 1) % STATE_WORDS]);
            let joined = (this & (1 << 31)) | (next & (u32::MAX >> 1));
            let odd = if joined & 1 == 1 { 0x9908_b0df } else { 0 };
            self.state[at] = self.state[(at + SHIFT) % STATE_WORDS] ^ (joined >> 1) ^ odd;
        }
        self.used = 0;
    }

    /// `random()`: from 0 to below 1.
    pub fn next_f64(&mut self) -> f64 {
        let (high, low) = (self.next_word() >> 5, self.next_word() >> 6);
        (f64::from(high) * f64::from(1 << 26) + f64::from(low)) / (1_u64 << 53) as f64
    }

    /// `getrandbits(bits)`, of up to 64.
    fn bits(&mut self, bits: u32) -> u64 {
        match bits {
            0 => 0,
            1..=32 => u64::from(self.next_word() >> (32 - bits)),
            _ => {
                let low = u64::from(self.next_word());
                let high = u64::from(self.next_word() >> (64 - bits));
                (high << 32) | low
            }
        }
    }

    /// `_randbelow(n)`: from 0 to below `n`.
    fn below(&mut self, n: usize) -> usize {
        let bits = usize::BITS - n.leading_zeros();
        loop {
            let drawn = self.bits(bits) as usize;
            if drawn < n {
                return drawn;
            }
        }
    }

    /// `sample(range(n), k)`: `k` places of `n`, in the order of drawing; none if there are fewer.
    pub fn sample(&mut self, n: usize, k: usize) -> Option<Vec<usize>> {
        if k > n {
            return None;
        }
        if n > most_in_a_list(k) {
            let mut drawn = Vec::with_capacity(k);
            while drawn.len() < k {
                let place = self.below(n);
                if !drawn.contains(&place) {
                    drawn.push(place);
                }
            }
            return Some(drawn);
        }
        let mut pool: Vec<usize> = (0..n).collect();
        let draw = |left: usize| {
            let at = self.below(left);
            let place = pool[at];
            pool[at] = pool[left - 1];
            place
        };
        Some((n - k + 1..=n).rev().map(draw).collect())
    }

    /// `choices(range(n), k=k)`: `k` places of `n`, any of them repeatedly.
    pub fn choices(&mut self, n: usize, k: usize) -> impl Iterator<Item = usize> {
        let n = n as f64;
        (0..k).map(move |_| (self.next_f64() * n) as usize)
    }
}

/// Up to how many places Python draws from a list of them, rather than draw again what is drawn.
fn most_in_a_list(k: usize) -> usize {
    if k <= 5 {
        return 21;
    }
    let exponent = ((k * 3) as f64).ln() / 4_f64.ln();
    21 + 4_usize.saturating_pow(exponent.ceil() as u32)
}

/// A state from one word.
fn initial(seed: u32) -> [u32; STATE_WORDS] {
    let mut state = [seed; STATE_WORDS];
    for at in 1..STATE_WORDS {
        let mixed = scrambled(state[at - 1]).wrapping_mul(1_812_433_253);
        state[at] = mixed.wrapping_add(at as u32);
    }
    state
}

fn scrambled(word: u32) -> u32 {
    word ^ (word >> 30)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Python's own, by version 3.11.
    #[test]
    fn draws_are_pythons() {
        let mut random = PythonRandom::new(1234);
        assert_eq!(random.next_f64(), 0.9664535356921388);
        assert_eq!(random.next_f64(), 0.4407325991753527);
        let sample = |random: &mut PythonRandom, n, k| random.sample(n, k).unwrap();
        assert_eq!(sample(&mut random, 1000, 6), [7, 92, 932, 965, 961, 826]);
        assert_eq!(sample(&mut random, 30, 6), [18, 1, 21, 22, 2, 3]);
        assert_eq!(sample(&mut random, 10, 6), [5, 3, 0, 7, 6, 2]);
        let chosen: Vec<usize> = random.choices(7, 5).collect();
        assert_eq!(chosen, [4, 3, 3, 0, 4]);

        let mut large = PythonRandom::new((1 << 40) + 5);
        assert_eq!(sample(&mut large, 100, 3), [64, 66, 34]);
        assert_eq!(large.next_f64(), 0.6637982795073579);

        let many_of_many = sample(&mut PythonRandom::new(0), 400, 26);
        assert_eq!(many_of_many[..6], [197, 388, 215, 20, 132, 261]);
        assert_eq!(many_of_many[20..], [272, 361, 308, 75, 158, 50]);

        let mut many = PythonRandom::new(42);
        let last = (0..2000).map(|_| many.next_f64()).last();
        assert_eq!(last, Some(0.30176443514420326));
    }

    #[test]
    fn a_sample_has_each_place_once() {
        for (n, k) in [
            (5, 5),
            (21, 3),
            (22, 3),
            (1000, 40),
            (10_000, 6),
            (1, 1),
            (7, 0),
        ] {
            let mut drawn = PythonRandom::new(n as u64).sample(n, k).unwrap();
            drawn.sort_unstable();
            drawn.dedup();
            assert!(drawn.len() == k && drawn.iter().all(|place| *place < n));
        }
        assert_eq!(PythonRandom::new(1).sample(3, 4), None);
    }
}
