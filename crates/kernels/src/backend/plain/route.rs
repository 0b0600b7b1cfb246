//! Choosing experts, and sorting their slots; see [`crate::backend::experts`]. Both by comparing every pair, which needs
//! no sort and has one result.

use burn::backend::tensor::{Device, FloatTensor, IntTensor};

use crate::backend::plain::ints::Ints;
use crate::backend::plain::reals::Reals;
use crate::backend::plain::sums::parts;
use crate::backend::traits::Kernels;
use crate::ops::route::{GroupScore, TopK};

/// Pairs that are compared at once.
const PAIRS: usize = 1 << 24;
/// Slots of a block, within which they are counted by a triangular matrix.
const SORTED_BLOCK: usize = 512;
/// Whole numbers up to here are exact in f32.
const EXACT: usize = 1 << 24;

/// Scores `[tokens, experts]` → ids `[tokens, top_k]`, best first; of equal scores the lower expert's is better, and
/// NaN is the lowest.
pub(crate) fn choose_experts<B: Kernels>(scores: FloatTensor<B>, choice: TopK) -> IntTensor<B> {
    let scores = Reals::<B>::new(scores);
    let ([tokens, experts], device) = (scores.dims(), scores.device());
    if tokens * choice.top_k == 0 {
        return Ints::<B>::upload(vec![], &[tokens, choice.top_k], &device).into_tensor();
    }
    let some = (PAIRS / (experts * experts)).max(1);
    let chosen = parts(tokens, some).map(|rows| chosen(scores.clone().narrow(0, rows), choice));
    Reals::cat(chosen.collect(), 0).into_ints().into_tensor()
}

/// The ids as floats.
fn chosen<B: Kernels>(scores: Reals<B>, choice: TopK) -> Reals<B> {
    let ([tokens, experts], top_k) = (scores.dims(), choice.top_k);
    let ranks = ranks(scores.clone(), open_experts(scores, choice));
    let ranks = ranks.reshape(&[tokens, 1, experts]).into_ints();
    let places = Ints::count(top_k, &ranks.device()).reshape(&[1, top_k, 1]);
    let ids = Ints::count(experts, &ranks.device()).reshape(&[1, 1, experts]);
    let is_at = ranks.equal(places).into_values();
    (is_at * ids.into_values()).sum(2).reshape(&[tokens, top_k])
}

/// 1 for the experts of the `topk_group` best groups, 0 for the others: `[tokens, experts]`.
fn open_experts<B: Kernels>(scores: Reals<B>, choice: TopK) -> Reals<B> {
    let ([tokens, experts], device) = (scores.dims(), scores.device());
    if choice.n_group <= 1 {
        return Reals::ones(&[tokens, experts], &device);
    }
    let (groups, size) = (choice.n_group, experts / choice.n_group);
    let worth = group_worth(scores.reshape(&[tokens, groups, size]), choice.group_score);
    let all = Reals::ones(&[tokens, groups], &device);
    let is_best = ranks(worth, all)
        .lower(choice.topk_group as f32)
        .into_values();
    let of_experts = is_best
        .reshape(&[tokens, groups, 1])
        .expand(&[tokens, groups, size]);
    of_experts.reshape(&[tokens, experts])
}

/// `[tokens, groups, size]` → `[tokens, groups]`. NaN counts for nothing.
fn group_worth<B: Kernels>(scores: Reals<B>, score: GroupScore) -> Reals<B> {
    let [tokens, groups, size] = scores.dims();
    let is_nan = scores.clone().nan();
    let scores = scores.filled(is_nan, f32::NEG_INFINITY);
    let first = scores.clone().max(2);
    let worth = match score {
        GroupScore::TopTwoSum if size > 1 => first.clone() + second(scores, first),
        _ => first,
    };
    worth.reshape(&[tokens, groups])
}

/// The second best of each group, which equals the best if two have it: `[tokens, groups, 1]`.
fn second<B: Kernels>(scores: Reals<B>, first: Reals<B>) -> Reals<B> {
    let is_first = scores.clone().equal(first.clone().expand(&scores.shape()));
    let several = is_first.clone().into_values().sum(2).lower(2.0).not();
    let others = scores.filled(is_first, f32::NEG_INFINITY).max(2);
    others.replaced(&several, first)
}

