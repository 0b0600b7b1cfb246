//! What an engine does: it moves bytes between ranks.

use std::fmt::Debug;
use std::time::Duration;

/// The one exchange that may take any time: a rank waits there while another one reads rows for both.
pub const UNTIMED: &str = "rows that are read";

/// An engine, as one rank sees it.
pub trait Wire: Debug + Send + Sync {
    /// This rank, from 0.
    fn rank(&self) -> usize;

    /// Number of ranks.
    fn ranks(&self) -> usize;

    /// Sends a message to each rank, its own included, and returns without waiting. All ranks make the same exchanges in the
    /// same order; `name` says which one this is.
    fn post(&self, name: &str, messages: Vec<Vec<u8>>) -> Arrival;
}

/// Waits for what each rank has sent to this one in an exchange. Fails if a rank has left, does not come, or is at another
/// exchange.
pub type Arrival = Box<dyn FnOnce() -> Result<Vec<Vec<u8>>, Lost> + Send>;

/// What a link between ranks can do.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct LinkSpeed {
    /// Of an exchange without content.
    pub latency: Duration,
    /// Of the largest messages that were tried, in each direction.
    pub bytes_per_second: f64,
}

/// Ranks have lost each other.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Lost {
    /// Ranks that have ended.
    #[error("rank {rank} waits at `{exchange}`, and ranks {missing:?} have ended")]
    Ended {
        /// The one that noticed.
        rank: usize,
        /// Where it waits.
        exchange: String,
        /// Those that have ended.
        missing: Vec<usize>,
    },
    /// Ranks that do not come.
    #[error("rank {rank} has waited {seconds} s at `{exchange}` for ranks {missing:?}")]
    Late {
        /// The one that waits.
        rank: usize,
        /// Where it waits.
        exchange: String,
        /// Those that it waits for.
        missing: Vec<usize>,
        /// How long.
        seconds: u64,
    },
    /// Ranks that do different things.
    #[error(
        "rank {rank} is at `{exchange}` and rank {other} at `{theirs}`: they do not run the same program"
    )]
    Apart {
        /// The one that noticed.
        rank: usize,
        /// Where it is.
        exchange: String,
        /// Another one.
        other: usize,
        /// Where that is.
        theirs: String,
    },
}
