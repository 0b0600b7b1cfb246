//! What ranks say to each other.

use std::fmt;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::{Duration, Instant};

use crate::message::{MessageReader, MessageWriter, ShortMessage};
use crate::wire::{Arrival, LinkSpeed, Lost, Wire};

/// Exchanges of a byte or a few before messages grow.
const PROBE_ROUNDS: usize = 8;
/// Bytes of the first and the last message that measure a link's speed.
const SMALLEST_PROBE: usize = 64 << 10;
const LARGEST_PROBE: usize = 64 << 20;

/// All ranks, as one of them sees it.
#[derive(Clone, Debug, Default)]
pub struct World(Option<Arc<Joined>>);

/// An engine, and what went through it.
#[derive(Debug)]
struct Joined {
    wire: Box<dyn Wire>,
    /// Bytes of messages to other ranks.
    sent: AtomicU64,
}

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
        Self(Some(Arc::new(Joined {
            wire: Box::new(wire),
            sent: AtomicU64::new(0),
        })))
    }

    /// This rank, from 0.
    pub fn rank(&self) -> usize {
        self.0.as_ref().map_or(0, |joined| joined.wire.rank())
    }

    /// Number of ranks.
    pub fn ranks(&self) -> usize {
        self.0.as_ref().map_or(1, |joined| joined.wire.ranks())
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
        self.post(name, messages).wait()
    }

    /// [`Self::exchange`] without waiting for the others' messages.
    ///
    /// # Panics
    /// As [`Self::exchange`].
    pub fn post(&self, name: &str, messages: Vec<Vec<u8>>) -> Posted {
        assert_eq!(messages.len(), self.ranks(), "a message for each rank");
        let Some(joined) = &self.0 else {
            return Posted(Box::new(|| Ok(messages)));
        };
        let all: usize = messages.iter().map(Vec::len).sum();
        let sent = all - messages[self.rank()].len();
        joined.sent.fetch_add(sent as u64, Ordering::Relaxed);
        Posted(joined.wire.post(name, messages))
    }

    /// Bytes of the messages that this rank has sent to others.
    pub fn bytes_sent(&self) -> u64 {
        let joined = self.0.as_ref();
        joined.map_or(0, |joined| joined.sent.load(Ordering::Relaxed))
    }

    /// Tries the links from each rank to the next, with ever larger messages, for about a time; the slowest of them, as all
    /// ranks find it.
    ///
    /// # Errors
    /// If ranks lose each other.
    pub fn probe(&self, time: Duration) -> Result<LinkSpeed, RankError> {
        let (first, next) = (Instant::now(), (self.rank() + 1) % self.ranks());
        let mut found = LinkSpeed {
            latency: Duration::MAX,
            bytes_per_second: 0.0,
        };
        let mut size = 0;
        loop {
            // The first rank says whether there is another round.
            let is_last = size >= LARGEST_PROBE || first.elapsed() > time;
            let mut messages = vec![vec![u8::from(is_last)]; self.ranks()];
            messages[next].resize(size + 1, 0);
            let started = Instant::now();
            let said = self.exchange("probe", messages)?;
            let seconds = started.elapsed();
            if size < SMALLEST_PROBE {
                found.latency = found.latency.min(seconds);
            } else {
                found.bytes_per_second = size as f64 / seconds.as_secs_f64().max(1e-9);
            }
            if said[0].first() == Some(&1) && size >= SMALLEST_PROBE {
                break;
            }
            // A few rounds without content first: the first ones open connections.
            size = match size {
                0..PROBE_ROUNDS => size + 1,
                PROBE_ROUNDS..SMALLEST_PROBE => SMALLEST_PROBE,
                _ => (2 * size).min(LARGEST_PROBE),
            };
        }
        let mut message = MessageWriter::default();
        message
            .number(found.latency.as_secs_f64())
            .number(found.bytes_per_second);
        for said in self.all("probed links", message.finish())? {
            let mut reader = MessageReader::new(&said);
            let latency = Duration::from_secs_f64(reader.number()?.clamp(0.0, 1e6));
            found.latency = found.latency.max(latency);
            found.bytes_per_second = found.bytes_per_second.min(reader.number()?);
        }
        Ok(found)
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
        self.first_asks(name, |_| work(), |_| Vec::new())
    }

    /// [`Self::first_does`], with questions: each is a number, and gets the answers of all ranks, in their order.
    ///
    /// # Errors
    /// As [`Self::first_does`].
    pub fn first_asks<E: From<RankError> + ToString>(
        &self,
        name: &str,
        work: impl FnOnce(&mut Ask<'_>) -> Result<Vec<u8>, E>,
        answer: impl Fn(u64) -> Vec<u8>,
    ) -> Result<Vec<u8>, E> {
        if self.is_alone() {
            return work(&mut |question| Ok(vec![answer(question)]));
        }
        if !self.is_first() {
            return self.answer(name, answer).map_err(E::from)?.map_err(E::from);
        }
        let say = |kind: u64, text: &[u8]| {
            let mut message = MessageWriter::default();
            message.count(kind).bytes(text);
            self.all(name, message.finish())
        };
        let mut is_lost = false;
        let done = work(&mut |question| {
            let answers = say(ASKS, &question.to_le_bytes());
            let answers = answers.and_then(|_| self.to_first(name, answer(question)));
            is_lost |= answers.is_err();
            answers
        });
        if !is_lost {
            match &done {
                Ok(result) => say(ENDS, result)?,
                Err(error) => say(FAILS, error.to_string().as_bytes())?,
            };
        }
        done
    }

    /// Answers the first rank's questions until it is done: what it says then, or why it failed.
    fn answer(
        &self,
        name: &str,
        answer: impl Fn(u64) -> Vec<u8>,
    ) -> Result<Result<Vec<u8>, RankError>, RankError> {
        loop {
            let said = self.all(name, Vec::new())?.swap_remove(0);
            let mut reader = MessageReader::new(&said);
            let (kind, text) = (reader.count()?, reader.bytes()?);
            match kind {
                ASKS => {
                    let question = text.first_chunk::<8>().ok_or(ShortMessage)?;
                    self.to_first(name, answer(u64::from_le_bytes(*question)))?;
                }
                ENDS => return Ok(Ok(text.to_vec())),
                _ => {
                    let error = String::from_utf8_lossy(text).into_owned();
                    return Ok(Err(RankError::First(error)));
                }
            }
        }
    }
}

