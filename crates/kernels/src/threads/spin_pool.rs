//! Threads that spin, for microseconds of work: a decoding step has a hundred parallel loops, and waking a sleeping
//! thread for each would take longer than the loop.
//!
//! The threads of the pool spin for a moment when they have nothing to do, and only then sleep. The caller does not
//! wait for a sleeping thread: it starts at once, runs every task that no other thread has taken, and waits only for
//! the threads that joined. The result of a task must not depend on the thread that runs it.

#![expect(
    unsafe_code,
    reason = "members run a closure of the caller's, who waits until none of them does"
)]

use std::cell::UnsafeCell;
use std::hint::spin_loop;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::sync::atomic::{AtomicBool, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Mutex, OnceLock, TryLockError};
use std::thread::{self, Thread};

use super::prefetch::PrefetchWindow;

/// How often a thread looks for work before it sleeps: about a tenth of a millisecond.
const LOOKS: u32 = 4_000;
/// How often a waiting caller looks before it yields its core.
const WAITS: u32 = 10_000;

/// Set in [`PoolState::jobs`] once no thread may join any more.
const CLOSED: u64 = 1 << 31;
/// The lower bits count the threads at work, the upper half counts the jobs.
const MEMBERS: u64 = CLOSED - 1;
const NEXT_JOB: u64 = 1 << 32;

static POOL: OnceLock<SpinPool> = OnceLock::new();

/// Sets the address from which idle threads prefetch, because the next products will probably read from there.
pub(crate) fn prefetch_after(first: *const u8) {
    if let Some(pool) = POOL.get() {
        pool.state.window.start_at(first);
    }
}

/// Runs tasks on all threads. Each thread starts in a region of its own and takes the next task as soon as it is free.
/// For microseconds of work, for which [`super::parallel_for`] is too slow.
///
/// # Panics
/// If a task does.
pub(crate) fn spin_for(n_tasks: usize, task: impl Fn(usize) + Sync) {
    let alone = || (0..n_tasks).for_each(&task);
    if n_tasks < 2 {
        return alone();
    }
    let pool = POOL.get_or_init(|| SpinPool::new(rayon::current_num_threads() - 1));
    // If another thread uses the pool, this one runs its tasks alone rather than wait.
    let turn = match pool.turn.try_lock() {
        Ok(turn) => turn,
        Err(TryLockError::Poisoned(turn)) => turn.into_inner(),
        Err(TryLockError::WouldBlock) => return alone(),
    };
    let regions = Regions::new(&pool.state.next, n_tasks);
    pool.run(&|member| regions.take_all(member, &task));
    drop(turn);
}

/// The tasks in order, in one region per thread. Neighboring tasks mostly work on neighboring memory, and a thread that
/// continues where it was has the next part prefetched. A thread that is done with its own region helps with the
/// others.
struct Regions<'a> {
    /// The next task of each region.
    next: &'a [TaskCounter],
    n_tasks: usize,
}

/// A counter on a cache line of its own.
#[derive(Default)]
#[repr(align(64))]
struct TaskCounter(AtomicUsize);

impl<'a> Regions<'a> {
    fn new(next: &'a [TaskCounter], n_tasks: usize) -> Self {
        let regions = Self { next, n_tasks };
        for (region, next) in next.iter().enumerate() {
            next.0.store(regions.start(region), Ordering::Relaxed);
        }
        regions
    }

    fn start(&self, region: usize) -> usize {
        self.n_tasks * region / self.next.len()
    }

    fn take_all(&self, member: usize, task: &impl Fn(usize)) {
        let n = self.next.len();
        for region in (member..member + n).map(|region| region % n) {
            let end = self.start(region + 1);
            while let i = self.next[region].0.fetch_add(1, Ordering::Relaxed)
                && i < end
            {
                task(i);
            }
        }
    }
}

/// A job, called with the number of the thread that runs it; the caller has number 0.
type Job<'a> = &'a (dyn Fn(usize) + Sync);

struct SpinPool {
    /// Held by the thread that runs a job.
    turn: Mutex<()>,
    state: &'static PoolState,
    members: Vec<PoolThread>,
}

struct PoolThread {
    thread: Thread,
    is_asleep: &'static AtomicBool,
}

struct PoolState {
    /// The number of the job, whether it is closed, and how many threads are at work on it.
    jobs: AtomicU64,
    /// Written before a job is opened, read by those who joined it.
    work: UnsafeCell<Option<Job<'static>>>,
    has_failed: AtomicBool,
    /// What idle threads prefetch.
    window: PrefetchWindow,
    /// The counters of [`Regions`]: one per thread, and one for the caller.
    next: Vec<TaskCounter>,
}

// SAFETY: `work` is written while the job is closed and nobody is at it, and read by members of an open one.
unsafe impl Sync for PoolState {}

