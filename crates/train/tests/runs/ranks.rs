//! Runs on several ranks, which are threads here, against the same run on one.

use std::path::Path;
use std::time::Duration;

use kernels::device;
use moeforge_train::{Error, Event, Host, RankLayout, Recipe, RunDir, Session, SessionOptions};
use parallel::{Wire, World, threads};

use super::preferences::preferences;
use super::{Place, bytes};

/// What a rank sees: the bits of each step's loss and norm, and of each validation loss.
#[derive(Debug, Default, PartialEq)]
pub(super) struct Seen {
    pub(super) bits: Vec<u64>,
    /// Of steps and validation passes.
    pub(super) losses: Vec<f64>,
    /// The step after which this rank is asked to stop.
    stop_after: Option<u64>,
    steps: u64,
}

impl Host for Seen {
    fn see(&mut self, event: &Event) {
        match event {
            Event::Step(report) => {
                self.steps = report.step;
                self.losses.push(report.loss);
                self.bits
                    .extend([report.loss, report.grad_norm].map(f64::to_bits));
            }
            Event::Validated { loss, .. } => {
                self.losses.push(*loss);
                self.bits.push(loss.to_bits());
            }
            _ => {}
        }
    }

    fn interrupted(&mut self) -> Option<i32> {
        self.stop_after
            .filter(|step| *step == self.steps)
            .map(|_| 10)
    }
}

/// Trains a recipe on some ranks; the first one's run directory is `run`. Returns what each saw, and how it ended.
pub(super) fn fit(
    recipe: &Recipe,
    run: &Path,
    n: usize,
    stop: Option<(usize, u64)>,
) -> Vec<(Seen, Result<(), Error>)> {
    fit_over(recipe, run, threads::ranks(n, WAIT), "ep=1", stop)
}

/// How long a rank waits for another.
pub(super) const WAIT: Duration = Duration::from_secs(120);

/// The session of one of some ranks.
fn open_rank(recipe: &Recipe, world: &World, layout: RankLayout) -> Result<Session, Error> {
    let device = device::of_tests();
    let options = SessionOptions {
        ranks: Some((world, layout)),
        ..SessionOptions::new(&device, &|model| Ok(model.into()))
    };
    Session::open_with(recipe.clone(), options)
}

/// [`fit`] with a layout, over an engine.
pub(super) fn fit_over<W: Wire + 'static>(
    recipe: &Recipe,
    run: &Path,
    wires: Vec<W>,
    layout: &str,
    stop: Option<(usize, u64)>,
) -> Vec<(Seen, Result<(), Error>)> {
    let layout: RankLayout = layout.parse().unwrap();
    let wires = wires.into_iter();
    std::thread::scope(|scope| {
        let ranks = wires.enumerate().map(|(rank, wire)| {
            scope.spawn(move || {
                let scratch = tempfile::tempdir().unwrap();
                let path = if rank == 0 {
                    run.to_owned()
                } else {
                    scratch.path().join("run")
                };
                let run = match path.exists() {
                    true => RunDir::open(&path).unwrap(),
                    false => RunDir::create(&path, recipe).unwrap(),
                };
                let opened = open_rank(recipe, &World::new(wire), layout);
                let mut seen = Seen {
                    stop_after: stop.filter(|(who, _)| *who == rank).map(|(_, step)| step),
                    ..Seen::default()
                };
                // Ranks of one thread and of two.
                let threads = rayon::ThreadPoolBuilder::new().num_threads(1 + rank % 2);
                let ended = threads.build().unwrap().install(|| {
                    let mut session = opened?;
                    session.resume(&run)?;
                    session.fit(&run, &mut seen)
                });
                let results = ["adapter", "model", "checkpoint-4"].map(|name| path.join(name));
                assert!(rank == 0 || results.iter().all(|result| !result.exists()));
                (seen, ended)
            })
        });
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    })
}

/// The settings of all cases.
const COMMON: &str = "steps = 6\nbatch_size = 1\naccumulate = 4\nsave_every = 2\neval_every = 3\nkeep_last = 99\nbalance_loss = 0.01\n";

fn methods() -> [String; 2] {
    [
        format!("[lora]\ndropout = 0.1\n[train]\nmethod = \"lora\"\n{COMMON}"),
        format!("[train]\nmethod = \"full\"\nbias_update_speed = 0.001\n{COMMON}"),
    ]
}

