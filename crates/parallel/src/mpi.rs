//! MPI: ranks are processes, maybe on several machines, that `mpirun` starts.
//!
//! One thread owns MPI, because MPI allows it to one thread only, and because nothing moves unless MPI is called: it posts,
//! and asks again and again, with sleeps between, so that it leaves the processors to who computes. A rank that has lost the
//! others leaves the process: neither unwinding past MPI nor finalizing it ends well then.

use std::sync::mpsc::{Receiver, Sender, channel};
use std::thread::JoinHandle;
use std::time::{Duration, Instant};

use ::mpi::Threading;
use ::mpi::datatype::Equivalence;
use ::mpi::request::{Scope, scope};
use ::mpi::topology::{Communicator, SimpleCommunicator};
use ::mpi::traits::{Destination, Source};

use crate::message::{MessageReader, MessageWriter};
use crate::wire::{Lost, Wire};

/// Bytes of a single message of MPI, at most: it counts in 32 bits.
const MPI_PIECE: usize = 1 << 30;
/// How long a thread asks without a pause, and how long it sleeps then.
const SPIN: Duration = Duration::from_micros(50);

/// One rank.
#[derive(Debug)]
pub struct MpiRank {
    rank: usize,
    ranks: usize,
    host: String,
    jobs: Option<Sender<ExchangeJob>>,
    thread: Option<JoinHandle<()>>,
}

/// An exchange to make.
struct ExchangeJob {
    name: String,
    messages: Vec<Vec<u8>>,
    done: Sender<Result<Vec<Vec<u8>>, Lost>>,
}

/// How long a rank waits for others, if not forever, and how it leaves the process after that.
#[derive(Clone, Copy, Debug)]
pub struct Patience {
    /// How long it waits.
    pub timeout: Option<Duration>,
    /// Ends the process.
    pub leave: fn(&Lost) -> !,
}

impl MpiRank {
    /// Joins the other ranks.
    ///
    /// # Errors
    /// In a sentence, if there is no MPI.
    pub fn join(patience: Patience) -> Result<Self, String> {
        let (started, begins) = channel();
        let (jobs, queue) = channel();
        let thread = std::thread::Builder::new()
            .name("mpi".into())
            .spawn(move || serve(&started, &queue, patience))
            .map_err(|why| format!("cannot start a thread for MPI: {why}"))?;
        let (rank, ranks, host) = begins
            .recv()
            .map_err(|_| "MPI cannot be initialized, or lets no second thread compute")?;
        Ok(Self {
            rank,
            ranks,
            host,
            jobs: Some(jobs),
            thread: Some(thread),
        })
    }

    /// The machine that this rank is on.
    pub fn host(&self) -> &str {
        &self.host
    }
}

impl Drop for MpiRank {
    fn drop(&mut self) {
        self.jobs = None;
        // The thread finalizes MPI, which waits for all ranks.
        let _ = self.thread.take().map(JoinHandle::join);
    }
}

impl Wire for MpiRank {
    fn rank(&self) -> usize {
        self.rank
    }

    fn ranks(&self) -> usize {
        self.ranks
    }

    fn exchange(&self, name: &str, messages: Vec<Vec<u8>>) -> Result<Vec<Vec<u8>>, Lost> {
        assert_eq!(messages.len(), self.ranks, "a message for each rank");
        let (done, made) = channel();
        let job = ExchangeJob {
            name: name.to_owned(),
            messages,
            done,
        };
        let sent = self.jobs.as_ref().map(|jobs| jobs.send(job));
        let ended = || Lost::Ended {
            rank: self.rank,
            exchange: name.to_owned(),
            missing: vec![self.rank],
        };
        match sent {
            Some(Ok(())) => made.recv().unwrap_or_else(|_| Err(ended())),
            _ => Err(ended()),
        }
    }
}

/// What the thread does.
fn serve(
    started: &Sender<(usize, usize, String)>,
    queue: &Receiver<ExchangeJob>,
    patience: Patience,
) {
    let Some((universe, threading)) = ::mpi::initialize_with_threading(Threading::Funneled) else {
        return;
    };
    if threading == Threading::Single {
        return;
    }
    let world = universe.world();
    let host = ::mpi::environment::processor_name().unwrap_or_default();
    let about = (world.rank() as usize, world.size() as usize, host);
    if started.send(about).is_err() {
        return;
    }
    for job in queue {
        let made = exchange(&world, &job.name, job.messages, patience);
        // Who asked has gone: it does not want to know.
        let _ = job.done.send(made);
    }
}

