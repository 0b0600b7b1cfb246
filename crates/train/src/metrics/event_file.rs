//! TensorBoard's event files.
//!
//! A file is a sequence of TFRecords: length, masked CRC of the length, content, masked CRC of the content, all
//! little-endian. The content is an `Event` of TensorFlow's protobuf schema; this file writes the few fields that are
//! needed by hand. Every process writes a file of its own. Records that a resumed run will write again are first cut off the
//! older files, so that no step occurs twice.
//!
//! What the `tensorboard` package reads from such files is a golden; `journal/tensorboard.rs` tests against it.
//!
//! Source: tensorflow/tensorflow: tensorflow/core/lib/io/record_writer.cc, core/util/event.proto,
//! core/framework/summary.proto.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::time::{SystemTime, UNIX_EPOCH};

use super::LastLine;
use crate::Result;
use crate::error::io;

const START: &str = "events.out.tfevents.";
const END: &str = ".moeforge";
/// The longest record that is read back. Real ones have a few thousand bytes.
const MAX_RECORD_BYTES: u64 = 1 << 24;

/// The value of one tag at one step.
#[derive(Clone, Debug, PartialEq)]
pub(crate) enum EventValue {
    /// A number.
    Scalar(f64),
    /// Counts: the bar of number `i` reaches from `i` to `i + 1`.
    Histogram(Vec<u64>),
    /// Markdown.
    Text(String),
}

/// The event file of this process. The first event creates it.
#[derive(Debug)]
pub(crate) struct EventFile {
    path: PathBuf,
    file: Option<File>,
    /// The wall time of the next event, in seconds. Tests set another clock, so that files are equal to the byte.
    pub(super) wall_time: fn() -> f64,
}

impl EventFile {
    /// A new file after those in the folder. Events after `last` are cut off those, or all of them if it is none.
    ///
    /// # Errors
    /// If a file cannot be read or written.
    pub(crate) fn open(folder: &Path, last: Option<LastLine>) -> Result<Self> {
        let mut newest = 0;
        for entry in fs::read_dir(folder).map_err(io("read", folder))? {
            let name = entry.map_err(io("read", folder))?.file_name();
            let name = name.to_string_lossy();
            let number = name.strip_prefix(START).and_then(|n| n.strip_suffix(END));
            let Some(number) = number.and_then(|number| number.parse::<u64>().ok()) else {
                continue;
            };
            if cut(&folder.join(&*name), last)? {
                newest = newest.max(number);
            }
        }
        // Readers take files in the order of their names. Other programs put the seconds of a clock there.
        let name = format!("{START}{:010}{END}", newest.saturating_add(1));
        Ok(Self {
            path: folder.join(name),
            file: None,
            wall_time: seconds_since_1970,
        })
    }

    /// Appends the values of a step.
    ///
    /// # Errors
    /// If writing fails.
    pub(crate) fn append(&mut self, step: u64, values: &[(String, EventValue)]) -> Result<()> {
        let mut bytes = Vec::new();
        if self.file.is_none() {
            let options = OpenOptions::new()
                .append(true)
                .create_new(true)
                .open(&self.path);
            self.file = Some(options.map_err(io("create", &self.path))?);
            let mut version = event(0, (self.wall_time)());
            version.bytes(3, b"brain.Event:2");
            record(&mut bytes, &version.0);
        }
        let mut summary = Message::default();
        for (tag, value) in values {
            summary.bytes(1, &value.message(tag).0);
        }
        let mut event = event(step, (self.wall_time)());
        event.bytes(5, &summary.0);
        record(&mut bytes, &event.0);
        // One call and no buffer: a process that is killed here leaves the records or a part of them.
        let file = self.file.as_mut().map(|file| file.write_all(&bytes));
        file.unwrap_or(Ok(())).map_err(io("write", &self.path))
    }
}

/// Cuts off a file's events after the last one that stays, and bytes that are no event. Returns whether anything is left; if not, the file is
/// removed.
fn cut(path: &Path, last: Option<LastLine>) -> Result<bool> {
    let mut options = OpenOptions::new();
    let mut file = options
        .read(true)
        .write(true)
        .open(path)
        .map_err(io("open", path))?;
    let len = file.metadata().map_err(io("read", path))?.len();
    let (mut valid_bytes, mut n_events) = (0, 0u64);
    while let Some((content, end)) =
        next_event(&mut file, valid_bytes, len).map_err(io("read", path))?
    {
        let keeps = |last: LastLine| last.keeps(step_of(&content), is_validation(&content));
        if !last.is_some_and(keeps) {
            break;
        }
        (valid_bytes, n_events) = (end, n_events + 1);
    }
    // The first one has the version only.
    if n_events < 2 {
        fs::remove_file(path).map_err(io("remove", path))?;
        return Ok(false);
    }
    file.set_len(valid_bytes).map_err(io("shorten", path))?;
    Ok(true)
}

