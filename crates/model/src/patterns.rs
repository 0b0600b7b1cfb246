//! Patterns that choose among a model's modules and tensors by their paths.

/// Whether a pattern chooses a module.
///
/// A pattern is some consecutive components of the path (`q_a_proj`, `mlp.down_proj`, `experts`, `layers.3`), with `*`
/// for anything within one component. `all-linear` chooses every linear layer and expert except the router and the
/// output head, and not the embedding.
pub fn matches(pattern: &str, module: &str) -> bool {
    let parts: Vec<&str> = module.split('.').collect();
    if pattern == "all-linear" {
        return !matches!(parts.last(), Some(&"gate" | &"lm_head" | &"embed_tokens"));
    }
    let wanted: Vec<&str> = pattern.split('.').collect();
    parts.windows(wanted.len()).any(|run| {
        run.iter()
            .zip(&wanted)
            .all(|(part, wanted)| matches_part(wanted, part))
    })
}

fn matches_part(pattern: &str, part: &str) -> bool {
    match pattern.split_once('*') {
        None => pattern == part,
        Some((head, rest)) => match part.strip_prefix(head) {
            Some(tail) => (0..=tail.len())
                .filter(|at| tail.is_char_boundary(*at))
                .any(|at| matches_part(rest, &tail[at..])),
            None => false,
        },
    }
}

#[cfg(test)]
mod tests {
    use super::matches;

    #[test]
    fn patterns_are_runs_of_path_components() {
        let expert = "model.layers.3.mlp.experts.down_proj";
        let shared = "model.layers.3.mlp.shared_experts.down_proj";
        for (pattern, module, expected) in [
            ("down_proj", expert, true),
            ("experts", expert, true),
            ("experts", shared, false),
            ("experts.down_proj", shared, false),
            ("layers.3", expert, true),
            ("layers.*.mlp.shared*", shared, true),
            ("*_proj", shared, true),
            ("down", shared, false),
            ("gate", "model.layers.3.mlp.gate", true),
            ("gate", "model.layers.3.mlp.shared_experts.gate_proj", false),
            ("all-linear", "model.layers.3.mlp.gate", false),
            ("all-linear", "lm_head", false),
            ("all-linear", "model.embed_tokens", false),
            ("all-linear", expert, true),
        ] {
            assert_eq!(matches(pattern, module), expected, "{pattern} on {module}");
        }
    }
}
