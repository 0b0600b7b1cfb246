//! Rows as messages: which of a micro-batch's go to which rank, and the sums of those that come back.

use std::ops::Range;

use half::bf16;
use kernels::SlotPart;
use kernels::fp8::{Scales, TILE_GROUP, Tiles, encode_tiles};
use parallel::{MessageReader, MessageWriter, ShortMessage};

use super::{ExchangeKind, RowWire};

impl RowWire {
    /// Writes rows.
    pub(super) fn write(self, message: &mut MessageWriter, rows: &[f32]) {
        match self {
            Self::F32 => _ = message.values(rows),
            Self::Bf16 => {
                let halves = rows.iter().map(|value| bf16::from_f32(*value));
                let bytes: Vec<u8> = halves.flat_map(bf16::to_le_bytes).collect();
                message.bytes(&bytes);
            }
        }
    }

    /// Reads rows.
    pub(super) fn read(self, reader: &mut MessageReader<'_>) -> Result<Vec<f32>, ShortMessage> {
        match self {
            Self::F32 => reader.values(),
            Self::Bf16 => {
                let halves = reader.bytes()?.as_chunks::<2>().0.iter();
                Ok(halves
                    .map(|bytes| bf16::from_le_bytes(*bytes).to_f32())
                    .collect())
            }
        }
    }
}

/// A micro-batch's rows by token, in the form in which they travel.
pub(super) enum OutgoingRows {
    /// As they are.
    F32 { values: Vec<f32>, width: usize },
    /// In tiles of 1 × 128, as products in FP8 round them: doing so once more changes nothing.
    Fp8(Tiles),
}

impl OutgoingRows {
    /// `scales` are those of the products that read them, if these are in FP8.
    pub(super) fn new(values: Vec<f32>, shape: [usize; 2], scales: Option<Scales>) -> Self {
        match scales {
            Some(kind) => Self::Fp8(encode_tiles(&values, shape, [1, TILE_GROUP], kind)),
            None => Self::F32 {
                values,
                width: shape[1],
            },
        }
    }

    /// Writes those of some tokens.
    pub(super) fn write(&self, message: &mut MessageWriter, tokens: &[usize]) {
        match self {
            Self::F32 { values, width } => {
                message.count(0).values(&gather(values, *width, tokens));
            }
            Self::Fp8(tiles) => {
                let width = tiles.dims()[1];
                message.count(1);
                message.bytes(&gather(&tiles.codes, width, tokens));
                message.values(&gather(&tiles.scales, width.div_ceil(TILE_GROUP), tokens));
            }
        }
    }

    /// Reads rows of `width` values, as f32.
    pub(super) fn read(
        reader: &mut MessageReader<'_>,
        width: usize,
    ) -> Result<Vec<f32>, ShortMessage> {
        if reader.count()? == 0 {
            return reader.values();
        }
        let (codes, scales) = (reader.bytes()?.to_vec(), reader.values()?);
        let tiles = Tiles::of_rows(codes, scales, width);
        let [rows, _] = tiles.dims();
        let mut values = vec![0.0; rows * width];
        tiles.decode(0..rows, &mut values);
        Ok(values)
    }
}

/// The rows of some tokens.
fn gather<T: Copy>(values: &[T], width: usize, tokens: &[usize]) -> Vec<T> {
    let mut rows = Vec::with_capacity(tokens.len() * width);
    for token in tokens {
        rows.extend_from_slice(&values[token * width..][..width]);
    }
    rows
}

/// The rows that a micro-batch sends to one rank.
#[derive(Debug)]
pub(super) struct Sent {
    /// The token of each row.
    pub(super) tokens: Vec<usize>,
    /// The slots that each row brings, as many for all of them.
    pub(super) slots: Vec<Option<usize>>,
    /// The expert of each, by its place in the rank's range; as many as it holds for none.
    pub(super) experts: Vec<i32>,
    pub(super) part: SlotPart,
}

/// Where a micro-batch's slots go, by the routers' choice.
pub(super) struct SentPlan {
    pub(super) top_k: usize,
    pub(super) tokens: usize,
    /// Slots sorted by expert.
    pub(super) order: Vec<usize>,
    pub(super) offsets: Vec<usize>,
    /// See [`SlotPart`].
    pub(super) is_recomputed: bool,
}

impl SentPlan {
    /// The rows that go to the rank with some of the experts.
    pub(super) fn rows(&self, experts: Range<usize>, kind: ExchangeKind) -> Sent {
        let places = self.offsets[experts.start]..self.offsets[experts.end];
        let part = SlotPart {
            first: places.start,
            tokens: self.tokens,
            is_recomputed: self.is_recomputed,
        };
        let slots = self.order[places].iter();
        let served = (experts.clone())
            .flat_map(|expert| {
                let n = self.offsets[expert + 1] - self.offsets[expert];
                std::iter::repeat_n((expert - experts.start) as i32, n)
            })
            .zip(slots);
        match kind {
            ExchangeKind::Slots => {
                let (experts, slots): (Vec<i32>, Vec<usize>) = served.unzip();
                Sent {
                    tokens: slots.iter().map(|slot| slot / self.top_k).collect(),
                    slots: slots.into_iter().map(Some).collect(),
                    experts,
                    part,
                }
            }
            ExchangeKind::Rows => self.one_row_a_token(served, experts.len(), part),
        }
    }