/// The event at an offset of a file, and the offset of its end; none if there is no whole event.
fn next_event(file: &mut File, start: u64, len: u64) -> std::io::Result<Option<(Vec<u8>, u64)>> {
    const FRAME_BYTES: u64 = 16;
    if len.saturating_sub(start) < FRAME_BYTES {
        return Ok(None);
    }
    let mut head = [0; 12];
    file.seek(SeekFrom::Start(start))?;
    file.read_exact(&mut head)?;
    let mut n_bytes = [0; 8];
    n_bytes.copy_from_slice(&head[..8]);
    let n_bytes = u64::from_le_bytes(n_bytes);
    if n_bytes > MAX_RECORD_BYTES || n_bytes > len - start - FRAME_BYTES {
        return Ok(None);
    }
    let mut content = vec![0; n_bytes as usize];
    file.read_exact(&mut content)?;
    let mut crc = [0; 4];
    file.read_exact(&mut crc)?;
    let is_whole = crc == masked_crc(&content).to_le_bytes();
    Ok(is_whole.then(|| (content, start + FRAME_BYTES + n_bytes)))
}

/// Whether an event that this file wrote is about a validation pass: one of its tags says so.
fn is_validation(event: &[u8]) -> bool {
    const TAG: &[u8] = b"eval/";
    event.windows(TAG.len()).any(|bytes| bytes == TAG)
}

/// The step of an event that this file wrote: after the time, or absent for 0.
fn step_of(event: &[u8]) -> u64 {
    const TIME: usize = 9;
    let Some((&key, rest)) = event.get(TIME..).and_then(<[u8]>::split_first) else {
        return 0;
    };
    if key != 2 << 3 {
        return 0;
    }
    let mut step = 0;
    for (i, byte) in rest.iter().take(10).enumerate() {
        step |= u64::from(byte & 0x7F)
            .checked_shl(7 * i as u32)
            .unwrap_or(0);
        if byte & 0x80 == 0 {
            break;
        }
    }
    step
}

impl EventValue {
    /// A `Summary.Value`.
    fn message(&self, tag: &str) -> Message {
        let mut message = Message::default();
        message.bytes(1, tag.as_bytes());
        match self {
            Self::Scalar(value) => message.float(2, *value as f32),
            Self::Histogram(counts) => message.bytes(5, &histogram(counts).0),
            Self::Text(text) => {
                let mut plugin = Message::default();
                plugin.bytes(1, b"text");
                let mut metadata = Message::default();
                metadata.bytes(1, &plugin.0);
                let mut tensor = Message::default();
                tensor.varint(1, 7); // DT_STRING; without a shape, a scalar
                tensor.bytes(2, &[]);
                tensor.bytes(8, text.as_bytes());
                message.bytes(8, &tensor.0);
                message.bytes(9, &metadata.0);
            }
        }
        message
    }
}

/// A `HistogramProto`.
fn histogram(counts: &[u64]) -> Message {
    let middles = || {
        counts
            .iter()
            .zip(0u32..)
            .map(|(n, i)| (*n as f64, f64::from(i) + 0.5))
    };
    // TensorBoard leaves out empty bars at both ends and draws the next ones from the least to the largest value.
    let first = counts.iter().position(|n| *n > 0).unwrap_or(0);
    let last = counts.iter().rposition(|n| *n > 0);
    let end = last.map_or(counts.len(), |last| last + 1);
    let mut message = Message::default();
    message.double(1, first as f64);
    message.double(2, end as f64);
    message.double(3, middles().map(|(n, _)| n).sum());
    message.double(4, middles().map(|(n, x)| n * x).sum());
    message.double(5, middles().map(|(n, x)| n * x * x).sum());
    message.doubles(6, middles().map(|(_, x)| x + 0.5));
    message.doubles(7, middles().map(|(n, _)| n));
    message
}

/// The time of the system's clock; 0 if it is before 1970.
fn seconds_since_1970() -> f64 {
    let now = SystemTime::now().duration_since(UNIX_EPOCH);
    now.map_or(0.0, |time| time.as_secs_f64())
}

