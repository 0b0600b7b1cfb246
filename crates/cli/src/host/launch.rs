//! Which launcher started this process, as which of several ranks, and how a rank leaves.

use std::sync::{Mutex, PoisonError};

use parallel::{MessageReader, MessageWriter, RankError, World};

use crate::console::{Console, RANKS_LOST, USAGE, WithCode};

/// Variables of launchers: the number of ranks, this one's number, and the ranks on this machine. OpenMPI, MPICH, Slurm.
const VARIABLES: [[&str; 3]; 3] = [
    [
        "OMPI_COMM_WORLD_SIZE",
        "OMPI_COMM_WORLD_RANK",
        "OMPI_COMM_WORLD_LOCAL_SIZE",
    ],
    ["PMI_SIZE", "PMI_RANK", "MPI_LOCALNRANKS"],
    [
        "SLURM_STEP_NUM_TASKS",
        "SLURM_PROCID",
        "SLURM_TASKS_PER_NODE",
    ],
];

/// A number that a launcher has set.
fn variable(which: usize) -> Option<usize> {
    let names = VARIABLES.iter().map(|names| names[which]);
    let mut values = names.filter_map(|name| std::env::var(name).ok()?.parse().ok());
    values.next()
}

/// Number of ranks that were started together; 1 without a launcher.
pub(crate) fn ranks() -> usize {
    variable(0).unwrap_or(1)
}

/// Whether another rank prints and writes files.
pub(crate) fn is_silent() -> bool {
    ranks() > 1 && variable(1).is_some_and(|rank| rank > 0)
}

/// Threads of a rank that shares its machine with others, so that they do not compute on each other's processors; none for
/// as many as there are processors.
pub(crate) fn threads() -> Option<usize> {
    let here = variable(2).filter(|here| *here > 1 && ranks() > 1)?;
    let cpus = std::thread::available_parallelism().map_or(1, |cpus| cpus.get());
    Some((cpus / here).max(1))
}

/// An error, with the rank that has it unless that is the one that prints everything.
pub(crate) fn with_rank(error: anyhow::Error) -> anyhow::Error {
    match variable(1).filter(|_| is_silent()) {
        Some(rank) => error.context(format!("rank {rank}")),
        None => error,
    }
}

/// Refuses a verb that several ranks would each do alone.
pub(crate) fn expect_alone(verb: &str) -> anyhow::Result<()> {
    match ranks() {
        1 => Ok(()),
        ranks => Err(usage(format!(
            "`{verb}` runs alone, and a launcher has started it {ranks} times; `mpirun` is for `train`"
        ))),
    }
}

/// The ranks of a run. They stay here to the end of the process: a rank that fails must not wait for the others.
static JOINED: Mutex<Option<World>> = Mutex::new(None);

/// Joins the ranks that were started together, and says who they are.
///
/// # Errors
/// If this build has no MPI, or it does not start.
pub(crate) fn join(timeout_seconds: u64, console: &Console) -> anyhow::Result<World> {
    if ranks() == 1 {
        return Ok(World::alone());
    }
    let (world, host) = joined(timeout_seconds)?;
    *JOINED.lock().unwrap_or_else(PoisonError::into_inner) = Some(world.clone());
    let mut about = MessageWriter::default();
    about
        .bytes(host.as_bytes())
        .count(rayon::current_num_threads() as u64);
    let mut threads_of: Vec<(String, u64)> = Vec::new();
    for about in world.all("hosts", about.finish())? {
        let mut reader = MessageReader::new(&about);
        let host = reader.text().map_err(RankError::from)?;
        threads_of.push((host, reader.count().map_err(RankError::from)?));
    }
    let places = threads_of
        .iter()
        .map(|(host, threads)| format!("{host} ({threads} threads)"));
    console.note(format_args!(
        "{} ranks: {}",
        world.ranks(),
        places.collect::<Vec<_>>().join(", ")
    ));
    if threads_of.iter().any(|(_, threads)| *threads == 1) {
        console.note(
            "a rank has one thread: `mpirun` binds ranks to cores unless it has `--bind-to none`",
        );
    }
    Ok(world)
}

/// Leaves the other ranks after the end of a run, when all have come to it.
pub(crate) fn leave() {
    *JOINED.lock().unwrap_or_else(PoisonError::into_inner) = None;
}

fn usage(message: String) -> anyhow::Error {
    anyhow::Error::new(WithCode {
        code: USAGE,
        message,
    })
}

#[cfg(not(feature = "mpi"))]
fn joined(_: u64) -> anyhow::Result<(World, String)> {
    let _ = RANKS_LOST;
    Err(usage(format!(
        "a launcher has started {} ranks, and this build has no MPI: each would train alone; build with `--features mpi`",
        ranks()
    )))
}

#[cfg(feature = "mpi")]
fn joined(timeout_seconds: u64) -> anyhow::Result<(World, String)> {
    use std::io::Write;
    use std::time::Duration;

    use parallel::mpi::{MpiRank, Patience};
    use parallel::{Lost, Wire};

    fn leave(lost: &Lost) -> ! {
        let _ = writeln!(
            std::io::stderr(),
            "error: {lost}; what was saved before is whole"
        );
        std::process::exit(i32::from(RANKS_LOST));
    }
    let patience = Patience {
        timeout: (timeout_seconds > 0).then_some(Duration::from_secs(timeout_seconds)),
        leave,
    };
    let rank = MpiRank::join(patience).map_err(|why| anyhow::anyhow!("{why}"))?;
    if rank.ranks() != ranks() {
        return Err(usage(format!(
            "a launcher has started {} ranks, and MPI knows {}: each would train alone; start them with the `mpirun` of the \
             MPI that this program was built with, or `srun --mpi=pmix`",
            ranks(),
            rank.ranks()
        )));
    }
    let host = rank.host().to_owned();
    let world = World::new(rank);
    // Unwinding past MPI makes `mpirun` crash or hang.
    let (number, place) = (world.rank(), host.clone());
    std::panic::set_hook(Box::new(move |panic| {
        let _ = writeln!(std::io::stderr(), "rank {number} on {place}: {panic}");
        std::process::exit(101);
    }));
    Ok((world, host))
}
