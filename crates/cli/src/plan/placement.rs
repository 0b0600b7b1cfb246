//! Where weights stay while a model generates: in memory, or partly on disk.

use model::ModelConfig;
use model::footprint::WeightBytes;

/// Where weights stay. The embedding is left out: a token reads one row of it.
#[derive(Clone, Copy, Debug, PartialEq)]
pub(crate) enum WeightPlacement {
    /// All in memory.
    Memory,
    /// Those that every token reads in memory, with a cache for the experts that were used last; the other experts on disk.
    ExpertsOnDisk {
        /// Bytes of the cache.
        cache: f64,
    },
    /// Not even all of those that every token reads in memory.
    Disk {
        /// Bytes of those that are.
        held: f64,
    },
}

impl WeightPlacement {
    /// The placement of weights that every token reads, and of experts, in `room` bytes of memory.
    pub(crate) fn of(common: f64, experts: f64, room: f64) -> Self {
        if common + experts <= room {
            Self::Memory
        } else if common < room && experts > 0.0 {
            let cache = room - common;
            Self::ExpertsOnDisk { cache }
        } else {
            Self::Disk { held: room }
        }
    }

    /// What is read from disk for one token, if it chooses experts evenly: those that were used last are chosen again more often.
    pub(crate) fn bytes_read(self, weights: &WeightBytes, config: &ModelConfig) -> f64 {
        let chosen = weights.chosen(config);
        match self {
            Self::Memory => 0.0,
            Self::ExpertsOnDisk { cache } => chosen * (1.0 - cache / weights.experts),
            Self::Disk { held } => weights.common() - held + chosen,
        }
    }
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use model::export::WeightFormat;
    use model::footprint::{StoredAs, stored_bytes};

    use super::*;

    #[test]
    fn what_every_token_reads_comes_first() {
        assert_eq!(
            WeightPlacement::of(10.0, 90.0, 100.0),
            WeightPlacement::Memory
        );
        assert_eq!(
            WeightPlacement::of(10.0, 90.0, 40.0),
            WeightPlacement::ExpertsOnDisk { cache: 30.0 }
        );
        assert_eq!(
            WeightPlacement::of(10.0, 90.0, 10.0),
            WeightPlacement::Disk { held: 10.0 }
        );
        assert_eq!(
            WeightPlacement::of(10.0, 0.0, 9.0),
            WeightPlacement::Disk { held: 9.0 }
        );
    }

    #[test]
    fn less_room_means_more_is_read() {
        let json = include_str!("published/DeepSeek-V2-Lite.json");
        let json = serde_json::from_str(json).unwrap();
        let config = ModelConfig::from_json(&json, Path::new("config.json")).unwrap();
        let weights = stored_bytes(&config, &StoredAs::Folder(WeightFormat::Bf16));
        let read = |room: f64| {
            let placement = WeightPlacement::of(weights.common(), weights.experts, room);
            placement.bytes_read(&weights, &config)
        };
        let rooms = [1.0, 0.8, 0.5, 0.1, 0.0].map(|share| read(share * weights.all()));
        assert_eq!(rooms[0], 0.0);
        assert!(rooms.windows(2).all(|pair| pair[0] < pair[1]), "{rooms:?}");
        assert_eq!(rooms[4], weights.per_token(&config));
        // 6 of 64 experts, of which a quarter or so is cached.
        let half = read(weights.common() + 0.25 * weights.experts);
        assert!((half / (weights.experts * 6.0 / 64.0 * 0.75) - 1.0).abs() < 1e-9);
    }
}
