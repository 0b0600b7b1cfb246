//! How often a run waits for its device, and the memory that it keeps there.

use kernels::device;
use moeforge_train::{Event, RunDir};

use super::preferences::preferences;
use super::{Place, open};

/// Steps after which nothing new is compiled, allocated or audited.
const WARM_UP: usize = 3;

#[test]
fn a_step_reads_the_device_once_and_a_run_keeps_no_more_memory() {
    let common = "steps = 8\nbatch_size = 1\naccumulate = 2\nbalance_loss = 0.01\n";
    let lora = format!("[lora]\ndropout = 0.1\n[train]\nmethod = \"lora\"\n{common}");
    let full = format!("[train]\nmethod = \"full\"\nbias_update_speed = 0.001\n{common}");
    let block = format!("{lora}checkpointing = \"block\"\n");
    let dpo = format!("{lora}loss = \"dpo\"\n");
    for (settings, is_dpo) in [(lora, false), (full, false), (block, false), (dpo, true)] {
        let place = Place::new("deepseek_v3");
        if is_dpo {
            preferences(&place);
        }
        let recipe = place.recipe("# deepseek_v3\n", &settings);
        let run = RunDir::create(&place.path("run"), &recipe).unwrap();
        let (mut reads, mut reserved) = (Vec::new(), Vec::new());
        let (mut session, on) = (open(recipe), device::of_tests());
        let mut note = |event: &Event| {
            if let Event::Step(_) = event {
                reads.push(device::reads());
                reserved.extend(device::reserved_bytes(&on));
            }
        };
        session.fit(&run, &mut note).unwrap();
        assert_eq!(reads.len(), 8);
        assert!(
            reads.is_sorted_by(|a, b| a + 1 == *b),
            "{settings}{reads:?}"
        );
        // The first steps reserve what all need; less than a hundredth comes and goes.
        if let Some(warm) = reserved.get(WARM_UP) {
            let most = warm + warm / 100;
            let keeps_no_more = reserved[WARM_UP..].iter().all(|now| *now <= most);
            assert!(keeps_no_more, "{settings}{reserved:?}");
        }
    }
}
