//! Ranks that fail where a test says, in builds that check themselves: nobody can kill a process from outside in the middle of
//! a chosen exchange.

use std::process::Command;
use std::sync::atomic::{AtomicU64, Ordering};

use parallel::{Arrival, Wire};

/// The variable with a fault, as `RANK:NUMBER:KIND:EXCHANGE`: the rank fails when it makes the exchange, or one whose name
/// begins so, for the NUMBER-th time.
const FAULT: &str = "MOEFORGE_FAULT";

/// An engine on which this rank may fail.
#[derive(Debug)]
pub(super) struct FaultyWire<W> {
    wire: W,
    fault: Option<RankFault>,
}

#[derive(Debug)]
struct RankFault {
    /// The times left until it happens.
    left: AtomicU64,
    kind: String,
    exchange: String,
}

impl<W: Wire> FaultyWire<W> {
    pub(super) fn new(wire: W) -> Self {
        let fault = std::env::var(FAULT).ok().and_then(|text| {
            let mut parts = text.splitn(4, ':').map(str::to_owned);
            let rank: usize = parts.next()?.parse().ok()?;
            Some(RankFault {
                left: AtomicU64::new(parts.next()?.parse().ok()?),
                kind: parts.next()?,
                exchange: parts.next()?,
            })
            .filter(|_| rank == wire.rank())
        });
        Self { wire, fault }
    }
}

impl RankFault {
    fn happen(&self) {
        match self.kind.as_str() {
            "exit" => std::process::exit(3),
            "panic" => panic!("a test wants it"),
            signal => {
                let own = std::process::id().to_string();
                let _ = Command::new("kill").args([signal, &own]).status();
            }
        }
    }
}

impl<W: Wire> Wire for FaultyWire<W> {
    fn rank(&self) -> usize {
        self.wire.rank()
    }

    fn ranks(&self) -> usize {
        self.wire.ranks()
    }

    fn post(&self, name: &str, messages: Vec<Vec<u8>>) -> Arrival {
        if let Some(fault) = &self.fault
            && name.starts_with(&fault.exchange)
            && fault.left.fetch_sub(1, Ordering::Relaxed) == 1
        {
            fault.happen();
        }
        self.wire.post(name, messages)
    }
}