impl SpinPool {
    /// The pool lives as long as the program.
    fn new(n_members: usize) -> Self {
        let state: &'static PoolState = Box::leak(Box::new(PoolState {
            jobs: AtomicU64::new(CLOSED),
            work: UnsafeCell::new(None),
            has_failed: AtomicBool::new(false),
            window: PrefetchWindow::default(),
            next: (0..=n_members).map(|_| TaskCounter::default()).collect(),
        }));
        let members = (0..n_members).filter_map(|i| {
            let is_asleep: &'static AtomicBool = Box::leak(Box::new(AtomicBool::new(false)));
            let builder = thread::Builder::new().name(format!("spin-{i}"));
            // If a thread cannot be spawned, the others do its work.
            let handle = builder.spawn(move || state.serve(i + 1, is_asleep)).ok()?;
            Some(PoolThread {
                thread: handle.thread().clone(),
                is_asleep,
            })
        });
        Self {
            turn: Mutex::new(()),
            state,
            members: members.collect(),
        }
    }

    fn run(&self, work: Job<'_>) {
        let jobs = &self.state.jobs;
        // SAFETY: the last job is closed and nobody is at it. What is lent ends before this function does: it waits for
        // all who joined.
        unsafe {
            *self.state.work.get() = Some(std::mem::transmute::<Job<'_>, Job<'static>>(work));
        }
        let number = (jobs.load(Ordering::Relaxed) & !(NEXT_JOB - 1)).wrapping_add(NEXT_JOB);
        jobs.store(number, Ordering::SeqCst);
        for member in &self.members {
            if member.is_asleep.load(Ordering::SeqCst) {
                member.thread.unpark();
            }
        }
        let own = catch_unwind(AssertUnwindSafe(|| work(0)));
        let mut looks = 0;
        let mut left = jobs.fetch_or(CLOSED, Ordering::AcqRel) & MEMBERS;
        while left > 0 {
            looks += 1;
            if looks < WAITS {
                spin_loop();
            } else {
                thread::yield_now();
            }
            left = jobs.load(Ordering::Acquire) & MEMBERS;
        }
        if let Err(panic) = own {
            std::panic::resume_unwind(panic);
        }
        assert!(
            !self.state.has_failed.swap(false, Ordering::Relaxed),
            "a task on another thread panicked"
        );
    }
}

impl PoolState {
    fn serve(&self, member: usize, is_asleep: &AtomicBool) {
        let mut done = 0;
        loop {
            self.wait(done, is_asleep);
            let jobs = self.jobs.load(Ordering::Acquire);
            let is_open = jobs & CLOSED == 0;
            let join = || {
                let joined = jobs + 1;
                self.jobs
                    .compare_exchange(jobs, joined, Ordering::AcqRel, Ordering::Relaxed)
            };
            if !is_open || join().is_err() {
                continue;
            }
            done = jobs / NEXT_JOB;
            // SAFETY: this thread joined an open job, whose work was written before.
            let work = unsafe { *self.work.get() };
            if let Some(work) = work
                && catch_unwind(AssertUnwindSafe(|| work(member))).is_err()
            {
                self.has_failed.store(true, Ordering::Relaxed);
            }
            self.jobs.fetch_sub(1, Ordering::Release);
        }
    }

    /// Returns once there is an open job after the last one that was done.
    fn wait(&self, done: u64, is_asleep: &AtomicBool) {
        let is_new = || {
            let jobs = self.jobs.load(Ordering::SeqCst);
            jobs & CLOSED == 0 && jobs / NEXT_JOB != done
        };
        for _ in 0..LOOKS {
            if is_new() {
                return;
            }
            if !self.window.prefetch_next() {
                spin_loop();
            }
        }
        // The caller opens the job and then looks for sleeping threads; a thread marks itself asleep and then looks for
        // a job. So at least one of the two notices the other.
        is_asleep.store(true, Ordering::SeqCst);
        while !is_new() {
            thread::park();
        }
        is_asleep.store(false, Ordering::SeqCst);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_task_is_done_once() {
        for n in [0, 1, 2, 7, 300] {
            for _ in 0..200 {
                let counts: Vec<AtomicUsize> = (0..n).map(|_| AtomicUsize::new(0)).collect();
                spin_for(n, |i| {
                    counts[i].fetch_add(1, Ordering::Relaxed);
                });
                assert!(
                    counts
                        .iter()
                        .all(|count| count.load(Ordering::Relaxed) == 1)
                );
            }
        }
    }

    #[test]
    fn threads_that_bring_work_at_once_do_not_wait_for_each_other() {
        let sum = AtomicUsize::new(0);
        thread::scope(|scope| {
            for _ in 0..4 {
                scope.spawn(|| {
                    for _ in 0..500 {
                        spin_for(5, |i| {
                            sum.fetch_add(i, Ordering::Relaxed);
                        });
                    }
                });
            }
        });
        assert_eq!(sum.load(Ordering::Relaxed), 4 * 500 * 10);
    }

    #[test]
    fn a_pool_that_slept_wakes() {
        spin_for(2, |_| {});
        thread::sleep(std::time::Duration::from_millis(20));
        let done = AtomicUsize::new(0);
        spin_for(8, |_| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.load(Ordering::Relaxed), 8);
    }

    #[test]
    fn a_panic_reaches_whoever_brought_the_work() {
        let failing = catch_unwind(|| {
            spin_for(64, |i| assert!(i != 40, "task 40"));
        });
        assert!(failing.is_err());
        // The pool still works afterwards.
        let done = AtomicUsize::new(0);
        spin_for(64, |_| {
            done.fetch_add(1, Ordering::Relaxed);
        });
        assert_eq!(done.load(Ordering::Relaxed), 64);
    }
}