/// How many are better than each: `[tokens, n]`. Closed ones, whose `open` is 0, come last.
fn ranks<B: Kernels>(scores: Reals<B>, open: Reals<B>) -> Reals<B> {
    let ([tokens, n], device) = (scores.dims(), scores.device());
    let is_nan = scores.clone().nan();
    // Whether a score is open comes first, whether it is a number next.
    let class = open * 2.0 - is_nan.clone().into_values();
    let scores = scores.filled(is_nan, 0.0);
    let pairs = [tokens, n, n];
    let [own, other] = [[tokens, n, 1], [tokens, 1, n]]
        .map(|shape| [&class, &scores].map(|values| values.clone().reshape(&shape).expand(&pairs)));
    let ([own_class, own], [class, other]) = (own, other);
    let places = Ints::count(n, &device);
    let is_before = places
        .clone()
        .reshape(&[1, 1, n])
        .lower(places.reshape(&[1, n, 1]));
    let wins_ties = own
        .clone()
        .equal(other.clone())
        .and(is_before.expand(&pairs));
    let is_better = other.greater(own).or(wins_ties);
    let same_class = own_class.clone().equal(class.clone()).and(is_better);
    let beats = class.greater(own_class).or(same_class);
    beats.into_values().sum(2).reshape(&[tokens, n])
}

/// Ids `[tokens, top_k]` → slots sorted by expert `[slots]`, stably, and where each expert's begin `[experts + 1]`.
pub(crate) fn dispatch_slots<B: Kernels>(
    ids: IntTensor<B>,
    experts: usize,
) -> (IntTensor<B>, IntTensor<B>) {
    let ids = Ints::<B>::new(ids);
    let (slots, device) = (ids.len(), ids.device());
    assert!(slots < EXACT, "{slots} slots are too many to count");
    if slots == 0 {
        let offsets = Ints::<B>::upload(vec![0; experts + 1], &[experts + 1], &device);
        return (ids.reshape(&[0]).into_tensor(), offsets.into_tensor());
    }
    let all = Ints::count(experts, &device).reshape(&[1, experts]);
    let is_of = ids.reshape(&[slots, 1]).equal(all).into_values();
    let (earlier, counts) = earlier(is_of.clone());
    // An expert's places begin behind those of all before it.
    let offsets = (below([experts + 1, experts], &device) * counts.reshape(&[1, experts])).sum(1);
    let starts = offsets.clone().narrow(0, 0..experts).reshape(&[1, experts]);
    let places = (is_of * (earlier + starts)).sum(1).reshape(&[slots]);
    let offsets = offsets.reshape(&[experts + 1]).into_ints();
    (
        places.into_ints().inverse().into_tensor(),
        offsets.into_tensor(),
    )
}

/// For each slot how many before it are of each expert, and how many there are: `[slots, experts]` → `[slots,
/// experts]`, `[1, experts]`. No factor of a product exceeds [`SORTED_BLOCK`], so they are exact on units of few bits too.
fn earlier<B: Kernels>(is_of: Reals<B>) -> (Reals<B>, Reals<B>) {
    let ([slots, experts], device) = (is_of.dims(), is_of.device());
    let blocks = slots.div_ceil(SORTED_BLOCK);
    let padding = Reals::zeros(&[blocks * SORTED_BLOCK - slots, experts], &device);
    let padded = Reals::cat(vec![is_of, padding], 0).reshape(&[blocks, SORTED_BLOCK, experts]);
    let of_block = padded.clone().sum(1).reshape(&[blocks, experts]);
    let columns = padded
        .permute(&[1, 0, 2])
        .reshape(&[SORTED_BLOCK, blocks * experts]);
    let within = below([SORTED_BLOCK, SORTED_BLOCK], &device).matmul(columns);
    let within = within
        .reshape(&[SORTED_BLOCK, blocks, experts])
        .permute(&[1, 0, 2]);
    let before = below([blocks, blocks], &device).matmul(of_block.clone());
    let all = within + before.reshape(&[blocks, 1, experts]);
    let all = all
        .reshape(&[blocks * SORTED_BLOCK, experts])
        .narrow(0, 0..slots);
    (all, of_block.sum(0))
}

/// 1 where the column is below the row.
fn below<B: Kernels>([rows, cols]: [usize; 2], device: &Device<B>) -> Reals<B> {
    let rows = Ints::count(rows, device).reshape(&[rows, 1]);
    let cols = Ints::count(cols, device).reshape(&[1, cols]);
    cols.lower(rows).into_values()
}