/// An `Event` without content.
fn event(step: u64, wall_time: f64) -> Message {
    let mut event = Message::default();
    event.double(1, wall_time);
    if step > 0 {
        event.varint(2, step);
    }
    event
}

/// A protobuf message being written.
#[derive(Debug, Default)]
struct Message(Vec<u8>);

impl Message {
    fn key(&mut self, field: u8, wire_type: u8) {
        self.0.push(field << 3 | wire_type);
    }

    fn raw_varint(&mut self, mut value: u64) {
        while value >= 0x80 {
            self.0.push(value as u8 | 0x80);
            value >>= 7;
        }
        self.0.push(value as u8);
    }

    fn varint(&mut self, field: u8, value: u64) {
        self.key(field, 0);
        self.raw_varint(value);
    }

    fn double(&mut self, field: u8, value: f64) {
        self.key(field, 1);
        self.0.extend(value.to_le_bytes());
    }

    fn float(&mut self, field: u8, value: f32) {
        self.key(field, 5);
        self.0.extend(value.to_le_bytes());
    }

    fn bytes(&mut self, field: u8, value: &[u8]) {
        self.key(field, 2);
        self.raw_varint(value.len() as u64);
        self.0.extend(value);
    }

    fn doubles(&mut self, field: u8, values: impl Iterator<Item = f64>) {
        let packed: Vec<u8> = values.flat_map(f64::to_le_bytes).collect();
        self.bytes(field, &packed);
    }
}

/// Appends a TFRecord.
fn record(file: &mut Vec<u8>, content: &[u8]) {
    let n_bytes = (content.len() as u64).to_le_bytes();
    file.extend(n_bytes);
    file.extend(masked_crc(&n_bytes).to_le_bytes());
    file.extend(content);
    file.extend(masked_crc(content).to_le_bytes());
}

/// CRC-32C, rotated and shifted, so that a checksum of data that holds checksums is not a special case.
fn masked_crc(bytes: &[u8]) -> u32 {
    crc32c(bytes).rotate_right(15).wrapping_add(0xA282_EAD8)
}

/// Castagnoli's CRC.
fn crc32c(bytes: &[u8]) -> u32 {
    let next = |crc: u32, byte: &u8| (crc >> 8) ^ CRC_TABLE[usize::from(crc as u8 ^ byte)];
    !bytes.iter().fold(!0, next)
}

const CRC_TABLE: [u32; 256] = {
    let mut table = [0; 256];
    let mut i = 0;
    while i < 256 {
        let (mut crc, mut bit) = (i as u32, 0);
        while bit < 8 {
            crc = (crc >> 1) ^ if crc & 1 == 1 { 0x82F6_3B78 } else { 0 };
            bit += 1;
        }
        table[i] = crc;
        i += 1;
    }
    table
};

#[cfg(test)]
mod tests {
    use super::*;

    /// A field of a message: its number, and its bytes or its eight-byte number.
    fn fields(mut message: &[u8]) -> Vec<(u8, Vec<u8>)> {
        let mut fields = Vec::new();
        while let [key, rest @ ..] = message {
            let n_bytes = match key & 7 {
                0 => rest.iter().position(|byte| byte & 0x80 == 0).unwrap() + 1,
                1 => 8,
                5 => 4,
                _ => usize::from(rest[0]) + 1, // Shorter than 128 in these tests.
            };
            let content = &rest[usize::from(key & 7 == 2)..n_bytes];
            fields.push((key >> 3, content.to_vec()));
            message = &rest[n_bytes..];
        }
        fields
    }

    fn field(message: &[u8], number: u8) -> Vec<u8> {
        let mut fields = fields(message).into_iter();
        fields.find(|(found, _)| *found == number).unwrap().1
    }

    /// The contents of a file's records, read without the writer's functions except the checksum.
    fn records(path: &Path) -> Vec<Vec<u8>> {
        let bytes = fs::read(path).unwrap();
        let mut left = &bytes[..];
        let mut records = Vec::new();
        while !left.is_empty() {
            let len = u64::from_le_bytes(left[..8].try_into().unwrap()) as usize;
            assert_eq!(left[8..12], masked_crc(&left[..8]).to_le_bytes());
            let content = &left[12..12 + len];
            assert_eq!(left[12 + len..16 + len], masked_crc(content).to_le_bytes());
            records.push(content.to_vec());
            left = &left[16 + len..];
        }
        records
    }

    fn scalar(value: f64) -> [(String, EventValue); 1] {
        [("train/loss".to_owned(), EventValue::Scalar(value))]
    }

