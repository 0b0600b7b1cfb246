//! The memory that a process has resident, on Linux: mapped files apart from its own.

use std::sync::mpsc::{RecvTimeoutError, Sender, channel};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

/// Bytes of memory; see proc(5), `status`.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub(crate) struct Resident {
    /// Of mapped files: weights as they are stored, and the program. The system takes them back if it needs memory.
    pub(crate) mapped: u64,
    /// All other.
    pub(crate) own: u64,
}

impl Resident {
    /// That of a process now; none on other systems.
    pub(crate) fn of(process: u32) -> Option<Self> {
        let status = std::fs::read_to_string(format!("/proc/{process}/status")).ok()?;
        Self::parse(&status)
    }

    /// That of this process now; none on other systems.
    pub(crate) fn own() -> Option<Self> {
        Self::of(std::process::id())
    }

    fn parse(status: &str) -> Option<Self> {
        let bytes = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name))?;
            let kib: u64 = line.split_whitespace().next()?.parse().ok()?;
            Some(kib << 10)
        };
        Some(Self {
            mapped: bytes("RssFile:")?,
            own: bytes("RssAnon:")? + bytes("RssShmem:")?,
        })
    }

    fn most(self, other: Self) -> Self {
        Self {
            mapped: self.mapped.max(other.mapped),
            own: self.own.max(other.own),
        }
    }
}

/// The most memory of this process, looked at many times a second: Linux keeps the peak of the sum alone.
#[derive(Debug)]
pub(crate) struct ResidentPeak {
    stop: Sender<()>,
    peak: Arc<Mutex<Option<Resident>>>,
}

impl ResidentPeak {
    const INTERVAL: Duration = Duration::from_millis(10);

    /// Looks from now on, as long as this lives.
    pub(crate) fn watch() -> Self {
        let (stop, stopped) = channel::<()>();
        let peak = Arc::new(Mutex::new(Resident::own()));
        let shared = Arc::clone(&peak);
        std::thread::spawn(move || {
            while let Err(RecvTimeoutError::Timeout) = stopped.recv_timeout(Self::INTERVAL) {
                look(&shared);
            }
        });
        Self { stop, peak }
    }

    /// Mapped and own memory, each at its peak until now; none on other systems.
    pub(crate) fn so_far(&self) -> Option<Resident> {
        look(&self.peak)
    }
}

impl Drop for ResidentPeak {
    fn drop(&mut self) {
        // The thread may have ended.
        let _ = self.stop.send(());
    }
}

/// Raises a peak to what is resident now.
fn look(peak: &Mutex<Option<Resident>>) -> Option<Resident> {
    let mut peak = peak.lock().unwrap_or_else(PoisonError::into_inner);
    let now = Resident::own();
    *peak = peak.zip(now).map(|(peak, now)| peak.most(now));
    *peak
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kinds_of_memory_are_told_apart() {
        let status = "Name:\tmoeforge\nVmHWM:\t  900 kB\nRssAnon:\t     100 kB\nRssFile:\t      20 kB\nRssShmem:\t       3 kB\n";
        let expected = Resident {
            mapped: 20 << 10,
            own: 103 << 10,
        };
        assert_eq!(Resident::parse(status), Some(expected));
        assert_eq!(Resident::parse("VmHWM:\t1 kB\n"), None);
    }
}