/// The settings to try: a selection of every method, precision and source of randomness; with `MOEFORGE_MATRIX`, all
/// combinations of them, over 20 steps.
pub(super) fn tried() -> Vec<(&'static str, String)> {
    let selection = cases();
    if std::env::var_os("MOEFORGE_MATRIX").is_none() {
        return selection;
    }
    let mut all = Vec::new();
    for (kind, settings) in [("adapter", &methods()[0]), ("model", &methods()[1])] {
        for compute in ["f32", "bf16", "fp8"] {
            for checkpointing in ["none", "block"] {
                let settings = format!(
                    "[precision]\ncompute = \"{compute}\"\n{settings}checkpointing = \"{checkpointing}\"\n"
                );
                let dpo = format!("{settings}loss = \"dpo\"\n");
                let kind_of_dpo = if kind == "model" {
                    "model dpo"
                } else {
                    "adapter dpo"
                };
                all.extend([(kind, settings), (kind_of_dpo, dpo)]);
            }
        }
    }
    all.extend(selection);
    let long = |settings: String| settings.replace("steps = 6", "steps = 20");
    all.into_iter()
        .map(|(kind, settings)| (kind, long(settings)))
        .collect()
}

/// The checkpoints and the result of a case to compare.
pub(super) fn names(kind: &str, recipe: &Recipe) -> [String; 3] {
    let result = kind.split(' ').next().unwrap();
    let last = recipe.train.steps.unwrap();
    [
        result.into(),
        "checkpoint-6".into(),
        format!("checkpoint-{last}"),
    ]
}

/// A selection of settings.
pub(super) fn cases() -> Vec<(&'static str, String)> {
    let [lora, full] = methods();
    let precision =
        |compute: &str, rest: &str| format!("[precision]\ncompute = \"{compute}\"\n{rest}");
    vec![
        ("adapter", lora.clone()),
        ("adapter", precision("bf16", &lora)),
        ("adapter", format!("{lora}checkpointing = \"block\"\n")),
        (
            "adapter",
            lora.replace("[train]", "use_dora = true\nexclude = \"experts\"\n[train]"),
        ),
        ("model", full.clone()),
        ("model", precision("fp8", &full)),
        (
            "model",
            format!("{full}unfrozen_parameters = [\"layers.2.mlp.experts.3\", \"self_attn\"]\n"),
        ),
        ("adapter dpo", format!("{lora}loss = \"dpo\"\n")),
        // Frozen experts, whose rows travel as products in FP8 round them.
        (
            "adapter",
            precision(
                "fp8",
                &lora.replace("[train]", "target = \"self_attn\"\n[train]"),
            ),
        ),
    ]
}

/// A golden's rows, with three of them to validate on: no number of ranks divides that.
pub(super) fn place(kind: &str) -> Place {
    let place = Place::new("deepseek_v3");
    if kind.ends_with("dpo") {
        preferences(&place);
        return place;
    }
    let rows = std::fs::read_to_string(place.path("train.jsonl")).unwrap();
    let rows: Vec<&str> = rows.lines().cycle().take(3).collect();
    std::fs::write(place.path("valid.jsonl"), rows.join("\n")).unwrap();
    place
}

pub(super) fn recipe(place: &Place, settings: &str) -> Recipe {
    recipe_with(place, settings, "")
}

fn recipe_with(place: &Place, settings: &str, eval: &str) -> Recipe {
    let settings = format!("{settings}[eval]\nbatch_size = 1\n{eval}");
    place.recipe("# deepseek_v3\n", &settings)
}

pub(super) fn assert_same_files<N: AsRef<str>>(one: &Path, other: &Path, names: &[N], what: &str) {
    for name in names.iter().map(AsRef::as_ref) {
        assert_eq!(
            bytes(&one.join(name)),
            bytes(&other.join(name)),
            "{what}: {name}"
        );
    }
}

/// A run on one rank, in the folder `1` of its place, and what it saw.
pub(super) fn run_alone(kind: &str, settings: &str) -> (Place, Recipe, Seen) {
    let place = place(kind);
    let recipe = recipe(&place, settings);
    let (seen, ended) = fit(&recipe, &place.path("1"), 1, None).remove(0);
    ended.unwrap();
    (place, recipe, seen)
}

