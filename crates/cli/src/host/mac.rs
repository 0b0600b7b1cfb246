//! Free memory of a Mac, from `vm_stat`.

use std::process::Command;
use std::sync::Mutex;
use std::time::{Duration, Instant};

/// Lines of `vm_stat` that count pages which can be reused without writing them out.
const AVAILABLE: [&str; 3] = ["Pages free", "Pages inactive", "Pages speculative"];

/// How long an answer is reused: a training run asks at every step.
const HOLDS: Duration = Duration::from_secs(2);

/// Free memory; none without `vm_stat`.
pub(super) fn available() -> Option<u64> {
    static LAST: Mutex<Option<(Instant, Option<u64>)>> = Mutex::new(None);
    let mut last = LAST.lock().ok()?;
    match *last {
        Some((asked, answer)) if asked.elapsed() < HOLDS => answer,
        _ => last.insert((Instant::now(), ask())).1,
    }
}

fn ask() -> Option<u64> {
    let output = Command::new("/usr/bin/vm_stat").output().ok()?;
    parse(&String::from_utf8_lossy(&output.stdout))
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
