//! Weights that move from their file into memory while an engine is at work.
//!
//! Products read weights fastest as [`Matrix::repack`] puts them, but to copy a model takes as long as many tokens do. So an
//! engine begins with the bytes of the file, and copies a piece of them at a time between passes, for about as long as these
//! take: nobody waits for the first token, and soon all passes are fast. Products have the same bits before and after.

use std::sync::Arc;
use std::time::{Duration, Instant};

use kernels::{ExpertCache, FileAccess, Matrix};
use model::{Model, Mtp};

use crate::Engine;

/// Enough for pages of 2 MiB, so little that no token waits long.
const PIECE: usize = 16 << 20;

/// How far that is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Layout {
    /// Bytes that are copied at a time at least.
    piece: usize,
    /// Matrices that are to be copied, of those that [`for_each`] visits.
    wanted: usize,
    /// Matrices that are copied.
    done: usize,
    /// How long the last pass took.
    pub(crate) last_pass: Duration,
}

impl Default for Layout {
    fn default() -> Self {
        Self {
            piece: PIECE,
            wanted: 0,
            done: 0,
            last_pass: Duration::ZERO,
        }
    }
}

impl Engine {
    /// Has weights copied into memory, where products read them fastest, between steps to come: the first that need so many
    /// bytes at most. What is held of their files is given back. For no more than memory has room for: a file's bytes can be
    /// dropped and read again, copies cannot.
    pub fn keep_in_memory(&mut self, room: usize) {
        let (mut wanted, mut bytes) = (0, 0_usize);
        for_each(&mut self.model, self.mtp.as_mut(), &mut |at, matrix| {
            bytes = bytes.saturating_add(matrix.size_bytes());
            if bytes <= room {
                wanted = at + 1;
            }
        });
        self.layout.wanted = wanted;
    }

    /// [`Self::keep_in_memory`] of all that every token needs; of the experts those stay in memory that were used last, as many as
    /// so many bytes hold. For a model that memory has no room for. So many of a token's experts are asked for before a layer
    /// chooses them; none says half of those that it chooses.
    pub fn cache_experts(&mut self, budget: usize, n_prefetch: Option<usize>) {
        let file = FileAccess {
            advise_willneed: checkpoint::advise_willneed,
            read: checkpoint::read,
        };
        let cache = Arc::new(ExpertCache::new(budget, self.compute, file));
        self.model.cache_experts(&cache, n_prefetch);
        self.keep_in_memory(usize::MAX);
    }

    /// Copies at once what would be copied between steps. Says how many bytes are copied, of how many that are to be.
    pub fn repack(&mut self, on_bytes: &mut dyn FnMut(usize, usize)) {
        let (first, wanted) = (self.layout.done, self.layout.wanted);
        let (mut total, mut done) = (0, 0);
        for_each(&mut self.model, self.mtp.as_mut(), &mut |at, matrix| {
            if (first..wanted).contains(&at) {
                total += matrix.size_bytes();
            }
        });
        while self.layout.done < wanted {
            done += self.repack_piece();
            on_bytes(done, total);
        }
    }

    /// Copies a piece, if there is one, and goes on for about so long.
    pub(crate) fn repack_for(&mut self, time: Duration) {
        let started = Instant::now();
        while self.layout.done < self.layout.wanted {
            self.repack_piece();
            if started.elapsed() >= time {
                return;
            }
        }
    }

    /// Copies some weights; returns their bytes.
    fn repack_piece(&mut self) -> usize {
        let Layout { wanted, done, .. } = self.layout;
        let (mut piece, mut bytes, least) = (Vec::new(), 0, self.layout.piece);
        for_each(&mut self.model, self.mtp.as_mut(), &mut |at, matrix| {
            if (done..wanted).contains(&at) && bytes < least {
                bytes += matrix.size_bytes();
                piece.push(matrix.clone());
            }
        });
        let mut copied = Vec::new();
        Matrix::repack(&mut piece, self.compute, &mut |stored| {
            copied.push(stored.clone());
        });
        let end = done + piece.len();
        let put = |model: &mut Model, mtp: Option<&mut Mtp>| {
            for_each(model, mtp, &mut |at, matrix| {
                if (done..end).contains(&at) {
                    *matrix = piece[at - done].clone();
                }
            });
        };
        put(&mut self.model, self.mtp.as_mut());
        // They share the weights of `model`.
        self.adapted.iter_mut().for_each(|model| put(model, None));
        // Several together: reading a part brings some of what lies beside it back.
        let copied = copied.iter();
        copied.for_each(|stored| checkpoint::advise_dontneed(stored.bytes()));
        self.layout.done = end;
        bytes
    }
}

