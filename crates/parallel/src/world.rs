//! What ranks say to each other.

use std::sync::Arc;

use crate::message::{MessageReader, MessageWriter, ShortMessage};
use crate::wire::{Lost, Wire};

/// All ranks, as one of them sees it.
#[derive(Clone, Debug, Default)]
pub struct World(Option<Arc<dyn Wire>>);

/// What goes wrong between ranks.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum RankError {
    /// They have lost each other.
    #[error(transparent)]
    Lost(#[from] Lost),
    /// A message has another form.
    #[error(transparent)]
    Message(#[from] ShortMessage),
    /// The first rank has failed; it says why itself.
    #[error("rank 0 has failed: {0}")]
    First(String),
}

impl World {
    /// One rank, which is alone.
    pub fn alone() -> Self {
        Self(None)
    }

    /// The ranks of an engine.
    pub fn new(wire: impl Wire + 'static) -> Self {
        Self(Some(Arc::new(wire)))
    }

    /// This rank, from 0.
    pub fn rank(&self) -> usize {
        self.0.as_ref().map_or(0, |wire| wire.rank())
    }

    /// Number of ranks.
    pub fn ranks(&self) -> usize {
        self.0.as_ref().map_or(1, |wire| wire.ranks())
    }

    /// Whether this rank prints and writes files.
    pub fn is_first(&self) -> bool {
        self.rank() == 0
    }

    /// Whether there are no others.
    pub fn is_alone(&self) -> bool {
        self.ranks() == 1
    }

    /// A message for each rank and from each.
    ///
    /// # Errors
    /// If ranks lose each other.
    ///
    /// # Panics
    /// If there is not a message for each rank.
    pub fn exchange(&self, name: &str, messages: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, RankError> {
        assert_eq!(messages.len(), self.ranks(), "a message for each rank");
        match &self.0 {
            None => Ok(messages),
            Some(wire) => Ok(wire.exchange(name, messages)?),
        }
    }

    /// What every rank says to all, in their order.
    ///
    /// # Errors
    /// If ranks lose each other.
    pub fn all(&self, name: &str, message: Vec<u8>) -> Result<Vec<Vec<u8>>, RankError> {
        self.exchange(name, vec![message; self.ranks()])
    }

    /// What every rank says to the first: nothing on the others.
    ///
    /// # Errors
    /// If ranks lose each other.
    pub fn to_first(&self, name: &str, message: Vec<u8>) -> Result<Vec<Vec<u8>>, RankError> {
        let mut messages = vec![Vec::new(); self.ranks()];
        messages[0] = message;
        self.exchange(name, messages)
    }

    /// The first rank does something, and all get what comes of it. Its error ends all; only the first rank has it whole.
    ///
    /// # Errors
    /// The first rank's, or if ranks lose each other.
    pub fn first_does<E: From<RankError> + ToString>(
        &self,
        name: &str,
        work: impl FnOnce() -> Result<Vec<u8>, E>,
    ) -> Result<Vec<u8>, E> {
        if self.is_alone() {
            return work();
        }
        let done = self.is_first().then(work);
        let mut message = MessageWriter::default();
        match &done {
            None => {}
            Some(Ok(result)) => _ = message.count(1).bytes(result),
            Some(Err(error)) => _ = message.count(0).bytes(error.to_string().as_bytes()),
        }
        let said = self.all(name, message.finish())?.swap_remove(0);
        if let Some(done) = done {
            return done;
        }
        let mut reader = MessageReader::new(&said);
        let is_done = reader.count().map_err(RankError::from)? == 1;
        let result = reader.bytes().map_err(RankError::from)?;
        match is_done {
            true => Ok(result.to_vec()),
            false => {
                let error = String::from_utf8_lossy(result).into_owned();
                Err(RankError::First(error).into())
            }
        }
    }
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use super::*;
    use crate::threads;

    #[test]
    fn what_the_first_does_is_known_to_all() {
        let worlds = threads::ranks(3, Duration::from_secs(60)).into_iter();
        let found: Vec<_> = std::thread::scope(|scope| {
            let ranks = worlds.map(|wire| {
                scope.spawn(move || {
                    let world = World::new(wire);
                    let done = world.first_does("file", || Ok::<_, RankError>(b"whole".to_vec()));
                    let failed = world.first_does("disk", || {
                        Err::<_, RankError>(RankError::First("full".into()))
                    });
                    let mine = vec![world.rank() as u8];
                    let heard = world.to_first("numbers", mine).unwrap();
                    (done.unwrap(), failed.unwrap_err().to_string(), heard)
                })
            });
            let ranks: Vec<_> = ranks.collect();
            ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
        });
        for (rank, (done, failed, heard)) in found.into_iter().enumerate() {
            assert_eq!(done, b"whole");
            assert!(failed.contains("full"), "{failed}");
            let expected: Vec<Vec<u8>> = match rank {
                0 => vec![vec![0], vec![1], vec![2]],
                _ => vec![vec![]; 3],
            };
            assert_eq!(heard, expected);
        }
        let alone = World::alone();
        assert_eq!((alone.rank(), alone.ranks()), (0, 1));
        assert_eq!(alone.all("x", vec![1]), Ok(vec![vec![1]]));
    }
}