#[test]
fn a_run_has_the_same_bits_on_any_number_of_ranks() {
    for (kind, settings) in tried() {
        let (place, recipe, expected) = run_alone(kind, &settings);
        let (alone, steps) = (place.path("1"), recipe.train.steps.unwrap() as usize);
        assert_eq!(expected.bits.len(), 2 * steps + steps.div_ceil(3));
        for n in [2, 4] {
            let run = place.path(&n.to_string());
            for (rank, (seen, ended)) in fit(&recipe, &run, n, None).into_iter().enumerate() {
                ended.unwrap();
                assert_eq!(seen, expected, "{settings}rank {rank} of {n}");
            }
            let what = format!("{settings}{n} ranks");
            assert_same_files(&alone, &run, &names(kind, &recipe), &what);
            let metrics = |run: &Path| std::fs::read_to_string(run.join("gradients.json")).ok();
            assert_eq!(metrics(&alone), metrics(&run), "{what}");
        }
    }
}

/// A run that is stopped by any rank, and goes on with another number of them.
#[test]
fn a_run_goes_on_with_another_number_of_ranks() {
    let settings = &cases()[0].1;
    let place = place("");
    let recipe = recipe(&place, settings);
    let (whole, parts) = (place.path("whole"), place.path("parts"));
    let expected = fit(&recipe, &whole, 1, None).remove(0);
    let mut bits = Vec::new();
    for (n, stop) in [(4, Some((3, 2))), (1, Some((0, 4))), (2, None)] {
        let mut ended = fit(&recipe, &parts, n, stop);
        for (seen, ended) in &ended {
            match (stop, ended) {
                (None, Ok(())) => {}
                (
                    Some((_, step)),
                    Err(Error::Interrupted {
                        step: at,
                        signal: 10,
                        ..
                    }),
                ) => {
                    assert_eq!((step, seen.steps), (*at, *at));
                }
                other => panic!("{other:?}"),
            }
        }
        bits.extend(ended.swap_remove(0).0.bits);
    }
    assert_eq!(bits, expected.0.bits);
    assert_same_files(&whole, &parts, &["adapter", "checkpoint-6"], "parts");
}

#[test]
fn ranks_that_differ_fail_or_end_are_named_and_none_hangs() {
    let place = place("");
    let settings = &cases()[0].1;
    let odd = recipe(
        &place,
        &settings.replace("accumulate = 4", "accumulate = 3"),
    );
    for (_, ended) in fit(&odd, &place.path("odd"), 2, None) {
        let said = ended.unwrap_err().to_string();
        assert!(
            said.contains("expected a multiple of the number of ranks, 2, found 3"),
            "{said}"
        );
    }
    // Another seed on the second rank.
    let recipes = [
        recipe(&place, settings),
        recipe(&place, &format!("{settings}seed = 7\n")),
    ];
    let wires = threads::ranks(2, Duration::from_secs(60)).into_iter();
    let said: Vec<String> = std::thread::scope(|scope| {
        let ranks = wires.zip(&recipes).map(|(wire, recipe)| {
            let run = place.path(&format!("seed{}", recipe.train.seed));
            scope.spawn(move || {
                let run = RunDir::create(&run, recipe).unwrap();
                let layout = RankLayout::default();
                let mut session = open_rank(recipe, &World::new(wire), layout).unwrap();
                session
                    .fit(&run, &mut Seen::default())
                    .unwrap_err()
                    .to_string()
            })
        });
        let ranks: Vec<_> = ranks.collect();
        ranks.into_iter().map(|rank| rank.join().unwrap()).collect()
    });
    assert!(said[0].contains("rank 1 differs in its recipe"), "{said:?}");
    assert!(said[1].contains("rank 0 differs in its recipe"), "{said:?}");
    // A first rank that fails alone, here because it cannot write samples: the others hear why.
    let recipe = recipe_with(&place, settings, "prompts = [\"a\"]\n");
    let mut ends = fit(&recipe, &place.path("silent"), 2, None);
    let [other, first] = [1, 0].map(|rank| ends.remove(rank).1.unwrap_err().to_string());
    assert!(
        !first.contains("rank") && other.contains("rank 0 has failed: "),
        "{first} {other}"
    );
}