    fn names(folder: &Path) -> Vec<String> {
        let entries = fs::read_dir(folder).unwrap();
        let mut names: Vec<_> = entries
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    #[test]
    fn checksums_are_those_of_the_standard() {
        // RFC 3720, appendix B.4, and the check value of the CRC catalogs.
        assert_eq!(crc32c(&[0; 32]), 0x8A91_36AA);
        assert_eq!(crc32c(&[0xFF; 32]), 0x62A8_AB43);
        assert_eq!(crc32c(b"123456789"), 0xE306_9283);
    }

    #[test]
    fn scalars_histograms_and_texts_are_where_the_schema_has_them() {
        let folder = tempfile::tempdir().unwrap();
        let mut events = EventFile::open(folder.path(), None).unwrap();
        assert!(names(folder.path()).is_empty());
        let mut values = scalar(1.5).to_vec();
        values.push(("load".into(), EventValue::Histogram(vec![3, 0, 5])));
        events.append(300, &values).unwrap();
        events
            .append(301, &[("t".into(), EventValue::Text("hi".into()))])
            .unwrap();
        let records = records(&events.path);
        assert_eq!(field(&records[0], 3), b"brain.Event:2");
        assert_eq!(field(&records[1], 2), [0xAC, 0x02]); // 300
        let summary = field(&records[1], 5);
        let values: Vec<_> = fields(&summary)
            .into_iter()
            .map(|(_, value)| value)
            .collect();
        assert_eq!(field(&values[0], 1), b"train/loss");
        assert_eq!(field(&values[0], 2), 1.5f32.to_le_bytes());
        let histogram = field(&values[1], 5);
        let doubles = |number| -> Vec<f64> {
            let bytes = field(&histogram, number);
            let chunks = bytes.chunks(8);
            chunks
                .map(|chunk| f64::from_le_bytes(chunk.try_into().unwrap()))
                .collect()
        };
        let singles: Vec<f64> = (1..=5).flat_map(doubles).collect();
        assert_eq!(singles, [0.0, 3.0, 8.0, 14.0, 32.0]);
        assert_eq!(
            (doubles(6), doubles(7)),
            (vec![1.0, 2.0, 3.0], vec![3.0, 0.0, 5.0])
        );
        let text = field(&field(&records[2], 5), 1);
        assert_eq!(field(&field(&text, 8), 8), b"hi");
        assert_eq!(field(&field(&field(&text, 9), 1), 1), b"text");
    }

    #[test]
    fn a_resumed_run_has_every_step_once() {
        let folder = tempfile::tempdir().unwrap();
        let steps = || -> Vec<u64> {
            let files = names(folder.path()).into_iter();
            let events = files.flat_map(|name| records(&folder.path().join(name)));
            events
                .map(|event| step_of(&event))
                .filter(|step| *step > 0)
                .collect()
        };
        let append = |last_step, steps: &[u64]| {
            let last = Option::map(last_step, LastLine::of_step);
            let mut events = EventFile::open(folder.path(), last).unwrap();
            for &step in steps {
                events.append(step, &scalar(1.0)).unwrap();
            }
            events.path
        };
        append(None, &[1, 2, 200, 300]);
        let second = append(Some(200), &[201, 302, 70_000]);
        assert_eq!(steps(), [1, 2, 200, 201, 302, 70_000]);
        // Cut short within an event, and a process that was killed before its first one.
        let len = fs::metadata(&second).unwrap().len();
        File::options()
            .write(true)
            .open(&second)
            .unwrap()
            .set_len(len - 1)
            .unwrap();
        append(Some(90_000), &[]);
        assert_eq!(steps(), [1, 2, 200, 201, 302]);
        append(Some(2), &[3]);
        assert_eq!((steps(), names(folder.path()).len()), (vec![1, 2, 3], 2));
        // What is not ours stays, as does nothing of a run that starts over.
        fs::write(folder.path().join("events.out.tfevents.12.host"), b"x").unwrap();
        append(None, &[]);
        assert_eq!(names(folder.path()), ["events.out.tfevents.12.host"]);
    }

    #[test]
    fn garbage_is_cut_off_without_a_panic() {
        let folder = tempfile::tempdir().unwrap();
        let path = folder
            .path()
            .join("events.out.tfevents.0000000001.moeforge");
        for bytes in [vec![], vec![0xFF; 40], vec![0; 7], vec![0; 64]] {
            fs::write(&path, &bytes).unwrap();
            EventFile::open(folder.path(), Some(LastLine::of_step(5))).unwrap();
            assert!(!path.exists(), "{bytes:?}");
        }
    }
}
