//! Training on several ranks, which `mpirun` starts; and launchers of a build without MPI.

use super::command;

#[cfg(not(feature = "mpi"))]
#[test]
fn a_build_without_mpi_does_not_train_once_for_each_rank() {
    let launched = |words: &[&str]| {
        let mut command = command(words);
        command.envs([("OMPI_COMM_WORLD_SIZE", "2"), ("OMPI_COMM_WORLD_RANK", "0")]);
        let output = command.output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(2), "{said}");
        said
    };
    let said = launched(&["train", "recipes/smoke/lora.toml"]);
    assert!(
        said.contains("has started 2 ranks") && said.contains("--features mpi"),
        "{said}"
    );
    let said = launched(&["inspect", "recipes/quickstart/base"]);
    assert!(said.contains("runs alone"), "{said}");
}

#[cfg(feature = "mpi")]
mod mpi {
    use std::fs;
    use std::io::Write;
    use std::path::Path;
    use std::process::{Child, Command, Output, Stdio};
    use std::time::{Duration, Instant};

    use super::command;

    /// `mpirun` for tests: as root, more ranks than cores, none bound to a core.
    fn mpirun(ranks: usize, words: &[&str]) -> Command {
        let moeforge = command(&[]).get_program().to_owned();
        let mut mpirun = Command::new("mpirun");
        let options = [
            "--allow-run-as-root",
            "--oversubscribe",
            "--bind-to",
            "none",
            "-n",
        ];
        mpirun
            .args(options)
            .arg(ranks.to_string())
            .arg(moeforge)
            .args(words);
        mpirun.current_dir(env!("CARGO_MANIFEST_DIR"));
        mpirun
            .env("XDG_CACHE_HOME", env!("CARGO_TARGET_TMPDIR"))
            .stdin(Stdio::null());
        mpirun
    }

    const RECIPE: &str = "recipes/smoke/lora.toml";
    /// A step of four micro-batches.
    const FOUR: [&str; 4] = ["--set", "train.accumulate=4", "--set", "train.batch_size=1"];

