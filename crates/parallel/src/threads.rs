//! Ranks as threads of one process: for tests.

use std::collections::HashMap;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use crate::wire::{Arrival, LinkSpeed, Lost, Wire};

/// One rank.
#[derive(Debug)]
pub struct ThreadRank {
    rank: usize,
    ranks: usize,
    timeout: Duration,
    link: LinkSpeed,
    /// Exchanges so far.
    number: AtomicU64,
    mailbox: Arc<Mailbox>,
}

#[derive(Debug, Default)]
struct Mailbox {
    state: Mutex<MailboxState>,
    changed: Condvar,
}

/// A message on its way.
#[derive(Debug)]
struct SentMessage {
    /// Of the exchange.
    name: String,
    message: Vec<u8>,
    arrives: Instant,
}

#[derive(Debug, Default)]
struct MailboxState {
    /// By the number of the exchange, sender and receiver.
    messages: HashMap<(u64, usize, usize), SentMessage>,
    ended: Vec<usize>,
}

impl Mailbox {
    fn state(&self) -> MutexGuard<'_, MailboxState> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// Ranks that wait for each other at most so long.
pub fn ranks(ranks: usize, timeout: Duration) -> Vec<ThreadRank> {
    let at_once = LinkSpeed {
        latency: Duration::ZERO,
        bytes_per_second: f64::INFINITY,
    };
    ranks_over(ranks, timeout, at_once)
}

/// [`ranks`] over links of a made-up speed.
pub fn ranks_over(ranks: usize, timeout: Duration, link: LinkSpeed) -> Vec<ThreadRank> {
    let mailbox = Arc::new(Mailbox::default());
    let rank = |rank| ThreadRank {
        rank,
        ranks,
        timeout,
        link,
        number: AtomicU64::new(0),
        mailbox: Arc::clone(&mailbox),
    };
    (0..ranks).map(rank).collect()
}

impl Wire for ThreadRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn post(&self, name: &str, messages: Vec<Vec<u8>>) -> Arrival {
        let number = self.number.fetch_add(1, Ordering::Relaxed);
        let mut state = self.mailbox.state();
        for (to, message) in messages.into_iter().enumerate() {
            let seconds = message.len() as f64 / self.link.bytes_per_second;
            let travels = match to == self.rank {
                true => Duration::ZERO,
                false => self.link.latency + Duration::from_secs_f64(seconds),
            };
            let sent = SentMessage {
                name: name.to_owned(),
                message,
                arrives: Instant::now() + travels,
            };
            state.messages.insert((number, self.rank, to), sent);
        }
        drop(state);
        self.mailbox.changed.notify_all();
        let waiting = Waiting {
            rank: self.rank,
            ranks: self.ranks,
            timeout: self.timeout,
            number,
            name: name.to_owned(),
        };
        let mailbox = Arc::clone(&self.mailbox);
        Box::new(move || waiting.receive(&mailbox))
    }
}

/// A rank that waits at an exchange.
struct Waiting {
    rank: usize,
    ranks: usize,
    timeout: Duration,
    number: u64,
    name: String,
}

impl Waiting {
    fn receive(self, mailbox: &Mailbox) -> Result<Vec<Vec<u8>>, Lost> {
        let (mut state, started) = (mailbox.state(), Instant::now());
        loop {
            let is_missing = |from: &usize| {
                !state
                    .messages
                    .contains_key(&(self.number, *from, self.rank))
            };
            let missing: Vec<usize> = (0..self.ranks).filter(is_missing).collect();
            if missing.is_empty() {
                break;
            }
            let ended: Vec<usize> = missing
                .iter()
                .copied()
                .filter(|r| state.ended.contains(r))
                .collect();
            if !ended.is_empty() {
                return Err(Lost::Ended {
                    rank: self.rank,
                    exchange: self.name,
                    missing: ended,
                });
            }
            let Some(left) = self.timeout.checked_sub(started.elapsed()) else {
                return Err(Lost::Late {
                    rank: self.rank,
                    exchange: self.name,
                    missing,
                    seconds: self.timeout.as_secs(),
                });
            };
            let waited = mailbox.changed.wait_timeout(state, left);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        let all = (0..self.ranks).map(|from| {
            let sent = state.messages.remove(&(self.number, from, self.rank));
            sent.expect("none is missing")
        });
        let all: Vec<SentMessage> = all.collect();
        drop(state);
        let mut received = Vec::with_capacity(self.ranks);
        for (other, sent) in all.into_iter().enumerate() {
            if sent.name != self.name {
                return Err(Lost::Apart {
                    rank: self.rank,
                    exchange: self.name,
                    other,
                    theirs: sent.name,
                });
            }
            std::thread::sleep(sent.arrives.saturating_duration_since(Instant::now()));
            received.push(sent.message);
        }
        Ok(received)
    }
}

impl Drop for ThreadRank {
    fn drop(&mut self) {
        self.mailbox.state().ended.push(self.rank);
        self.mailbox.changed.notify_all();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// What each of some ranks returns.
    fn run<T: Send>(n: usize, timeout: Duration, each: impl Fn(ThreadRank) -> T + Sync) -> Vec<T> {
        std::thread::scope(|scope| {
            let started: Vec<_> = ranks(n, timeout)
                .into_iter()
                .map(|rank| scope.spawn(|| each(rank)))
                .collect();
            let ends = started.into_iter().map(|rank| rank.join().unwrap());
            ends.collect()
        })
    }

    const LONG: Duration = Duration::from_secs(60);

    #[test]
    fn every_message_comes_to_its_rank_in_its_exchange() {
        for n in 1..=4 {
            let found = run(n, LONG, |wire| {
                let mut found = Vec::new();
                for round in 0..20u8 {
                    let mine = |to: usize| vec![wire.rank() as u8, to as u8, round];
                    let name = format!("round {round}");
                    let messages = (0..n).map(mine).collect();
                    found.push(wire.post(&name, messages)().unwrap());
                }
                found
            });
            for (to, rounds) in found.iter().enumerate() {
                for (round, messages) in rounds.iter().enumerate() {
                    for (from, message) in messages.iter().enumerate() {
                        assert_eq!(message, &[from as u8, to as u8, round as u8]);
                    }
                }
            }
        }
    }

    #[test]
    fn ranks_that_end_are_late_or_elsewhere_are_named() {
        let ended = run(3, LONG, |wire| {
            (wire.rank() != 1).then(|| wire.post("sums", vec![vec![]; 3])())
        });
        assert!(ended[1].is_none());
        for rank in [0, 2] {
            let lost = Lost::Ended {
                rank,
                exchange: "sums".into(),
                missing: vec![1],
            };
            assert_eq!(ended[rank], Some(Err(lost)));
        }
        let late = run(2, Duration::ZERO, |wire| {
            if wire.rank() == 1 {
                // Longer than the other waits, which is not at all.
                std::thread::sleep(Duration::from_millis(200));
                return None;
            }
            Some(wire.post("sums", vec![vec![]; 2])())
        });
        let text = late[0].clone().unwrap().unwrap_err().to_string();
        assert_eq!(text, "rank 0 has waited 0 s at `sums` for ranks [1]");
        let apart = run(2, LONG, |wire| {
            let name = ["sums", "votes"][wire.rank()];
            wire.post(name, vec![vec![]; 2])().unwrap_err().to_string()
        });
        assert!(
            apart[0].contains("rank 0 is at `sums` and rank 1 at `votes`"),
            "{apart:?}"
        );
    }
}
