//! Scores of given tokens: the same alone, together, and from whole logits.

#![expect(clippy::unwrap_used, reason = "helpers of tests fail loudly")]

#[path = "../../../tests/goldens/paths.rs"]
mod goldens;

use kernels::device;
use model::Compute;
use moeforge_infer::{Engine, Error, ScoreConfig, ScoreRequest, Scores, score};

/// f32 sums in another order.
const LOGPROB: f64 = 1e-4;

fn engine(name: &str) -> Engine {
    Engine::open(&goldens::path(name), Compute::F32, device::of_tests()).unwrap()
}

fn run(
    engine: &Engine,
    requests: &[ScoreRequest],
    pass_tokens: usize,
    top: usize,
) -> Result<Scores, Error> {
    let config = ScoreConfig {
        compute: Compute::F32,
        pass_tokens,
        top,
    };
    score(&engine.model, requests, config, &mut |_, _| {})
}

/// Sequences with common beginnings of several lengths, one of them twice, one with nothing to score.
fn requests() -> Vec<ScoreRequest> {
    let ids = |end: &[u32]| [&[5, 9, 11, 40, 41, 42, 9, 7][..], end].concat();
    let mut requests: Vec<ScoreRequest> = [
        &[3, 4, 90][..],
        &[3, 4, 8],
        &[3, 17],
        &[3, 4, 90],
        &[60; 70],
    ]
    .map(|end| ScoreRequest::of_last(ids(end), end.len()))
    .to_vec();
    requests.push(ScoreRequest::of_last(vec![5, 9], 0));
    requests.push(ScoreRequest {
        ids: ids(&[1, 2, 3]),
        scored: vec![1, 4, 10],
    });
    requests
}

#[test]
fn a_request_has_the_scores_that_it_has_alone() {
    for name in ["deepseek_v3", "llama_distill"] {
        let (engine, requests) = (engine(name), requests());
        let alone = run(&engine, &requests, 1, 0).unwrap();
        let together = run(&engine, &requests, 10_000, 0).unwrap();
        let from_logits = run(&engine, &requests, 30, 3).unwrap();
        assert!(together.read < alone.read && together.asked == alone.asked);
        for (number, request) in requests.iter().enumerate() {
            let of = |all: &Scores| all.scores[number].clone();
            let (alone, together, logits) = (of(&alone), of(&together), of(&from_logits));
            assert_eq!(
                [alone.len(), together.len(), logits.len()],
                [request.scored.len(); 3]
            );
            for (at, first) in alone.iter().enumerate() {
                for other in [&together[at], &logits[at]] {
                    let difference = (first.logprob - other.logprob).abs();
                    assert!(
                        difference < LOGPROB,
                        "{name} {number} {at}: {first:?} {other:?}"
                    );
                    assert_eq!(first.is_greedy, other.is_greedy, "{name} {number} {at}");
                }
                let target = request.ids[request.scored[at]];
                assert_eq!(logits[at].top.len(), 3);
                assert_eq!(logits[at].is_greedy, logits[at].top[0].0 == target);
            }
        }
    }
}

#[test]
fn requests_that_do_not_fit_the_model_are_refused() {
    let engine = engine("llama_distill");
    let problem = |request| run(&engine, &[request], 100, 0).unwrap_err().to_string();
    assert_eq!(
        problem(ScoreRequest::of_last(vec![1, 9999], 1)),
        "request 0: expected token ids below the vocabulary size 320, found 9999"
    );
    assert_eq!(
        problem(ScoreRequest::of_last(vec![1; 1026], 1)),
        "request 0: expected at most the model's 1024 positions, found 1025 tokens"
    );
}
