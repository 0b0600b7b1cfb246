//! SIGINT, SIGTERM and SIGUSR1: the first makes the run save and stop, the second stops it at once.

use std::sync::Arc;
use std::sync::atomic::{AtomicI32, Ordering};

use anyhow::Context;

/// The signals received.
#[derive(Clone, Debug, Default)]
pub(crate) struct Signals {
    /// The number of the first signal, 0 before it.
    first: Arc<AtomicI32>,
}

impl Signals {
    /// From now on these signals end the program only if they come twice. The first one is acknowledged on stderr at
    /// once, because a step may take long.
    pub(crate) fn listen() -> anyhow::Result<Self> {
        let signals = Self::default();
        #[cfg(unix)]
        signals
            .clone()
            .spawn()
            .context("cannot listen to signals")?;
        Ok(signals)
    }

    /// The first signal received, if any.
    pub(crate) fn received(&self) -> Option<i32> {
        Some(self.first.load(Ordering::Relaxed)).filter(|signal| *signal != 0)
    }

    #[cfg(unix)]
    fn spawn(self) -> std::io::Result<()> {
        use std::io::Write;

        use signal_hook::consts::{SIGINT, SIGTERM, SIGUSR1};

        // `mpirun` hands SIGUSR1 on to its ranks; after SIGINT it kills them within a second.
        let mut signals = signal_hook::iterator::Signals::new([SIGINT, SIGTERM, SIGUSR1])?;
        let listen = move || {
            for signal in &mut signals {
                if self.first.swap(signal, Ordering::Relaxed) != 0 {
                    // Without unwinding or destructors: half-written files have names that say so.
                    signal_hook::low_level::exit(128 + signal);
                }
                let mut stderr = std::io::stderr();
                let _ = writeln!(
                    stderr,
                    "\nfinishing the step, or the batch of a validation pass, and saving a checkpoint; press Ctrl-C again to stop at once"
                );
            }
        };
        std::thread::Builder::new()
            .name("signals".into())
            .spawn(listen)?;
        Ok(())
    }
}
