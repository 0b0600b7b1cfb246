//! Runs whose experts ranks share out, against the same run on one rank.

use std::path::Path;

use checkpoint::Safetensors;
use moeforge_train::Recipe;
use parallel::{Arrival, Wire, threads};

use super::ranks::{
    Seen, WAIT, assert_same_files, cases, fit_over, names, place, recipe, run_alone, tried,
};
use super::{Place, assert_curve, expected_curve};

#[test]
fn experts_that_ranks_share_out_have_the_bits_of_one_rank() {
    for (kind, settings) in tried() {
        let (place, recipe, expected) = run_alone(kind, &settings);
        let alone = place.path("1");
        for (n, layout) in [
            (2, "ep=2"),
            (2, "ep=2,overlap=off"),
            (4, "ep=4"),
            (4, "ep=2"),
        ] {
            let what = format!("{settings}{layout}");
            let run = place.path(&format!("{n},{layout}"));
            let layout = format!("{layout},exchange=slots");
            let wires = threads::ranks(n, WAIT);
            let ranks = fit_over(&recipe, &run, wires, &layout, None).into_iter();
            for (rank, (seen, ended)) in ranks.enumerate() {
                ended.unwrap();
                assert_eq!(seen, expected, "{what} rank {rank}");
            }
            assert_same_files(&alone, &run, &names(kind, &recipe), &what);
            let audit = |run: &Path| std::fs::read_to_string(run.join("gradients.json")).ok();
            assert_eq!(audit(&alone), audit(&run), "{what}");
        }
    }
}

/// Ten steps on four ranks that share out experts, five alone, five on two ranks that have all: the bits of twenty alone.
#[test]
fn a_run_goes_on_with_another_layout() {
    let (kind, settings) = &cases()[0];
    let settings = settings.replace("steps = 6", "steps = 20");
    let (place, recipe, expected) = run_alone(kind, &settings);
    let (whole, parts) = (place.path("1"), place.path("parts"));
    let mut bits = Vec::new();
    let spans = [
        (4, "ep=4,exchange=slots", Some((2, 10))),
        (1, "ep=1", Some((0, 15))),
        (2, "ep=1", None),
    ];
    for (n, layout, stop) in spans {
        let wires = threads::ranks(n, WAIT);
        let (seen, ended) = fit_over(&recipe, &parts, wires, layout, stop).remove(0);
        assert_eq!(ended.is_ok(), stop.is_none(), "{ended:?}");
        bits.extend(seen.bits);
    }
    assert_eq!(bits, expected.bits);
    assert_same_files(&whole, &parts, &["adapter", "checkpoint-20"], "parts");
}

/// What every rank saw of a run that ends.
fn fits(recipe: &Recipe, run: &Path, n: usize, layout: &str) -> Vec<Seen> {
    let ranks = fit_over(recipe, run, threads::ranks(n, WAIT), layout, None).into_iter();
    ranks
        .map(|(seen, ended)| {
            ended.unwrap();
            seen
        })
        .collect()
}

/// The largest relative difference between two runs' losses.
fn difference(one: &Seen, other: &Seen) -> f64 {
    assert_eq!(one.losses.len(), other.losses.len());
    let pairs = one.losses.iter().zip(&other.losses);
    let relative = |(a, b): (&f64, &f64)| (a / b - 1.0).abs();
    pairs.map(relative).fold(0.0, f64::max)
}

/// Twenty steps in f32, of low-rank updates with and without dropout, and of all weights; and how far losses may be apart.
/// The more is trained, the sooner another order of sums shows.
fn long_cases() -> Vec<(&'static str, String, f64)> {
    let lora = &cases()[0].1;
    let long = |settings: &str| {
        settings
            .replace("steps = 6", "steps = 20")
            .replace("save_every = 2", "save_every = 1")
    };
    vec![
        ("adapter", long(lora), 1e-6),
        (
            "adapter",
            long(&lora.replace("dropout = 0.1", "dropout = 0.0")),
            1e-6,
        ),
        ("model", long(&cases()[4].1), 5e-6),
    ]
}

