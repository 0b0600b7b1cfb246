//! Runs that do not come to their end at once, or by another way.

use moeforge_train::{Error, Event, Host, Memory, RunDir};

use super::{Place, bytes, losses, open};

/// A machine that runs out of memory after some steps.
struct Shrinking {
    steps_left: u64,
}

impl Host for Shrinking {
    fn see(&mut self, event: &Event) {
        self.steps_left -= u64::from(matches!(event, Event::Step(_)));
    }

    fn memory(&mut self) -> Memory {
        let least = Memory::LEAST_AVAILABLE_BYTES;
        let available = if self.steps_left == 0 {
            least - 1
        } else {
            least
        };
        Memory {
            available_bytes: Some(available),
            peak_bytes: None,
            ..Memory::default()
        }
    }
}

#[test]
fn a_run_that_is_short_of_memory_saves_and_goes_on_to_the_same_bits() {
    let place = Place::new("deepseek_v3");
    let settings = "[lora]\ndropout = 0.1\n[train]\nmethod = \"lora\"\nsteps = 5\nbatch_size = 1\n";
    let recipe = place.recipe("# deepseek_v3\n", settings);
    let [whole, part] =
        ["whole", "part"].map(|name| RunDir::create(&place.path(name), &recipe).unwrap());
    losses(&mut open(recipe.clone()), &whole);

    let stopped = open(recipe.clone()).fit(&part, &mut Shrinking { steps_left: 3 });
    let error = stopped.unwrap_err();
    assert!(matches!(error, Error::LowMemory { step: 3, .. }), "{error}");
    let message = error.to_string();
    let expected = "the machine has 127 MiB of memory left, less than 128";
    assert!(message.contains(expected), "{message}");

    let mut session = open(recipe);
    assert_eq!(session.resume(&part).unwrap(), Some(3));
    assert_eq!(losses(&mut session, &part).len(), 2);
    for result in ["adapter", "checkpoint-5"] {
        let [whole, part] = ["whole", "part"].map(|run| bytes(&place.path(run).join(result)));
        assert_eq!(whole, part, "{result}");
    }
}

#[test]
fn layers_that_run_again_leave_the_same_bits() {
    for method in ["lora", "full"] {
        let place = Place::new("deepseek_v3");
        let result = |checkpointing: &str| {
            let settings = format!(
                "[lora]\ndropout = 0.1\n[train]\nmethod = \"{method}\"\nsteps = 4\nbatch_size = 1\naccumulate = 2\n\
                 balance_loss = 0.01\ncheckpointing = \"{checkpointing}\"\n"
            );
            let recipe = place.recipe("# deepseek_v3\n", &settings);
            let run = RunDir::create(&place.path(checkpointing), &recipe).unwrap();
            let losses = losses(&mut open(recipe), &run);
            let folder = if method == "lora" { "adapter" } else { "model" };
            (losses, bytes(&place.path(checkpointing).join(folder)))
        };
        let (plain, again) = (result("none"), result("block"));
        assert_eq!(plain.0, again.0, "{method}: losses");
        assert!(plain.1 == again.1, "{method}: weights differ");
    }
}