/// One exchange: a letter to each other rank, and one from each.
fn exchange(
    world: &SimpleCommunicator,
    name: &str,
    messages: Vec<Vec<u8>>,
    patience: Patience,
) -> Result<Vec<Vec<u8>>, Lost> {
    let rank = world.rank() as usize;
    let others = |(to, message): (usize, &Vec<u8>)| {
        if to == rank {
            Vec::new()
        } else {
            letter(name, message)
        }
    };
    let letters: Vec<Vec<u8>> = messages.iter().enumerate().map(others).collect();
    let mut wait = Wait::new(world, name, patience);
    let mut arrived: Vec<Vec<u8>> = vec![Vec::new(); letters.len()];
    scope(|sends| {
        let mut pending = Vec::new();
        for (to, letter) in letters.iter().enumerate() {
            let process = world.process_at_rank(to as i32);
            let pieces = letter.chunks(MPI_PIECE);
            pending.extend(pieces.map(|piece| process.immediate_send(sends, piece)));
        }
        while !wait.missing(&arrived).is_empty() {
            for from in wait.missing(&arrived) {
                if let Some(piece) = arrived_piece(world, from, &wait) {
                    arrived[from].extend(piece);
                    wait.restart();
                }
            }
            wait.pause(&arrived);
        }
        for request in pending {
            finish(request, &wait);
        }
    });
    let received = arrived.iter().enumerate().zip(messages);
    let opened = received.map(|((other, letter), own)| match other == rank {
        true => Ok(own),
        false => opened(letter, name).map_err(|theirs| Lost::Apart {
            rank,
            exchange: name.to_owned(),
            other,
            theirs,
        }),
    });
    opened.collect()
}

/// Name and message, after the number of their bytes.
fn letter(name: &str, message: &[u8]) -> Vec<u8> {
    let mut letter = MessageWriter::default();
    letter.bytes(name.as_bytes()).bytes(message);
    let mut whole = MessageWriter::default();
    whole.bytes(&letter.finish());
    whole.finish()
}

/// The message of a letter of this name, or the name that it has.
fn opened(letter: &[u8], name: &str) -> Result<Vec<u8>, String> {
    let mut reader = MessageReader::new(letter);
    let unknown = |_| "something unknown".to_owned();
    let mut reader = MessageReader::new(reader.bytes().map_err(unknown)?);
    let theirs = reader.text().map_err(unknown)?;
    match theirs == name {
        true => Ok(reader.bytes().map_err(unknown)?.to_vec()),
        false => Err(theirs),
    }
}

/// The next piece of a rank's letter, if it is there.
fn arrived_piece(world: &SimpleCommunicator, from: usize, wait: &Wait<'_>) -> Option<Vec<u8>> {
    let process = world.process_at_rank(from as i32);
    let (message, status) = process.immediate_matched_probe()?;
    let mut piece = vec![0u8; status.count(u8::equivalent_datatype()) as usize];
    scope(|receives| {
        let request = message.immediate_matched_receive_into(receives, &mut piece[..]);
        finish(request, wait);
    });
    Some(piece)
}

/// Asks until a request is done.
fn finish<'a, D: ?Sized, S: Scope<'a>>(
    mut request: ::mpi::request::Request<'a, D, S>,
    wait: &Wait<'_>,
) {
    while let Err(unfinished) = request.test() {
        request = unfinished;
        wait.pause(&[]);
    }
}

/// A wait: when it began, and for whom.
struct Wait<'a> {
    rank: usize,
    name: &'a str,
    patience: Patience,
    /// When something last came.
    since: Instant,
}

impl<'a> Wait<'a> {
    fn new(world: &SimpleCommunicator, name: &'a str, patience: Patience) -> Self {
        Self {
            rank: world.rank() as usize,
            name,
            patience,
            since: Instant::now(),
        }
    }

    fn restart(&mut self) {
        self.since = Instant::now();
    }

    /// The ranks whose letters are not whole.
    fn missing(&self, arrived: &[Vec<u8>]) -> Vec<usize> {
        let is_whole = |letter: &[u8]| {
            MessageReader::new(letter)
                .count()
                .is_ok_and(|len| letter.len() as u64 == len + 8)
        };
        let all = arrived.iter().enumerate();
        let missing = all.filter(|(from, letter)| *from != self.rank && !is_whole(letter));
        missing.map(|(from, _)| from).collect()
    }

    /// Sleeps, unless it has just begun; leaves the process if it has lasted too long.
    fn pause(&self, arrived: &[Vec<u8>]) {
        let waited = self.since.elapsed();
        if self
            .patience
            .timeout
            .is_some_and(|timeout| waited > timeout)
        {
            (self.patience.leave)(&Lost::Late {
                rank: self.rank,
                exchange: self.name.to_owned(),
                missing: self.missing(arrived),
                seconds: waited.as_secs(),
            });
        }
        if waited < SPIN {
            std::hint::spin_loop();
        } else {
            std::thread::sleep(SPIN);
        }
    }
}