/// An exchange under way.
pub struct Posted(Arrival);

impl fmt::Debug for Posted {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("Posted")
    }
}

impl Posted {
    /// What each rank has sent.
    ///
    /// # Errors
    /// If ranks lose each other.
    pub fn wait(self) -> Result<Vec<Vec<u8>>, RankError> {
        Ok((self.0)()?)
    }
}

/// Asks all ranks a question, by its number.
pub type Ask<'a> = dyn FnMut(u64) -> Result<Vec<Vec<u8>>, RankError> + 'a;

/// What the first rank says while it does something.
const ASKS: u64 = 0;
const ENDS: u64 = 1;
const FAILS: u64 = 2;

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
                    let asked = world.first_asks(
                        "sums",
                        |ask| {
                            let answers = [ask(10)?, ask(20)?].concat();
                            Ok::<_, RankError>(answers.concat())
                        },
                        |question| vec![question as u8 + world.rank() as u8],
                    );
                    assert_eq!(asked.unwrap(), [10, 11, 12, 20, 21, 22]);
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
        let worlds = threads::ranks(2, Duration::from_secs(60)).into_iter();
        std::thread::scope(|scope| {
            for wire in worlds {
                scope.spawn(move || {
                    let world = World::new(wire);
                    let speed = world.probe(Duration::from_millis(10)).unwrap();
                    assert!(speed.bytes_per_second > 1e6, "{speed:?}");
                    assert!(speed.latency < Duration::from_secs(10), "{speed:?}");
                    assert!(world.bytes_sent() > SMALLEST_PROBE as u64);
                });
            }
        });
        let alone = World::alone();
        assert_eq!((alone.rank(), alone.ranks()), (0, 1));
        assert_eq!(alone.all("x", vec![1]), Ok(vec![vec![1]]));
    }
}
