//! Intervals that the true number lies in, 95 times of 100, and how probable a difference is without one.
//!
//! Sources: T. Tango, Statistics in Medicine 17 (1998), equation 6 (the difference of paired shares); E. B. Wilson, Journal of the
//! American Statistical Association 22 (1927) (a share); Q. McNemar, Psychometrika 12 (1947), exact; B. Efron, The Annals of
//! Statistics 7 (1979) (drawn items); S. Holm, Scandinavian Journal of Statistics 6 (1979).

use data::PythonRandom;
use rayon::prelude::*;

/// The quantile of the normal distribution that 95 of 100 values lie within.
const NORMAL_95: f64 = 1.959_963_984_540_054;
/// Draws of items, and those of one seed.
const ITEM_DRAWS: u64 = 10_000;
const ITEM_DRAWS_OF_SEED: u64 = 500;

/// The ends of an interval, the lower one first.
pub type Interval = [f64; 2];

/// The interval of a share of right items.
pub(crate) fn of_share(right: usize, n: usize) -> Interval {
    let (n, share, z) = (n as f64, right as f64 / n as f64, NORMAL_95);
    let middle = (share + z * z / (2.0 * n)) / (1.0 + z * z / n);
    let spread = (share * (1.0 - share) / n + z * z / (4.0 * n * n)).sqrt() * z / (1.0 + z * z / n);
    [middle - spread, middle + spread]
}

/// The interval of the difference of two shares of the same `n` items, `gained` of which the second model alone has right, `lost` the
/// first alone.
pub(crate) fn of_shares(gained: usize, lost: usize, n: usize) -> Interval {
    let (gained, lost, n) = (gained as f64, lost as f64, n as f64);
    // How many standard errors the counts lie above those of a difference.
    let score = |difference: f64| {
        let a = 2.0 * n;
        let b = -gained - lost + (2.0 * n - gained + lost) * difference;
        let c = -lost * difference * (1.0 - difference);
        let share = ((b * b - 4.0 * a * c).max(0.0).sqrt() - b) / (2.0 * a);
        let variance = n * (2.0 * share + difference * (1.0 - difference));
        let above = gained - lost - n * difference;
        match variance > 0.0 {
            true => above / variance.sqrt(),
            false if above == 0.0 => 0.0,
            false => above.signum() * f64::INFINITY,
        }
    };
    let found = (gained - lost) / n;
    // The score falls with the difference.
    let end = |mut inside: f64, mut outside: f64, z: f64| {
        for _ in 0..64 {
            let middle = inside.midpoint(outside);
            match score(middle).abs() < z {
                true => inside = middle,
                false => outside = middle,
            }
        }
        inside
    };
    [end(found, -1.0, NORMAL_95), end(found, 1.0, NORMAL_95)]
}

/// The probability that two equally good models split the items that only one of them has right as unevenly as this, or more so:
/// McNemar's exact test, two-sided.
pub(crate) fn mcnemar(gained: usize, lost: usize) -> f64 {
    let n = gained + lost;
    // ln of n over k, from one k to the next.
    let mut coefficient = -(n as f64) * std::f64::consts::LN_2;
    let mut tail = 0.0;
    for k in 0..=gained.min(lost) {
        if k > 0 {
            coefficient += ((n - k + 1) as f64 / k as f64).ln();
        }
        tail += coefficient.exp();
    }
    (2.0 * tail).min(1.0)
}

/// Draws beyond zero that say how probable that is. With fewer, Student's distribution does: among hundreds of comparisons, which
/// Holm's correction reckons with, the largest differences would else be no less probable than one in the number of draws.
const FEWEST_BEYOND: usize = 10;

/// Items that say something: of fewer, all may point one way by chance more often than one time in twenty.
const FEWEST_ITEMS: usize = 6;

