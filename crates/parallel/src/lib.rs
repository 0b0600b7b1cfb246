//! Ranks: processes, maybe on several machines, that make one run together.
//!
//! An engine ([`Wire`]) moves bytes and nothing else; numbers are added here or above, in an order that does not depend on
//! who computed them. So a run can have the same bits on any number of ranks.
//!
//! The modules are rooms, and each names only those before it: `message` (values as bytes), `wire` (what an engine does),
//! `threads` and `mpi` (the engines), `world` (what ranks say to each other).
//!
//! What this crate does not do: it knows no tensors and no model.

mod message;
mod wire;

#[cfg(feature = "mpi")]
pub mod mpi;
pub mod threads;

mod world;

pub use message::{MessageReader, MessageWriter, ShortMessage};
pub use wire::{Arrival, LinkSpeed, Lost, UNTIMED, Wire};
pub use world::{Ask, Posted, RankError, World};
