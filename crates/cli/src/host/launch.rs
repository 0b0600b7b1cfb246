//! Which launcher started this process, as which of several ranks, and how a rank leaves.

use std::sync::{Mutex, PoisonError};
use std::time::Duration;

use ::train::RankLayout;
use parallel::{MessageReader, MessageWriter, UNTIMED, World};

use crate::console::{Console, misuse};

/// How ranks work together.
#[derive(Clone, Debug, clap::Args)]
pub(crate) struct RankArgs {
    /// Seconds that a rank under `mpirun` waits for the others before it gives up, with code 8; 0 for no end.
    #[arg(long, value_name = "SECONDS", default_value_t = 600)]
    rank_timeout: u64,
    /// How ranks under `mpirun` share the work out: ep=N ranks share out the experts, and exchange rows for each expert
    /// (exchange=slots, the bits of one rank) or for each rank (exchange=rows, less to send; wire=bf16 rounds it),
    /// while another micro-batch is computed (overlap=on or off). dp=N is the number of ranks, to be sure of it. Default: ep is
    /// the number of ranks if experts are trained and can be shared out, else 1; exchange=rows,wire=f32,overlap=on.
    #[arg(long, value_name = "dp=N,ep=N,...")]
    layout: Option<RankLayout>,
}

impl RankArgs {
    /// The layout as given; the rest is left open.
    pub(crate) fn layout(&self) -> RankLayout {
        self.layout.unwrap_or_default()
    }

    /// The words of a command line that say the same.
    pub(crate) fn words(&self) -> Vec<String> {
        let mut words = vec!["--rank-timeout".into(), self.rank_timeout.to_string()];
        if let Some(layout) = self.layout {
            words.extend(["--layout".into(), layout.to_string()]);
        }
        words
    }
}

/// The variables that a launcher sets.
struct Launcher {
    /// Number of ranks.
    ranks: &'static str,
    /// The number of this one.
    rank: &'static str,
    /// Number of ranks on this machine.
    ranks_here: &'static str,
    /// The number of this one among them.
    rank_here: &'static str,
}

/// OpenMPI, MPICH, Slurm.
const LAUNCHERS: [Launcher; 3] = [
    Launcher {
        ranks: "OMPI_COMM_WORLD_SIZE",
        rank: "OMPI_COMM_WORLD_RANK",
        ranks_here: "OMPI_COMM_WORLD_LOCAL_SIZE",
        rank_here: "OMPI_COMM_WORLD_LOCAL_RANK",
    },
    Launcher {
        ranks: "PMI_SIZE",
        rank: "PMI_RANK",
        ranks_here: "MPI_LOCALNRANKS",
        rank_here: "MPI_LOCALRANKID",
    },
    Launcher {
        ranks: "SLURM_STEP_NUM_TASKS",
        rank: "SLURM_PROCID",
        ranks_here: "SLURM_TASKS_PER_NODE",
        rank_here: "SLURM_LOCALID",
    },
];

/// A number of the launcher that started this process together with others, if one did.
fn launched(name: fn(&Launcher) -> &str) -> Option<usize> {
    let number = |name: &str| std::env::var(name).ok()?.parse().ok();
    let is_used = |launcher: &&Launcher| number(launcher.ranks).is_some_and(|ranks| ranks > 1);
    number(name(LAUNCHERS.iter().find(is_used)?))
}

/// Number of ranks that were started together; 1 without a launcher.
fn ranks() -> usize {
    launched(|of| of.ranks).unwrap_or(1)
}

/// The number of this rank, if another one prints and writes files.
fn silent_rank() -> Option<usize> {
    launched(|of| of.rank).filter(|rank| *rank > 0)
}

/// Whether another rank prints and writes files.
pub(crate) fn is_silent() -> bool {
    silent_rank().is_some()
}

/// Threads of a rank that shares its machine with others, so that they do not compute on each other's processors; none for
/// as many as there are processors.
pub(crate) fn threads() -> Option<usize> {
    let here = launched(|of| of.ranks_here).filter(|here| *here > 1)?;
    Some((cpus() / here).max(1))
}

/// Processors that this process may use.
fn cpus() -> usize {
    std::thread::available_parallelism().map_or(1, |cpus| cpus.get())
}

/// An error, with the rank that has it unless that is the one that prints everything.
pub(crate) fn with_rank(error: anyhow::Error) -> anyhow::Error {
    match silent_rank() {
        Some(rank) => error.context(format!("rank {rank}")),
        None => error,
    }
}