/// Visits weights with their numbers, in the order in which they are copied: what every token needs, as it does, so that what
/// lies behind a weight is mostly what is read next; then experts, if there is no cache for them; then what guesses tokens.
fn for_each(model: &mut Model, mtp: Option<&mut Mtp>, visit: &mut dyn FnMut(usize, &mut Matrix)) {
    let mut at = 0;
    let visit = &mut |matrix: &mut Matrix| {
        visit(at, matrix);
        at += 1;
    };
    model.for_each_common(visit);
    if model.expert_traffic().is_none() {
        model.for_each_expert(visit);
    }
    if let Some(mtp) = mtp {
        mtp.for_each_frozen(visit);
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use burn::tensor::Device;
    use kernels::Format;
    use model::Compute;

    use super::*;
    use crate::{GenerateConfig, SampleConfig};

    /// A golden model as it is stored, for products in int8.
    fn engine(name: &str) -> Engine {
        let goldens = Path::new(env!("CARGO_MANIFEST_DIR")).join("../../tests/goldens/gguf");
        Engine::open(&goldens.join(name), Compute::Int8, Device::flex()).unwrap()
    }

    /// How many matrices are of blocks in strips, and of how many.
    fn strips(engine: &mut Engine) -> [usize; 2] {
        let mut counts = [0; 2];
        for_each(&mut engine.model, None, &mut |_, matrix| {
            let keys = matrix.split_kv_b().map(|heads| heads.keys(0));
            let format = keys.as_ref().unwrap_or(matrix).format();
            counts[0] += usize::from(matches!(format, Format::Interleaved(_)));
            counts[1] += usize::from(matches!(format, Format::Interleaved(_) | Format::Ggml(_)));
        });
        counts
    }

    #[test]
    fn texts_are_the_same_while_weights_move() {
        let config = GenerateConfig {
            max_tokens: 24,
            sample: SampleConfig::greedy(),
            stop_ids: Vec::new(),
            logprobs: Some(2),
        };
        for (name, in_blocks) in [
            ("deepseek_v3_q8_0.gguf", true),
            ("llama_q4_1.gguf", true),
            ("deepseek_v2_lite_bf16.gguf", false),
        ] {
            let prompts = [vec![1, 5, 9, 200], vec![7; 3], vec![0, 3]];
            let mut stays = engine(name);
            let expected = stays.generate_all(&prompts, &config, 3, &mut |_, _| {});
            let (expected, counts) = (expected.unwrap(), strips(&mut stays));
            assert!(
                counts[0] == 0 && (counts[1] > 4) == in_blocks,
                "{name} {counts:?}"
            );

            let mut moves = engine(name);
            // First a part, which is all that there is room for, then all.
            let half = moves.size_bytes() / 2;
            moves.keep_in_memory(half);
            moves.repack(&mut |_, _| ());
            let part = moves.layout.done;
            assert!(part > 5, "{name}");
            let found = moves.generate_all(&prompts, &config, 3, &mut |_, _| {});
            assert_eq!(found.unwrap()[1].logprobs, expected[1].logprobs, "{name}");
            assert_eq!(moves.layout.done, part, "{name}");
            moves.keep_in_memory(usize::MAX);
            moves.layout.piece = 1;
            let found = moves.generate_all(&prompts, &config, 3, &mut |_, _| {});
            for (found, expected) in found.unwrap().iter().zip(&expected) {
                assert_eq!(found.token_ids, expected.token_ids, "{name}");
                assert_eq!(found.logprobs, expected.logprobs, "{name}");
            }
            assert!(moves.layout.done > part, "{name}");
            moves.repack(&mut |_, _| ());
            assert_eq!(moves.layout.done, moves.layout.wanted, "{name}");
            assert_eq!(strips(&mut moves), [counts[1]; 2], "{name}");
            let again = moves.generate_all(&prompts, &config, 3, &mut |_, _| {});
            assert_eq!(again.unwrap()[0].logprobs, expected[0].logprobs, "{name}");
        }
    }
}
