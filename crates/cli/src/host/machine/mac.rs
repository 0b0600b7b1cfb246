//! The memory of a Mac, from `vm_stat` and `sysctl`.

use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

use super::{GpuShare, Machine};

/// Lines of `vm_stat` that count pages which can be reused without writing them out.
const AVAILABLE: [&str; 3] = ["Pages free", "Pages inactive", "Pages speculative"];

/// How long an answer is reused: a training run asks at every step.
const HOLDS: Duration = Duration::from_secs(2);

/// Up to this size, a Mac's GPU may hold two thirds of the memory; of more, three quarters. Newer systems allow more, 107.5 of
/// 128 GiB and 464 of 512: only Metal says what it is.
const SMALL_MAC: u64 = 36 << 30;

/// Free memory; none without `vm_stat`.
pub(super) fn available(machine: &Machine) -> Option<u64> {
    if !machine.is_here() {
        return parse(&machine.text("vm_stat")?);
    }
    static LAST: Mutex<Option<(Instant, Option<u64>)>> = Mutex::new(None);
    let mut last = LAST.lock().ok()?;
    match *last {
        Some((asked, answer)) if asked.elapsed() < HOLDS => answer,
        _ => {
            let answer = run("/usr/bin/vm_stat", &[]).and_then(|text| parse(&text));
            last.insert((Instant::now(), answer)).1
        }
    }
}

/// A number that `sysctl` has.
pub(super) fn sysctl(machine: &Machine, name: &str) -> Option<u64> {
    let text = match machine.is_here() {
        true => run("/usr/sbin/sysctl", &[name])?,
        false => machine.text("sysctl")?,
    };
    let mut lines = text.lines().filter_map(|line| line.split_once(':'));
    let (_, number) = lines.find(|(known, _)| known.trim() == name)?;
    number.trim().parse().ok()
}

/// What the GPU may hold.
pub(super) fn gpu_share(machine: &Machine) -> Option<GpuShare> {
    let of_bytes = sysctl(machine, "hw.memsize")?;
    let set = sysctl(machine, "iogpu.wired_limit_mb").filter(|mib| *mib > 0);
    let default = if of_bytes <= SMALL_MAC {
        of_bytes / 3 * 2
    } else {
        of_bytes / 4 * 3
    };
    Some(GpuShare {
        bytes: set.map_or(default, |mib| mib.saturating_mul(1 << 20)),
        of_bytes,
        is_set: set.is_some(),
    })
}

fn run(command: &str, arguments: &[&str]) -> Option<String> {
    let output = Command::new(command).args(arguments).output().ok()?;
    Some(String::from_utf8_lossy(&output.stdout).into_owned())
}

fn parse(text: &str) -> Option<u64> {
    let (_, after) = text.split_once("page size of ")?;
    let page: u64 = after.split_whitespace().next()?.parse().ok()?;
    let lines = text.lines().filter_map(|line| line.split_once(':'));
    let pages = lines.filter(|(name, _)| AVAILABLE.contains(name));
    let counts: Vec<u64> = pages
        .filter_map(|(_, count)| count.trim().trim_end_matches('.').parse().ok())
        .collect();
    (counts.len() == AVAILABLE.len()).then(|| page.saturating_mul(counts.iter().sum()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pages_that_can_be_had_are_counted() {
        let text = "Mach Virtual Memory Statistics: (page size of 16384 bytes)\n\
                    Pages free:                               10000.\n\
                    Pages active:                            200000.\n\
                    Pages inactive:                          190000.\n\
                    Pages speculative:                         2000.\n\
                    Pages throttled:                              0.\n\
                    \"Translation faults\":                 123456789.\n";
        assert_eq!(parse(text), Some(16384 * 202_000));
        assert_eq!(parse("vm_stat: not found"), None);
        assert_eq!(parse(&text.replace("Pages inactive", "Pages other")), None);
    }
}