#[test]
fn sums_of_each_rank_differ_by_the_order_of_sums_alone() {
    for (kind, settings, most) in long_cases() {
        let place = place(kind);
        let recipe = recipe(&place, &settings);
        let expected = fits(&recipe, &place.path("slots"), 2, "exchange=slots").remove(0);
        for (n, layout) in [(2, "exchange=rows"), (4, "ep=2,exchange=rows")] {
            let run = place.path(&format!("rows{n}"));
            let seen = fits(&recipe, &run, n, layout);
            assert!(seen.iter().all(|rank| *rank == seen[0]), "{layout}");
            let found = difference(&seen[0], &expected);
            assert!(
                found < most && found > 0.0,
                "{settings}{layout}: {found:.1e}"
            );
            for (name, apart) in gradients_apart(&place.path("slots"), &run) {
                assert!(apart < 1e-5, "{layout}: gradient of {name}: {apart:.1e}");
            }
        }
    }
}

/// Sums that are rounded to bf16 on their way move losses by as much as products in bf16 do. In FP8 rows are rounded too, and
/// another order of sums alone moves later losses by 4e-2.
#[test]
fn rounded_rows_and_sums_stay_near() {
    for (case, most) in [(0, 5e-3), (5, 1e-1)] {
        let (kind, settings) = &cases()[case];
        let place = place(kind);
        let recipe = recipe(&place, settings);
        let expected = fits(&recipe, &place.path("f32"), 2, "exchange=rows").remove(0);
        let found = fits(&recipe, &place.path("bf16"), 2, "wire=bf16").remove(0);
        let apart = difference(&found, &expected);
        assert!(apart > 1e-6 && apart < most, "{settings}{apart:.1e}");
        let first = (found.losses[0] / expected.losses[0] - 1.0).abs();
        assert!(first < 5e-4, "{settings}{first:.1e}");
    }
}

/// How far the first steps' gradients are apart, tensor by tensor: the first moments are a tenth of them.
fn gradients_apart(one: &Path, other: &Path) -> Vec<(String, f64)> {
    let name = "checkpoint-1/optimizer.safetensors";
    let [one, other] = [one, other].map(|run| Safetensors::open(&run.join(name)).unwrap());
    let moments = one.tensors().iter();
    let moments = moments.filter(|tensor| tensor.name.to_string().starts_with("moment1/"));
    let apart = moments.map(|tensor| {
        let [a, b] =
            [&one, &other].map(|file| file.tensor(&tensor.name).unwrap().to_f32().unwrap());
        let norm = |values: &mut dyn Iterator<Item = f32>| {
            values
                .map(|value| f64::from(value).powi(2))
                .sum::<f64>()
                .sqrt()
        };
        let apart = norm(&mut a.iter().zip(&b).map(|(a, b)| a - b));
        (
            tensor.name.to_string(),
            apart / norm(&mut a.iter().copied()).max(1e-12),
        )
    });
    apart.collect()
}

/// Relative error of the first gradient's norm.
const NORM: f64 = 1e-4;

/// The norm of a golden's first gradient, from those of its tensors.
fn golden_norm(name: &str, key: &str) -> f64 {
    let json = std::fs::read_to_string(super::goldens::path(name).join("golden.json")).unwrap();
    let json: serde_json::Value = serde_json::from_str(&json).unwrap();
    let norms = match key {
        "full_ft" => &json["grad_norms"],
        adapter => &json[adapter]["grad_norms"],
    };
    let squares = norms.as_object().unwrap().values();
    squares
        .map(|norm| norm.as_f64().unwrap().powi(2))
        .sum::<f64>()
        .sqrt()
}

