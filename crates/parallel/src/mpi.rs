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
use ::mpi::request::{Request, Scope, scope};
use ::mpi::topology::{Communicator, SimpleCommunicator};
use ::mpi::traits::{Destination, Source};

use crate::message::{MessageReader, MessageWriter};
use crate::wire::{Arrival, Lost, UNTIMED, Wire};

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
pub struct TimeoutPolicy {
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
    pub fn join(policy: TimeoutPolicy) -> Result<Self, String> {
        let (started, begins) = channel();
        let (jobs, queue) = channel();
        let thread = std::thread::Builder::new()
            .name("mpi".into())
            .spawn(move || serve(&started, &queue, policy))
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

    fn post(&self, name: &str, messages: Vec<Vec<u8>>) -> Arrival {
        let (done, made) = channel();
        let job = ExchangeJob {
            name: name.to_owned(),
            messages,
            done,
        };
        let sent = self.jobs.as_ref().map(|jobs| jobs.send(job));
        let ended = Lost::Ended {
            rank: self.rank,
            exchange: name.to_owned(),
            missing: vec![self.rank],
        };
        match sent {
            Some(Ok(())) => Box::new(move || made.recv().unwrap_or(Err(ended))),
            _ => Box::new(move || Err(ended)),
        }
    }
}

/// What the thread does.
fn serve(
    started: &Sender<(usize, usize, String)>,
    queue: &Receiver<ExchangeJob>,
    policy: TimeoutPolicy,
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
        let made = exchange(&world, &job.name, job.messages, policy);
        // Who asked has gone: it does not want to know.
        let _ = job.done.send(made);
    }
}

/// One exchange: a frame to each other rank, and one from each.
fn exchange(
    world: &SimpleCommunicator,
    name: &str,
    mut messages: Vec<Vec<u8>>,
    policy: TimeoutPolicy,
) -> Result<Vec<Vec<u8>>, Lost> {
    let rank = world.rank() as usize;
    let mut own = std::mem::take(&mut messages[rank]);
    let frames = messages.into_iter().enumerate();
    let frames = frames.map(|(to, message)| match to == rank {
        true => Vec::new(),
        false => framed(name, &message),
    });
    let frames: Vec<Vec<u8>> = frames.collect();
    let mut wait = Wait::new(rank, name, policy);
    let mut arrived: Vec<Vec<u8>> = vec![Vec::new(); frames.len()];
    scope(|sends| {
        let mut pending = Vec::new();
        for (to, frame) in frames.iter().enumerate() {
            let process = world.process_at_rank(to as i32);
            let pieces = frame.chunks(MPI_PIECE);
            pending.extend(pieces.map(|piece| (to, process.immediate_send(sends, piece))));
        }
        loop {
            let missing = wait.missing(&arrived);
            if missing.is_empty() {
                break;
            }
            for from in &missing {
                if let Some(piece) = arrived_piece(world, *from, &wait) {
                    arrived[*from].extend(piece);
                    wait.restart();
                }
            }
            wait.pause(&missing);
        }
        for (to, request) in pending {
            finish(request, to, &wait);
        }
    });
    let mut opened = Vec::with_capacity(arrived.len());
    for (other, frame) in arrived.into_iter().enumerate() {
        if other == rank {
            opened.push(std::mem::take(&mut own));
            continue;
        }
        let message = unframed(frame, name).map_err(|theirs| Lost::Apart {
            rank,
            exchange: name.to_owned(),
            other,
            theirs,
        });
        opened.push(message?);
    }
    Ok(opened)
}

/// The number of the bytes that follow, the name after the number of its bytes, and the message.
fn framed(name: &str, message: &[u8]) -> Vec<u8> {
    let mut frame = MessageWriter::default();
    frame.count((8 + name.len() + message.len()) as u64);
    frame.bytes(name.as_bytes());
    let mut frame = frame.finish();
    frame.extend(message);
    frame
}

/// The message of a frame of this name, or the name that it has.
fn unframed(mut frame: Vec<u8>, name: &str) -> Result<Vec<u8>, String> {
    let mut reader = MessageReader::new(&frame);
    let theirs = reader.count().and_then(|_| reader.text());
    let theirs = theirs.map_err(|_| "something unknown".to_owned())?;
    if theirs != name {
        return Err(theirs);
    }
    frame.drain(..16 + name.len());
    Ok(frame)
}

/// The next piece of a rank's frame, if it is there.
fn arrived_piece(world: &SimpleCommunicator, from: usize, wait: &Wait<'_>) -> Option<Vec<u8>> {
    let process = world.process_at_rank(from as i32);
    let (message, status) = process.immediate_matched_probe()?;
    let mut piece = vec![0u8; status.count(u8::equivalent_datatype()) as usize];
    scope(|receives| {
        let request = message.immediate_matched_receive_into(receives, &mut piece[..]);
        finish(request, from, wait);
    });
    Some(piece)
}

/// Asks until a request is done, whose other end is a rank.
fn finish<'a, D: ?Sized, S: Scope<'a>>(
    mut request: Request<'a, D, S>,
    other: usize,
    wait: &Wait<'_>,
) {
    while let Err(unfinished) = request.test() {
        request = unfinished;
        wait.pause(&[other]);
    }
}

/// A wait: where, and since when.
struct Wait<'a> {
    rank: usize,
    name: &'a str,
    policy: TimeoutPolicy,
    /// When something last came.
    since: Instant,
}

impl<'a> Wait<'a> {
    fn new(rank: usize, name: &'a str, policy: TimeoutPolicy) -> Self {
        Self {
            rank,
            name,
            policy,
            since: Instant::now(),
        }
    }

    fn restart(&mut self) {
        self.since = Instant::now();
    }

    /// The ranks whose frames are not whole.
    fn missing(&self, arrived: &[Vec<u8>]) -> Vec<usize> {
        let is_whole = |frame: &[u8]| {
            let len = MessageReader::new(frame).count();
            len.is_ok_and(|len| frame.len() as u64 == len + 8)
        };
        let all = arrived.iter().enumerate();
        let missing = all.filter(|(from, frame)| *from != self.rank && !is_whole(frame));
        missing.map(|(from, _)| from).collect()
    }

    /// Sleeps, unless the wait has just begun; leaves the process if it has lasted too long.
    fn pause(&self, missing: &[usize]) {
        let waited = self.since.elapsed();
        let timeout = self.policy.timeout.filter(|_| self.name != UNTIMED);
        if timeout.is_some_and(|timeout| waited > timeout) {
            (self.policy.leave)(&Lost::Late {
                rank: self.rank,
                exchange: self.name.to_owned(),
                missing: missing.to_vec(),
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