    fn train<'a>(out: &'a str, more: &[&'a str]) -> Vec<&'a str> {
        [&["train", RECIPE, "--out", out], &FOUR[..], more].concat()
    }

    fn succeeds(mut command: Command) -> Output {
        let output = command.output().unwrap();
        assert!(
            output.status.success(),
            "{}",
            String::from_utf8_lossy(&output.stderr)
        );
        output
    }

    /// The files of a run that have its numbers.
    fn numbers(run: &Path, step: u64) -> Vec<Vec<u8>> {
        let checkpoint = format!("checkpoint-{step}");
        [
            "adapter/adapter_model.safetensors",
            &format!("{checkpoint}/optimizer.safetensors"),
            &format!("{checkpoint}/state.json"),
        ]
        .map(|name| fs::read(run.join(name)).unwrap_or_else(|why| panic!("{name}: {why}")))
        .into()
    }

    #[test]
    fn ranks_end_with_the_bits_of_one_and_go_on_alone() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name).to_string_lossy().into_owned();
        let (alone, two) = (at("1"), at("2"));
        succeeds(command(&train(&alone, &[])));
        for layout in ["ep=1", "ep=2,exchange=slots"] {
            let said = succeeds(mpirun(2, &train(&two, &["--layout", layout])));
            assert_eq!(
                String::from_utf8_lossy(&said.stdout).trim(),
                format!("{two}/adapter")
            );
            let said = String::from_utf8_lossy(&said.stderr);
            for expected in ["2 ranks: ", "slowest link: ", "layout: dp=2,ep="] {
                assert!(said.contains(expected), "{said}");
            }
            assert!(numbers(Path::new(&alone), 3) == numbers(Path::new(&two), 3));
            fs::remove_dir_all(&two).unwrap();
        }
        // Two steps on four ranks, the third alone, two more on two; and all of them alone, with the same ends.
        let (parts, whole) = (at("parts"), at("whole"));
        let short = ["--set", "train.steps=2"];
        let slots = ["--layout", "exchange=slots"];
        succeeds(mpirun(4, &train(&parts, &[&short[..], &slots].concat())));
        succeeds(command(&train(&whole, &short)));
        for (ranks, steps) in [(1, "train.steps=3"), (2, "train.steps=5")] {
            let resume = |run| vec!["train", "--resume", run, "--set", steps];
            succeeds(match ranks {
                1 => command(&resume(&parts)),
                ranks => mpirun(ranks, &[resume(&parts), slots.to_vec()].concat()),
            });
            succeeds(command(&resume(&whole)));
        }
        assert!(numbers(Path::new(&whole), 5) == numbers(Path::new(&parts), 5));
        // Ranks that MPI does not know, because something else has started them.
        let mut strange = command(&train(&at("strange"), &[]));
        let output = strange.env("OMPI_COMM_WORLD_SIZE", "2").output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.code() == Some(2) && said.contains("MPI knows 1"),
            "{said}"
        );
        // A batch that can be cut is cut, and one that cannot is not.
        let cut = at("cut");
        let words = [
            "train",
            RECIPE,
            "--out",
            &cut,
            "--set",
            "train.accumulate=1",
        ];
        let said = succeeds(mpirun(2, &words));
        let said = String::from_utf8_lossy(&said.stderr).into_owned();
        assert!(
            said.contains("train.batch_size = 2, train.accumulate = 2, the same step"),
            "{said}"
        );
    }

    /// Starts a long run on three ranks, and returns it with the processes of its ranks when it has a checkpoint.
    fn long_run(run: &str) -> (Child, Vec<i32>) {
        let more = [
            "--set",
            "train.steps=100000",
            "--set",
            "train.save_every=5",
            "--set",
            "train.accumulate=3",
            "--rank-timeout",
            "2",
        ];
        let mut mpirun = mpirun(3, &train(run, &more));
        let child = mpirun
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .unwrap();
        let started = Instant::now();
        while !Path::new(run).join("checkpoint-5").exists() {
            assert!(started.elapsed() < Duration::from_secs(60), "no checkpoint");
            std::thread::sleep(Duration::from_millis(20));
        }
        let children = format!("/proc/{0}/task/{0}/children", child.id());
        let ranks = fs::read_to_string(children).unwrap();
        let ranks: Vec<i32> = ranks
            .split_whitespace()
            .map(|id| id.parse().unwrap())
            .collect();
        assert_eq!(ranks.len(), 3);
        (child, ranks)
    }

    fn signal(name: &str, process: i32) {
        let sent = Command::new("kill")
            .args([name, &process.to_string()])
            .status();
        assert!(sent.unwrap().success());
    }

    /// How a job ends, within some seconds, and what it says.
    fn end(mut child: Child) -> (Option<i32>, String) {
        let started = Instant::now();
        while child.try_wait().unwrap().is_none() {
            assert!(started.elapsed() < Duration::from_secs(30), "the job hangs");
            std::thread::sleep(Duration::from_millis(20));
        }
        let output = child.wait_with_output().unwrap();
        (
            output.status.code(),
            String::from_utf8_lossy(&output.stderr).into_owned(),
        )
    }

    #[test]
    fn ranks_that_are_killed_or_stopped_end_the_job_and_it_goes_on() {
        let place = tempfile::tempdir().unwrap();
        for (name, kind, code) in [
            ("-KILL", "killed", Some(137)),
            ("-STOP", "stopped", Some(8)),
            ("-USR1", "asked", Some(138)),
        ] {
            let run = place.path().join(kind).to_string_lossy().into_owned();
            let (child, ranks) = long_run(&run);
            match kind {
                "asked" => signal(name, child.id() as i32),
                _ => signal(name, ranks[1]),
            }
            let (found, said) = end(child);
            assert_eq!(found, code, "{kind}: {said}");
            if kind == "stopped" {
                assert!(
                    said.contains("has waited 2 s at `") && said.contains("for ranks [1]"),
                    "{said}"
                );
                // `mpirun` cannot end a process that is stopped in every version.
                let _ = Command::new("kill")
                    .args(["-KILL", &ranks[1].to_string()])
                    .status();
            }
            let steps = |run: &str| {
                let folders = fs::read_dir(run).unwrap().flatten();
                let names = folders.map(|entry| entry.file_name().to_string_lossy().into_owned());
                names
                    .filter_map(|name| name.strip_prefix("checkpoint-")?.parse::<u64>().ok())
                    .max()
            };
            // One more than the last, so that there is something left to do.
            let last = steps(&run).unwrap() + 1;
            let more = format!("train.steps={last}");
            succeeds(command(&["train", "--resume", &run, "--set", &more]));
            assert_eq!(steps(&run), Some(last));
        }
    }

    /// Ranks that are killed and resumed end as those that are not.
    #[test]
    fn a_check_of_resuming_kills_ranks() {
        let place = tempfile::tempdir().unwrap();
        let out = place.path().join("check").to_string_lossy().into_owned();
        let launcher = "mpirun --allow-run-as-root --oversubscribe --bind-to none -n 2";
        let ranks = ["--launcher", launcher, "--layout", "exchange=slots"];
        let kills = [
            "--kills",
            "3",
            "--out",
            &out,
            "--json",
            "--set",
            "train.save_every=1",
        ];
        let words = [&["resume-check", RECIPE], &ranks[..], &kills, &FOUR].concat();
        let said = succeeds(command(&words));
        let report: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
        assert_eq!(
            (&report["equal"], &report["kills"]),
            (&true.into(), &3.into()),
            "{report}"
        );
        // A command that becomes the program has no ranks to kill.
        let other = place.path().join("env").to_string_lossy().into_owned();
        let words = ["resume-check", RECIPE, "--launcher", "env", "--out", &other];
        let output = command(&words).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert!(
            output.status.code() == Some(1) && said.contains("--launcher: expected"),
            "{said}"
        );
    }

    /// A benchmark of ranks says what each needs, as a run will; combinations and other verbs are for one process.
    #[test]
    fn benchmarks_measure_ranks_that_train_together() {
        let bench = |more: &[&'static str]| {
            let batch = ["--batch", "2", "--seq", "16", "--reps", "1", "--json"];
            [
                &["bench", "train", "recipes/quickstart/base"],
                &batch[..],
                more,
            ]
            .concat()
        };
        let said = succeeds(mpirun(2, &bench(&[])));
        let report: serde_json::Value = serde_json::from_slice(&said.stdout).unwrap();
        assert_eq!(report["ranks"], 2);
        assert_eq!(
            report["layout"],
            "dp=2,ep=2,exchange=rows,wire=f32,overlap=on"
        );
        let result = &report["results"][0];
        for (key, least) in [("rank_peak_bytes", 1 << 24), ("rank_mapped_bytes", 1 << 20)] {
            let bytes = result[key].as_array().unwrap();
            assert!(
                bytes.len() == 2 && bytes.iter().all(|n| n.as_u64() > Some(least)),
                "{report}"
            );
        }
        assert!(result["tokens_per_second"]["median"].as_f64() > Some(0.0));
        let refused = |words: &[&str], with: &str| {
            let output = mpirun(2, words).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            assert!(
                output.status.code() == Some(2) && said.contains(with),
                "{said}"
            );
        };
        refused(&bench(&["--seq", "8,16"]), "one combination");
        refused(&["inspect", "recipes/quickstart/base"], "`bench train`");
    }

    /// An update of one expert, which one of two ranks has: the other one starts and goes on with nothing of its own.
    #[test]
    fn a_rank_without_trained_experts_goes_on() {
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name).to_string_lossy().into_owned();
        let (alone, two) = (at("1"), at("2"));
        let one = "lora.target=[\"layers.1.mlp.experts.3\"]";
        let more = ["--set", one, "--set", "train.steps=2"];
        let slots = ["--layout", "ep=2,exchange=slots"];
        succeeds(command(&train(&alone, &more)));
        succeeds(mpirun(2, &train(&two, &[&more[..], &slots].concat())));
        let resume = |run| vec!["train", "--resume", run, "--set", "train.steps=4"];
        succeeds(command(&resume(&alone)));
        succeeds(mpirun(2, &[resume(&two), slots.to_vec()].concat()));
        assert!(numbers(Path::new(&alone), 4) == numbers(Path::new(&two), 4));
    }

    /// Ranks on two hosts that this machine plays, over a cable of 1 Gbit/s, end with the bits of one process, and their
    /// interfaces count the bytes that they say they send. Without the rights to play hosts, as in many containers, nothing
    /// is tested.
    #[test]
    fn two_hosts_have_the_bits_of_one_and_send_what_they_say() {
        const CANNOT: i32 = 77;
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name).to_string_lossy().into_owned();
        // Long enough that what `mpirun` itself sends does not count.
        let more = ["--set", "train.steps=24", "--set", "train.eval_every=100"];
        let alone = at("alone/run");
        succeeds(command(&train(&alone, &more)));
        let two = at("two/run");
        let words = train(&two, &more);
        let mut hosts = Command::new("tests/hosts/two_hosts");
        let binary = command(&[]).get_program().to_owned();
        hosts
            .arg(binary)
            .args([words[1], words[3], "--rate", "1gbit", "--"]);
        hosts.args(&words[4..]).args(["--layout", "exchange=slots"]);
        hosts.current_dir(env!("CARGO_MANIFEST_DIR"));
        let output = hosts.stdin(Stdio::null()).output().unwrap();
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        if output.status.code() == Some(CANNOT) {
            let _ = writeln!(std::io::stderr(), "NOT TESTED: {said}");
            return;
        }
        assert!(output.status.success(), "{said}");
        assert!(numbers(Path::new(&alone), 24) == numbers(Path::new(&two), 24));
        let counted: serde_json::Value = serde_json::from_slice(&output.stdout).unwrap();
        let counted = counted["sent_by_left"].as_f64().unwrap() / 1e6;
        let told = said.split("sent to other ranks: ").nth(1).unwrap();
        let told: f64 = told.split(' ').next().unwrap().parse().unwrap();
        assert!(
            (counted / told - 1.0).abs() < 0.02,
            "{counted} MB, not {told}"
        );
    }

    /// Resumes a run alone, as soon as the ranks that `mpirun` has ended are gone.
    #[cfg(debug_assertions)]
    fn goes_on(run: &str) {
        let started = Instant::now();
        loop {
            let output = command(&["train", "--resume", run]).output().unwrap();
            let said = String::from_utf8_lossy(&output.stderr).into_owned();
            let is_busy = said.contains("another process is using");
            if !is_busy || started.elapsed() > Duration::from_secs(5) {
                assert!(output.status.success(), "{said}");
                return;
            }
            std::thread::sleep(Duration::from_millis(100));
        }
    }

    /// Where a rank fails: exchanges of the forward pass, the backward pass, the update and a checkpoint.
    #[cfg(debug_assertions)]
    const PLACES: [&str; 4] = ["rows of", "gradients of rows", "weights", "checkpoint"];
    /// How it fails, and the code of the job.
    #[cfg(debug_assertions)]
    const FAULTS: [(&str, i32); 4] = [("-KILL", 137), ("exit", 3), ("panic", 101), ("-STOP", 8)];

    /// One of four ranks fails in every way at every place, as often as `MOEFORGE_REPEATS` says: the job ends, says who it was,
    /// and goes on alone to the bits of a run that nobody disturbed.
    #[cfg(debug_assertions)]
    #[test]
    fn a_rank_that_fails_anywhere_ends_the_job_and_it_goes_on() {
        let repeats = std::env::var("MOEFORGE_REPEATS").map_or(1, |n| n.parse().unwrap());
        let place = tempfile::tempdir().unwrap();
        let at = |name: &str| place.path().join(name).to_string_lossy().into_owned();
        let more = ["--set", "train.save_every=1", "--set", "train.steps=6"];
        let whole = at("whole");
        succeeds(command(&train(&whole, &more)));
        let expected = numbers(Path::new(&whole), 6);
        for repeat in 0..repeats {
            for (i, exchange) in PLACES.iter().enumerate() {
                for (j, (fault, code)) in FAULTS.iter().enumerate() {
                    let run = at(&format!("{repeat}-{i}-{j}"));
                    let rank = 1 + (repeat + i + j) % 3;
                    let time = 2 + (repeat * 3 + i + j) % 4;
                    let layout = ["--layout", "ep=4,exchange=slots", "--rank-timeout", "2"];
                    let words = train(&run, &[&more[..], &layout].concat());
                    let mut job = mpirun(4, &words);
                    job.env(
                        "MOEFORGE_FAULT",
                        format!("{rank}:{time}:{fault}:{exchange}"),
                    );
                    let started = Instant::now();
                    let child = job.stdout(Stdio::null()).stderr(Stdio::piped()).spawn();
                    let (found, said) = end(child.unwrap());
                    let what = format!("{fault} of rank {rank} at `{exchange}` {time}: {said}");
                    assert_eq!(found, Some(*code), "{what}");
                    assert!(started.elapsed() < Duration::from_secs(30), "{what}");
                    let named = [
                        format!("rank {rank}"),
                        format!("for ranks [{rank}]"),
                        format!(",{rank}]"),
                    ];
                    assert!(named.iter().any(|name| said.contains(name)), "{what}");
                    if Path::new(&run).join("checkpoint-1").exists() {
                        goes_on(&run);
                        assert!(numbers(Path::new(&run), 6) == expected, "{what}");
                    }
                }
            }
        }
    }
}
