//! How much of the time that rows travel is hidden by computing another micro-batch: `cargo bench -p moeforge-train`.
//!
//! Two ranks, threads of this process with one thread each, share out the experts of the quickstart's base over a made-up
//! link. Figures are medians of paired runs.

#![expect(clippy::print_stdout, reason = "a bench prints its figures")]
#![expect(clippy::unwrap_used, reason = "a bench fails loudly")]

use std::time::{Duration, Instant};

use burn::tensor::Device;
use moeforge_train::{Event, Host, Recipe, Session, SessionOptions};
use parallel::{LinkSpeed, World, threads};

const RANKS: usize = 2;
const STEPS: u64 = 3;
const PAIRS: usize = 5;
const SETTINGS: [&str; 3] = [
    "train.batch_size=16",
    "train.accumulate=4",
    "train.steps=99",
];

struct Silent;

impl Host for Silent {
    fn see(&mut self, _: &Event) {}
}

fn main() {
    std::env::set_current_dir(concat!(env!("CARGO_MANIFEST_DIR"), "/../..")).unwrap();
    println!("latency    at once  overlap off  overlap on  hidden");
    for latency in [5, 10, 20] {
        let link = LinkSpeed {
            latency: Duration::from_millis(latency),
            bytes_per_second: f64::INFINITY,
        };
        let at_once = LinkSpeed {
            latency: Duration::ZERO,
            ..link
        };
        let [mut none, mut off, mut on] = [vec![], vec![], vec![]];
        for _ in 0..PAIRS {
            none.push(seconds(at_once, "overlap=off"));
            off.push(seconds(link, "overlap=off"));
            on.push(seconds(link, "overlap=on"));
        }
        let [none, off, on] = [none, off, on].map(median);
        println!(
            "{latency:>4} ms  {none:>8.2} s  {off:>9.2} s  {on:>8.2} s  {:>5.0} %",
            100.0 * (off - on) / (off - none)
        );
    }
}

fn median(mut values: Vec<f64>) -> f64 {
    values.sort_by(f64::total_cmp);
    values[values.len() / 2]
}

/// Seconds of some steps.
fn seconds(link: LinkSpeed, overlap: &str) -> f64 {
    let layout = format!("ep={RANKS},{overlap}").parse().unwrap();
    let settings = SETTINGS.map(str::to_owned);
    let recipe = Recipe::open("recipes/quickstart/lora.toml".as_ref(), &settings).unwrap();
    let wires = threads::ranks_over(RANKS, Duration::from_secs(600), link).into_iter();
    let run = |wire| {
        let one = rayon::ThreadPoolBuilder::new().num_threads(1);
        one.build().unwrap().install(|| {
            let (world, device) = (World::new(wire), Device::flex());
            let options = SessionOptions {
                ranks: Some((&world, layout)),
                ..SessionOptions::new(&device, &|model| Ok(model.into()))
            };
            let mut session = Session::open_with(recipe.clone(), options).unwrap();
            session.timed_steps(1, &mut Silent).unwrap();
            let started = Instant::now();
            session.timed_steps(STEPS, &mut Silent).unwrap();
            started.elapsed().as_secs_f64()
        })
    };
    std::thread::scope(|scope| {
        let ranks = wires.map(|wire| scope.spawn(|| run(wire)));
        let ranks: Vec<_> = ranks.collect();
        let seconds = ranks.into_iter().map(|rank| rank.join().unwrap());
        seconds.fold(0.0, f64::max)
    })
}
