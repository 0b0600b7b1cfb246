//! Parallel loops over tasks that are worth waking a thread for.

use std::sync::atomic::{AtomicUsize, Ordering};

/// Runs tasks on all threads. Each thread takes the next task as soon as it is free, so if the last tasks are small,
/// all threads end together, however unequal the cores are.
pub(crate) fn parallel_for(n_tasks: usize, task: impl Fn(usize) + Sync) {
    let next = AtomicUsize::new(0);
    let take = || {
        while let i = next.fetch_add(1, Ordering::Relaxed)
            && i < n_tasks
        {
            task(i);
        }
    };
    if n_tasks == 1 {
        return take();
    }
    rayon::scope(|scope| {
        for _ in 0..rayon::current_num_threads().min(n_tasks) {
            scope.spawn(|_| take());
        }
    });
}