#[test]
fn shared_out_experts_follow_the_golden_curve() {
    for (name, key, settings) in [
        ("deepseek_v2_lite", "full_ft", "method = \"full\"\n"),
        ("deepseek_v3", "full_ft", "method = \"full\"\n"),
        ("deepseek_v2_lite", "lora_peft", "method = \"lora\"\n"),
        ("deepseek_v3", "lora_peft", "method = \"lora\"\n"),
    ] {
        let place = Place::new(name);
        let adapter = match key {
            "lora_peft" => format!(
                "adapter = {:?}\n",
                super::goldens::path(name).join("adapter_peft")
            ),
            _ => String::new(),
        };
        let train = format!(
            "[train]\n{settings}steps = 11\nbatch_size = 1\naccumulate = 2\nshuffle = false\n"
        );
        let recipe = place.recipe(&format!("# {name}\n{adapter}"), &train);
        for layout in ["exchange=slots", "exchange=rows"] {
            let seen = fits(&recipe, &place.path(layout), 2, &format!("ep=2,{layout}")).remove(0);
            let losses = seen.bits.chunks(2).map(|step| f64::from_bits(step[0]));
            let what = format!("{name} {key} {layout}");
            assert_curve(
                &losses.collect::<Vec<_>>(),
                &expected_curve(name, key),
                &what,
            );
            let (found, expected) = (f64::from_bits(seen.bits[1]), golden_norm(name, key));
            let apart = (found / expected - 1.0).abs();
            assert!(apart < NORM, "{what}: {found}, expected {expected}");
        }
    }
}

/// The only trained expert is one rank's, and the others have nothing to differentiate below it; so too for an update in the
/// first layer, whose input nobody differentiates.
#[test]
fn ranks_without_anything_to_train_do_not_hang() {
    let both = "unfrozen_parameters = [\"layers.2.mlp.experts.3\", \"self_attn\"]\n";
    let last = "unfrozen_parameters = [\"layers.2.mlp.experts.3\"]\n";
    let first = "[lora]\ntarget = [\"layers.1.mlp.experts.3\"]\n";
    for (kind, settings) in [
        ("model", cases()[6].1.replace(both, last)),
        ("adapter", cases()[0].1.replace("[lora]\n", first)),
        ("adapter", cases()[1].1.replace("[lora]\n", first)),
    ] {
        let (place, recipe, expected) = run_alone(kind, &settings);
        let (alone, four) = (place.path("1"), place.path("4"));
        for seen in fits(&recipe, &four, 4, "ep=4,exchange=slots") {
            assert_eq!(seen, expected, "{settings}");
        }
        assert_same_files(&alone, &four, &[kind, "checkpoint-6"], &settings);
    }
}

/// An engine on which the last two rows of a message change places, or the last one is lost.
#[derive(Debug)]
struct Spoiled {
    wire: threads::ThreadRank,
    spoil: fn(&mut [u8], usize),
}

impl Wire for Spoiled {
    fn rank(&self) -> usize {
        self.wire.rank()
    }

    fn ranks(&self) -> usize {
        self.wire.ranks()
    }

    fn post(&self, name: &str, messages: Vec<Vec<u8>>) -> Arrival {
        /// Bytes of a row of the golden.
        const ROW: usize = 4 * 192;
        let arrival = self.wire.post(name, messages);
        let (spoil, is_layer) = (self.spoil, name == "rows of experts of layer 2, part 0");
        Box::new(move || {
            let mut messages = arrival()?;
            let spoiled = messages.iter_mut();
            let spoiled = spoiled.filter(|message| is_layer && message.len() > 3 * ROW);
            spoiled.for_each(|message| spoil(message, ROW));
            Ok(messages)
        })
    }
}

#[test]
fn spoiled_rows_change_a_run() {
    let (kind, settings) = &cases()[0];
    let place = place(kind);
    let recipe = recipe(&place, settings);
    let expected = fits(&recipe, &place.path("right"), 2, "exchange=slots").remove(0);
    let swap = |message: &mut [u8], row: usize| {
        let (rest, last) = message.split_at_mut(message.len() - row);
        let at = rest.len() - row;
        rest[at..].swap_with_slice(last);
    };
    let lose = |message: &mut [u8], row: usize| {
        let at = message.len() - row;
        message[at..].fill(0);
    };
    let spoils: [fn(&mut [u8], usize); 2] = [swap, lose];
    for (i, spoil) in spoils.into_iter().enumerate() {
        for layout in ["exchange=slots", "exchange=rows"] {
            let wires = threads::ranks(2, WAIT).into_iter();
            let wires = wires.map(|wire| Spoiled { wire, spoil });
            let run = place.path(&format!("{layout}{i}"));
            let (seen, _) = fit_over(&recipe, &run, wires.collect(), layout, None).remove(0);
            let apart = difference(&seen, &expected);
            assert!(apart > 1e-6, "{layout} {i}: {apart:.1e}");
        }
    }
}