/// A number of drawn items: its interval, and how probable one as far from 0 is if it is 0. `number` gets the places of the items.
/// Draws of few items vary too little, so they are spread as far as Student's distribution is wider than the normal one.
pub(crate) fn of_draws(n: usize, number: impl Fn(&[usize]) -> f64 + Sync) -> (Interval, f64) {
    if n < FEWEST_ITEMS {
        return ([f64::NEG_INFINITY, f64::INFINITY], 1.0);
    }
    let all: Vec<usize> = (0..n).collect();
    // Draws vary by the deviation with n, not n - 1.
    let unbiased = (n as f64 / (n as f64 - 1.0)).sqrt();
    let (found, spread) = (number(&all), student(n - 1) / NORMAL_95 * unbiased);
    let of_seed = |seed: u64| {
        let mut random = PythonRandom::new(seed);
        let draw = |_| {
            let places: Vec<usize> = random.choices(n, n).collect();
            found + spread * (number(&places) - found)
        };
        (0..ITEM_DRAWS_OF_SEED).map(draw).collect::<Vec<f64>>()
    };
    let seeds = (0..ITEM_DRAWS / ITEM_DRAWS_OF_SEED).into_par_iter();
    let mut drawn: Vec<f64> = seeds.map(of_seed).collect::<Vec<_>>().concat();
    drawn.sort_by(f64::total_cmp);
    let quantile = |share: f64| drawn[((drawn.len() - 1) as f64 * share).round() as usize];
    let count = |side: &dyn Fn(&f64) -> bool| drawn.iter().filter(|it| side(it)).count();
    let beyond = count(&|number| *number <= 0.0).min(count(&|number| *number >= 0.0));
    let share = |n: usize| (n + 1) as f64 / (drawn.len() + 1) as f64;
    let one_sided = match beyond < FEWEST_BEYOND {
        true => {
            let error = deviation(&drawn) / spread * unbiased;
            student_tail(found.abs() / error, n - 1).min(share(beyond))
        }
        false => share(beyond),
    };
    let p = (2.0 * one_sided).max(0.5f64.powi(n.min(64) as i32 - 1));
    ([quantile(0.025), quantile(0.975)], p.min(1.0))
}

