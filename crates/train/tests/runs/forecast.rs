//! What a forecast counts before a model is opened, against the model that is opened then.

use std::cell::Cell;

use kernels::device;
use moeforge_train::{Forecast, HeapUse, Session, SessionOptions};

use crate::Place;

/// Trained values by a forecast, and by the session.
fn counts(name: &str, settings: &str) -> [f64; 2] {
    let place = Place::new(name);
    let recipe = place.recipe(&format!("# {name}\n"), settings);
    let predicted = Cell::new(0.0);
    let approve = |forecast: &Forecast<'_>| {
        let plan = forecast.plan();
        predicted.set((plan.weights - forecast.frozen.held + plan.updates) / 4.0);
        Ok(HeapUse::Fast)
    };
    let device = device::of_tests();
    let options = SessionOptions {
        approve: &approve,
        ..SessionOptions::new(&device, &|model| Ok(model.into()))
    };
    let session = Session::open_with(recipe, options).unwrap();
    [predicted.get(), session.trained_parameters() as f64]
}

#[test]
fn trained_values_are_counted_before_a_model_is_opened() {
    let families = [
        "deepseek_v2_lite",
        "deepseek_v3",
        "qwen2_distill",
        "llama_distill",
    ];
    let any = [
        "[lora]\nrank = 3\n",
        "[lora]\nuse_dora = true\ntarget = [\"self_attn\"]\n",
        "[lora]\ntarget = [\"o_proj\", \"up_proj\"]\nexclude = [\"layers.0\"]\n",
        "[train]\nmethod = \"full\"\n",
        "[train]\nmethod = \"full\"\nunfrozen_parameters = [\"norm\", \"layers.1\"]\n",
    ];
    for name in families {
        for settings in any {
            let [predicted, found] = counts(name, settings);
            assert_eq!(predicted, found, "{name}: {settings}");
        }
    }
    let of_mixtures = [
        "[lora]\ntarget = [\"experts\"]\nexperts_share = \"outer\"\n",
        "[lora]\ntarget = [\"layers.2.mlp.experts.3\", \"shared_experts\"]\n",
        "[train]\nmethod = \"full\"\nunfrozen_parameters = [\"layers.2.mlp.experts.3\", \"mlp.gate\"]\n",
    ];
    for name in &families[..2] {
        for settings in of_mixtures {
            let [predicted, found] = counts(name, settings);
            assert_eq!(predicted, found, "{name}: {settings}");
        }
    }
}