    /// A row for each token with any of a rank's experts, and a place in it for each of the token's slots.
    fn one_row_a_token<'a>(
        &self,
        served: impl Iterator<Item = (i32, &'a usize)>,
        n_experts: usize,
        part: SlotPart,
    ) -> Sent {
        let mut experts_of = vec![n_experts as i32; self.tokens * self.top_k];
        served.for_each(|(expert, slot)| experts_of[*slot] = expert);
        let mut sent = Sent {
            tokens: vec![],
            slots: vec![],
            experts: vec![],
            part,
        };
        for (token, experts) in experts_of.chunks(self.top_k).enumerate() {
            let is_here = |expert: &i32| (*expert as usize) < n_experts;
            if experts.iter().any(is_here) {
                sent.tokens.push(token);
                sent.experts.extend(experts);
                let slots = (token * self.top_k..).zip(experts);
                (sent.slots).extend(slots.map(|(slot, expert)| is_here(expert).then_some(slot)));
            }
        }
        sent
    }
}

impl Sent {
    /// The rows of some values by token, in the order in which they are sent.
    pub(super) fn gather(&self, values: &[f32], tokens: usize) -> Vec<f32> {
        gather(values, values.len() / tokens.max(1), &self.tokens)
    }

    pub(super) fn message(
        &self,
        rows: &OutgoingRows,
        weights: &[f32],
        dropout_seed: Option<u64>,
    ) -> Vec<u8> {
        let mut message = MessageWriter::default();
        message
            .count(u64::from(dropout_seed.is_some()))
            .count(dropout_seed.unwrap_or(0))
            .count(self.part.first as u64)
            .count(self.part.tokens as u64)
            .count(u64::from(self.part.is_recomputed))
            .count(self.tokens.len() as u64);
        let experts: Vec<u8> = (self.experts.iter())
            .flat_map(|expert| expert.to_le_bytes())
            .collect();
        let weight = |slot: &Option<usize>| slot.map_or(0.0, |slot| weights[slot]);
        let weights: Vec<f32> = self.slots.iter().map(weight).collect();
        message.bytes(&experts).values(&weights);
        rows.write(&mut message, &self.tokens);
        message.finish()
    }
}

/// The rows that a rank gets from another's micro-batch.
pub(super) struct Received {
    pub(super) dropout_seed: Option<u64>,
    pub(super) part: SlotPart,
    pub(super) rows: usize,
    pub(super) experts: Vec<i32>,
    pub(super) weights: Vec<f32>,
    pub(super) x: Vec<f32>,
}

impl Received {
    /// Reads rows of `width` values.
    pub(super) fn read(message: &[u8], width: usize) -> Result<Self, ShortMessage> {
        let mut reader = MessageReader::new(message);
        let is_dropping = reader.count()? == 1;
        let dropout_seed = Some(reader.count()?).filter(|_| is_dropping);
        let part = SlotPart {
            first: reader.count()? as usize,
            tokens: reader.count()? as usize,
            is_recomputed: reader.count()? == 1,
        };
        let rows = reader.count()? as usize;
        let experts = reader.bytes()?.as_chunks::<4>().0.iter();
        Ok(Self {
            dropout_seed,
            part,
            rows,
            experts: experts.map(|bytes| i32::from_le_bytes(*bytes)).collect(),
            weights: reader.values()?,
            x: OutgoingRows::read(&mut reader, width)?,
        })
    }
}

/// Adds the rows that came back, `[rows, width]` from each rank, to their tokens' sums: in the order of ranks, and of each
/// rank's rows. Returns what follows the rows of each.
pub(super) fn add_rows<'a>(
    sent: &[Sent],
    replies: &'a [Vec<u8>],
    size: usize,
    wire: RowWire,
) -> (Vec<f32>, Vec<MessageReader<'a>>) {
    let (mut sums, mut rest) = (vec![0.0; size], Vec::new());
    for (sent, reply) in sent.iter().zip(replies) {
        let mut reader = MessageReader::new(reply);
        if sent.tokens.is_empty() {
            rest.push(reader);
            continue;
        }
        let rows = wire.read(&mut reader);
        rest.push(reader);
        let rows = rows.expect("the ranks run one program");
        let width = rows.len() / sent.tokens.len();
        for (token, row) in sent.tokens.iter().zip(rows.chunks(width.max(1))) {
            let sum = &mut sums[token * width..][..width];
            sum.iter_mut().zip(row).for_each(|(sum, row)| *sum += *row);
        }
    }
    (sums, rest)
}
