//! Parallel loops: rayon's threads for milliseconds of work, spinning threads for microseconds.

mod parallel_for;
mod pieces;
mod prefetch;
mod spin_pool;

pub(crate) use self::parallel_for::parallel_for;
pub(crate) use self::pieces::{Pieces, tiles};
pub(crate) use self::prefetch::prefetch_line;
pub(crate) use self::spin_pool::{prefetch_after, spin_for};

/// Threads that operations use.
pub fn n_threads() -> usize {
    rayon::current_num_threads()
}
