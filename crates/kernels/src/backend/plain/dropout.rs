//! The mask of [`Dropout`] on a device: 64-bit arithmetic in four parts of 16 bits, which fit 32-bit integers.

use burn::backend::Backend;
use burn::backend::tensor::Device;

use crate::backend::plain::ints::{Ints, Mask};
use crate::backend::plain::reals::Reals;
use crate::ops::dropout::Dropout;

/// Bits of a part.
const BITS: u32 = 16;
/// The largest part.
const LOW: i32 = 0xFFFF;
/// What an element's index is multiplied with.
const STEP: u64 = 0x9E37_79B9_7F4A_7C15;

/// Numbers of 64 bits, the lowest 16 bits first.
type Wide<B> = [Ints<B>; 4];

/// Drops elements of `[rows, width]`, the first of which has index 0.
pub(crate) fn drop_rows<B: Backend>(x: Reals<B>, dropout: Dropout) -> Reals<B> {
    if dropout.is_off() || x.is_empty() {
        return x;
    }
    let dropped = dropped(x.dims(), dropout, &x.device());
    (x * (1.0 / (1.0 - dropout.probability))).filled(dropped, 0.0)
}

/// Which elements of `[rows, width]` are dropped.
fn dropped<B: Backend>([rows, width]: [usize; 2], dropout: Dropout, device: &Device<B>) -> Mask<B> {
    // The keys of an element are the sum of its row's and its column's, modulo 2⁶⁴.
    let row = |row: usize| dropout.seed.wrapping_add(product(row * width));
    let row_keys = upload((0..rows).map(row).collect(), [rows, 1], device);
    let column_keys = upload((0..width).map(product).collect(), [1, width], device);
    let mixed = mixed(sum(row_keys, column_keys));
    let limit = (f64::from(dropout.probability) * 2f64.powi(32)) as u64;
    let [high, low] = [limit >> BITS, limit & 0xFFFF].map(|part| part as i32);
    let [_, _, third, fourth] = mixed;
    let below = third.lower_than(low).and(fourth.clone().equals(high));
    fourth.lower_than(high).or(below)
}

fn product(index: usize) -> u64 {
    (index as u64).wrapping_mul(STEP)
}

/// Host numbers in parts of the same shape.
fn upload<B: Backend>(values: Vec<u64>, shape: [usize; 2], device: &Device<B>) -> Wide<B> {
    [0, 1, 2, 3].map(|part| {
        let of_value = |value: &u64| (value >> (BITS * part)) as i32 & LOW;
        Ints::upload(values.iter().map(of_value).collect(), &shape, device)
    })
}

/// The finalizer of SplitMix64, as in `ops/dropout.rs`.
fn mixed<B: Backend>(z: Wide<B>) -> Wide<B> {
    let z = times(xor_shifted(z, 30), 0xBF58_476D_1CE4_E5B9);
    let z = times(xor_shifted(z, 27), 0x94D0_49BB_1331_11EB);
    xor_shifted(z, 31)
}

/// The sum modulo 2⁶⁴; shapes broadcast.
fn sum<B: Backend>(a: Wide<B>, b: Wide<B>) -> Wide<B> {
    let mut pairs = a.into_iter().zip(b);
    carried(std::array::from_fn(|_| {
        let (a, b) = pairs.next().expect("four parts");
        a.add(b)
    }))
}

/// Parts brought below 2¹⁶, what exceeds it added to the next.
fn carried<B: Backend>(parts: Wide<B>) -> Wide<B> {
    let mut carry: Option<Ints<B>> = None;
    parts.map(|part| {
        let whole = match carry.take() {
            Some(carry) => part.add(carry),
            None => part,
        };
        carry = Some(whole.clone().shifted(BITS as i32));
        whole.and(LOW)
    })
}

/// `z ^ (z >> bits)`, for bits from 17 to 31.
fn xor_shifted<B: Backend>(z: Wide<B>, bits: u32) -> Wide<B> {
    let within = bits - BITS;
    let shifted = |part: usize| {
        let low = z.get(part + 1)?.clone().shifted(within as i32);
        Some(match z.get(part + 2) {
            // The bits of the next part lie above those of this one.
            Some(next) => low.add(next.clone().times(1 << (BITS - within)).and(LOW)),
            None => low,
        })
    };
    std::array::from_fn(|part| {
        let own = z[part].clone();
        match shifted(part) {
            Some(shifted) => own.xor(shifted),
            None => own,
        }
    })
}

/// The product with a constant modulo 2⁶⁴. A part times a byte has 24 bits, so no sum reaches 31.
fn times<B: Backend>(z: Wide<B>, factor: u64) -> Wide<B> {
    let bytes = factor.to_le_bytes().map(i32::from);
    // The sum of all products that begin at part `at`, or 8 bits above it.
    let products = |at: usize, odd: usize| {
        let terms = (0..=at).map(|part| z[part].clone().times(bytes[2 * (at - part) + odd]));
        terms.reduce(Ints::add).expect("at least one product")
    };
    let mut above: Option<Ints<B>> = None;
    carried(std::array::from_fn(|at| {
        let odd = products(at, 1);
        let whole = products(at, 0).add(odd.clone().and(0xFF).times(1 << 8));
        let carry = above.replace(odd.shifted(8));
        match carry {
            Some(carry) => whole.add(carry),
            None => whole,
        }
    }))
}