/// The quantile of Student's distribution that 95 of 100 values lie within, to half a percent from five degrees of freedom on.
///
/// Source: Abramowitz and Stegun, Handbook of Mathematical Functions, 26.7.5.
fn student(freedom: usize) -> f64 {
    let (z, n) = (NORMAL_95, freedom as f64);
    let terms = [
        z,
        (z.powi(3) + z) / 4.0,
        (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / 96.0,
        (3.0 * z.powi(7) + 19.0 * z.powi(5) + 17.0 * z.powi(3) - 15.0 * z) / 384.0,
    ];
    terms.iter().rev().fold(0.0, |sum, term| sum / n + term)
}

/// The standard deviation of numbers.
fn deviation(numbers: &[f64]) -> f64 {
    let mean = numbers.iter().sum::<f64>() / numbers.len() as f64;
    let squares: f64 = numbers.iter().map(|number| (number - mean).powi(2)).sum();
    (squares / numbers.len() as f64).sqrt()
}

/// The probability that a number of Student's distribution is at least `t`, for `t` above 3: to a few percent.
///
/// Sources: D. L. Wallace, The Annals of Mathematical Statistics 30 (1959) (as a number of the normal distribution); Abramowitz and
/// Stegun, 26.2.12 (its tail).
fn student_tail(t: f64, freedom: usize) -> f64 {
    let n = freedom as f64;
    let z = (8.0 * n + 1.0) / (8.0 * n + 3.0) * (n * (t * t / n).ln_1p()).sqrt();
    let density = (-z * z / 2.0).exp() / std::f64::consts::TAU.sqrt();
    density / z * (1.0 - 1.0 / z.powi(2) + 3.0 / z.powi(4) - 15.0 / z.powi(6)).max(0.5)
}

/// Probabilities of several tests, each so much larger that the chance that any is small by accident stays that of one.
pub(crate) fn holm(probabilities: &[f64]) -> Vec<f64> {
    let mut order: Vec<usize> = (0..probabilities.len()).collect();
    order.sort_by(|a, b| probabilities[*a].total_cmp(&probabilities[*b]));
    let mut adjusted = vec![1.0; probabilities.len()];
    let mut largest: f64 = 0.0;
    for (rank, at) in order.into_iter().enumerate() {
        let tests = (probabilities.len() - rank) as f64;
        largest = largest.max((probabilities[at] * tests).min(1.0));
        adjusted[at] = largest;
    }
    adjusted
}

#[cfg(test)]
mod tests {
    use super::*;

    fn close(found: f64, expected: f64, tolerance: f64) {
        assert!(
            (found - expected).abs() < tolerance,
            "{found}, not {expected}"
        );
    }

    #[test]
    fn intervals_are_those_of_their_papers() {
        let [low, high] = of_share(15, 148);
        close(low, 0.062_4, 1e-4);
        close(high, 0.160_5, 1e-4);
        // At an end the score is the quantile: for no discordant pair that is z² / (n + z²).
        let [low, high] = of_shares(0, 0, 100);
        let end = NORMAL_95.powi(2) / (100.0 + NORMAL_95.powi(2));
        close(low, -end, 1e-9);
        close(high, end, 1e-9);
        let ([low, high], [back, forth]) = (of_shares(12, 5, 80), of_shares(5, 12, 80));
        close(low, -forth, 1e-9);
        close(high, -back, 1e-9);
        assert!(low < 7.0 / 80.0 && high > 7.0 / 80.0);
    }

    #[test]
    fn few_items_have_the_intervals_of_student() {
        for (freedom, expected) in [(5, 2.571), (10, 2.228), (30, 2.042), (1000, 1.962)] {
            close(student(freedom), expected, 4e-3);
        }
        // A mean of numbers like those of a normal distribution: t · s / √n.
        let numbers = [-1.5, -0.9, -0.5, -0.2, 0.2, 0.5, 0.9, 1.5];
        let mean = |places: &[usize]| places.iter().map(|place| numbers[*place]).sum::<f64>() / 8.0;
        let ([low, high], p) = of_draws(8, mean);
        let deviation = (numbers.iter().map(|number| number * number).sum::<f64>() / 7.0).sqrt();
        let expected = 2.365 * deviation / 8f64.sqrt();
        close(low, -expected, 0.04);
        close(high, expected, 0.04);
        assert!(p > 0.9, "{p}");
        assert_eq!(
            of_draws(5, |_| 1.0),
            ([f64::NEG_INFINITY, f64::INFINITY], 1.0)
        );
        assert_eq!(of_draws(6, |_| 1.0), ([1.0, 1.0], 0.031_25));
    }

    // SciPy's binomtest.
    #[test]
    fn mcnemar_is_exact() {
        for (gained, lost, expected) in [
            (0, 0, 1.0),
            (5, 5, 1.0),
            (6, 0, 0.031_25),
            (10, 2, 0.038_574_218_75),
            (40, 60, 0.056_887_933_640_980_89),
        ] {
            close(mcnemar(gained, lost), expected, 1e-12);
            close(mcnemar(lost, gained), expected, 1e-12);
        }
    }

    #[test]
    fn holm_keeps_the_order_and_never_lowers() {
        let adjusted = holm(&[0.01, 0.04, 0.03, 0.5]);
        for (found, expected) in adjusted.into_iter().zip([0.04, 0.09, 0.09, 0.5]) {
            close(found, expected, 1e-12);
        }
    }

    /// Of pairs of models that are equally good, the share whose interval misses 0, and the share whose lower end is above it.
    fn calibrated(pairs: usize, interval: impl Fn(&mut dyn FnMut() -> f64) -> Interval) {
        let mut random = PythonRandom::new(7);
        let mut next = || random.next_f64();
        let (mut missed, mut passed) = (0, 0);
        for _ in 0..pairs {
            let [low, high] = interval(&mut next);
            missed += usize::from(low > 0.0 || high < 0.0);
            passed += usize::from(low > 0.0);
        }
        let share = |n: usize| n as f64 / pairs as f64;
        let is_right = (0.03..=0.07).contains(&share(missed)) && share(passed) <= 0.04;
        assert!(is_right, "{missed} and {passed} of {pairs}");
    }

    #[test]
    fn intervals_of_equal_models_miss_zero_one_time_in_twenty() {
        for n in [60, 400] {
            calibrated(1000, |next| {
                let (mut gained, mut lost) = (0, 0);
                for _ in 0..n {
                    // Hard and easy items, which both models find so.
                    let share = 0.2 + 0.6 * next();
                    let [first, second] = [next() < share, next() < share];
                    gained += usize::from(second && !first);
                    lost += usize::from(first && !second);
                }
                of_shares(gained, lost, n)
            });
        }
        for n in [8, 60] {
            calibrated(400, |next| {
                let differences: Vec<f64> =
                    (0..n).map(|_| next() + next() - next() - next()).collect();
                let sum = |places: &[usize]| -> f64 {
                    places.iter().map(|place| differences[*place]).sum()
                };
                of_draws(n, sum).0
            });
        }
    }

    // Of the exact distributions: scipy.stats.t.sf.
    #[test]
    fn tails_are_those_of_student() {
        for (t, freedom, expected) in [
            (5.0, 99, 1.241e-6),
            (4.0, 20, 3.518e-4),
            (8.0, 1000, 1.713e-15),
            (6.0, 9, 1.012e-4),
        ] {
            let found = student_tail(t, freedom);
            assert!(
                (found / expected - 1.0).abs() < 0.05,
                "{t} {freedom}: {found}"
            );
        }
    }

    #[test]
    fn large_differences_are_improbable_beyond_the_number_of_draws() {
        let mut random = PythonRandom::new(7);
        let numbers: Vec<f64> = (0..400).map(|_| random.next_f64() + 0.3).collect();
        let mean = |places: &[usize]| {
            places.iter().map(|place| numbers[*place]).sum::<f64>() / places.len() as f64
        };
        let ([low, _], p) = of_draws(numbers.len(), mean);
        assert!(low > 0.7 && p > 0.0 && p < 1e-12, "{low} {p}");
        assert!(holm(&[vec![p; 300], vec![0.9; 300]].concat())[0] < 1e-9);
    }
}