/// Refuses a verb that several ranks would each do alone.
pub(crate) fn expect_alone() -> anyhow::Result<()> {
    match ranks() {
        1 => Ok(()),
        ranks => Err(misuse(format!(
            "a launcher has started {ranks} ranks, and this verb runs alone; `mpirun` is for `train` and `bench train`"
        ))),
    }
}

/// The ranks of a run. They stay here to the end of the process: a rank that fails must not wait for the others.
static JOINED: Mutex<Option<World>> = Mutex::new(None);

/// Joins the ranks that were started together, and says who they are.
///
/// # Errors
/// If this build has no MPI, or it does not start.
pub(crate) fn join(args: &RankArgs, console: &Console) -> anyhow::Result<World> {
    if ranks() == 1 {
        return Ok(World::alone());
    }
    let (world, host) = joined(args.rank_timeout)?;
    *JOINED.lock().unwrap_or_else(PoisonError::into_inner) = Some(world.clone());
    let mut about = MessageWriter::default();
    about
        .bytes(host.as_bytes())
        .count(rayon::current_num_threads() as u64)
        .count(cpus() as u64);
    let (mut places, mut is_bound) = (Vec::new(), false);
    for about in world.all("hosts", about.finish())? {
        let mut reader = MessageReader::new(&about);
        let (host, threads) = (reader.text()?, reader.count()?);
        places.push(format!("{host} (threads: {threads})"));
        is_bound |= reader.count()? == 1;
    }
    console.note(format_args!(
        "{} ranks: {}",
        world.ranks(),
        places.join(", ")
    ));
    let link = world.probe(Duration::from_millis(100))?;
    console.note(format_args!(
        "slowest link: {:.0} MB/s, {:.1} ms",
        link.bytes_per_second / 1e6,
        link.latency.as_secs_f64() * 1e3
    ));
    if is_bound {
        console.note(
            "a rank may use one core: `mpirun` binds ranks to cores unless it has `--bind-to none`",
        );
    }
    Ok(world)
}

/// Does something on the first rank of each machine, and then on the others: these find what the first has cached.
pub(crate) fn first_of_machine_first<T>(
    world: &World,
    work: impl FnOnce() -> anyhow::Result<T>,
) -> anyhow::Result<T> {
    let is_first = launched(|of| of.rank_here).unwrap_or(0) == 0;
    let wait = || world.all(UNTIMED, Vec::new());
    if !is_first {
        wait()?;
    }
    // A rank that fails ends the others.
    let done = work()?;
    if is_first {
        wait()?;
    }
    Ok(done)
}

/// Leaves the other ranks after the end of a run, when all have come to it.
pub(crate) fn leave() {
    *JOINED.lock().unwrap_or_else(PoisonError::into_inner) = None;
}

#[cfg(not(feature = "mpi"))]
fn joined(_: u64) -> anyhow::Result<(World, String)> {
    Err(misuse(format!(
        "a launcher has started {} ranks, and this build has no MPI: each would train alone; build with `--features mpi`",
        ranks()
    )))
}

#[cfg(feature = "mpi")]
fn joined(timeout_seconds: u64) -> anyhow::Result<(World, String)> {
    use std::io::Write;

    use parallel::mpi::{MpiRank, TimeoutPolicy};
    use parallel::{Lost, Wire};

    use crate::console::{RANKS_LOST, end_at_panics};

    fn leave(lost: &Lost) -> ! {
        let _ = writeln!(
            std::io::stderr(),
            "error: {lost}; what was saved before is whole"
        );
        std::process::exit(i32::from(RANKS_LOST));
    }
    let policy = TimeoutPolicy {
        timeout: (timeout_seconds > 0).then_some(Duration::from_secs(timeout_seconds)),
        leave,
    };
    let rank = MpiRank::join(policy).map_err(|why| anyhow::anyhow!("{why}"))?;
    if rank.ranks() != ranks() {
        return Err(misuse(format!(
            "a launcher has started {} ranks, and MPI knows {}: each would train alone; start them with the `mpirun` of the \
             MPI that this program was built with, or `srun --mpi=pmix`",
            ranks(),
            rank.ranks()
        )));
    }
    let host = rank.host().to_owned();
    #[cfg(debug_assertions)]
    let rank = super::faults::FaultyWire::new(rank);
    let world = World::new(rank);
    // Unwinding past MPI makes `mpirun` crash or hang.
    end_at_panics(format!("rank {} on {host}", world.rank()), "", 101);
    Ok((world, host))
}
