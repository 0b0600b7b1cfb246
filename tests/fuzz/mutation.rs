//! What happens to a file: bits flip, parts vanish, repeat or come from elsewhere, numbers become extreme. What happens to JSON
//! leaves it JSON, and so comes further: values change, repeat, move and nest.

use serde_json::Value;

/// SplitMix64: the same changes on every machine.
pub(crate) struct Dice(u64);

impl Dice {
    pub(crate) fn new(seed: u64) -> Self {
        Self(seed)
    }

    fn next(&mut self) -> u64 {
        self.0 = self.0.wrapping_add(0x9E37_79B9_7F4A_7C15);
        let mixed = (self.0 ^ self.0 >> 30).wrapping_mul(0xBF58_476D_1CE4_E5B9);
        let mixed = (mixed ^ mixed >> 27).wrapping_mul(0x94D0_49BB_1331_11EB);
        mixed ^ mixed >> 31
    }

    /// A number below `end`, or 0.
    fn below(&mut self, end: usize) -> usize {
        (self.next() % end.max(1) as u64) as usize
    }

    fn one<'a, T: ?Sized>(&mut self, of: &[&'a T]) -> &'a T {
        of[self.below(of.len())]
    }
}

/// Lengths and counts that are too much for something.
const NUMBERS: [u64; 12] = [
    0,
    1,
    0x7F,
    0xFFFF,
    1 << 20,
    1 << 24,
    i32::MAX as u64,
    u32::MAX as u64,
    1 << 40,
    i64::MAX as u64,
    u64::MAX - 7,
    u64::MAX,
];
/// What a text may have in place of a part.
const TEXTS: [&str; 18] = [
    "0",
    "-1",
    "1e999",
    "0.5",
    "4294967295",
    "18446744073709551615",
    "99999999999999999999",
    "null",
    "true",
    "\"\"",
    "\"\\u0000\"",
    "[]",
    "{}",
    "[[[[[[[[[[[[[[[[",
    "{\"a\":{\"a\":{\"a\":",
    "\u{feff}",
    "\"a\":1,",
    "(((((((((a{99}){99}){99}",
];
const MOST_CHANGES: usize = 4;
const LONGEST_PART: usize = 100;
const MOST_COPIES: usize = 64;

/// A file that was changed in a few places.
pub(crate) fn mutated(valid: &[u8], dice: &mut Dice) -> Vec<u8> {
    let mut bytes = valid.to_vec();
    for _ in 0..=dice.below(MOST_CHANGES) {
        change(&mut bytes, valid, dice);
    }
    bytes
}

fn change(bytes: &mut Vec<u8>, valid: &[u8], dice: &mut Dice) {
    let at = dice.below(bytes.len());
    let part = at..bytes.len().min(at + dice.below(LONGEST_PART));
    match dice.below(9) {
        0 if !bytes.is_empty() => bytes[at] ^= 1 << dice.below(8),
        1 if !bytes.is_empty() => bytes[at] = dice.next() as u8,
        2 => bytes.truncate(at),
        3 => drop(bytes.drain(part)),
        4 => {
            let copies = bytes[part].repeat(1 + dice.below(MOST_COPIES));
            bytes.splice(at..at, copies);
        }
        5 => {
            let from = dice.below(valid.len());
            let to = valid.len().min(from + dice.below(LONGEST_PART));
            bytes.splice(part, valid[from..to].iter().copied());
        }
        6 => {
            let number = NUMBERS[dice.below(NUMBERS.len())].to_le_bytes();
            let size = [4, 8][dice.below(2)].min(bytes.len() - at);
            bytes[at..at + size].copy_from_slice(&number[..size]);
        }
        7 => {
            let text = dice.one(&TEXTS);
            bytes.splice(part, text.bytes());
        }
        _ => {
            let text = dice.one(&TEXTS);
            let number = number_from(bytes, at);
            bytes.splice(number, text.bytes());
        }
    }
}

/// A JSON file of which a few values were changed; the file as it is if it is no JSON.
pub(crate) fn mutated_json(valid: &[u8], dice: &mut Dice) -> Vec<u8> {
    let Ok(valid) = serde_json::from_slice::<Value>(valid) else {
        return valid.to_vec();
    };
    let mut json = valid.clone();
    for _ in 0..=dice.below(MOST_CHANGES) {
        let other = one_value(&mut valid.clone(), dice).clone();
        change_value(one_value(&mut json, dice), other, dice);
    }
    json.to_string().into_bytes()
}

/// A value somewhere in a tree. Large objects, such as vocabularies, are not preferred to small ones.
fn one_value<'a>(json: &'a mut Value, dice: &mut Dice) -> &'a mut Value {
    let len = match json {
        Value::Array(list) => list.len(),
        Value::Object(fields) => fields.len(),
        _ => 0,
    };
    if len == 0 || dice.below(5) == 0 {
        return json;
    }
    let at = dice.below(len);
    let inner = match json {
        Value::Array(list) => list.get_mut(at),
        Value::Object(fields) => fields.values_mut().nth(at),
        _ => None,
    };
    // There are as many as were counted.
    one_value(inner.unwrap(), dice)
}

fn change_value(value: &mut Value, other: Value, dice: &mut Dice) {
    let copies = 1 + dice.below(MOST_COPIES);
    match (dice.below(6), &mut *value) {
        (0, Value::Array(list)) if !list.is_empty() => {
            let at = dice.below(list.len());
            let part = vec![list[at].clone(); copies];
            list.splice(at..at, part);
        }
        (1, Value::Array(list)) if !list.is_empty() => drop(list.remove(dice.below(list.len()))),
        (1, Value::Object(fields)) if !fields.is_empty() => {
            let key = fields.keys().nth(dice.below(fields.len())).cloned();
            fields.remove(&key.unwrap());
        }
        (2, Value::String(text)) => *text = text.repeat(copies),
        (2, Value::Number(_)) => *value = NUMBERS[dice.below(NUMBERS.len())].into(),
        (3, _) => *value = serde_json::from_str(dice.one(&TEXTS)).unwrap_or(Value::Null),
        (4, _) => *value = Value::Array(vec![value.clone(); copies.min(40)]),
        _ => *value = other,
    }
}

/// The next digits from a place on, or nothing at the end.
fn number_from(bytes: &[u8], at: usize) -> std::ops::Range<usize> {
    let place = |from: usize, is_digit: bool| {
        let found = bytes[from..]
            .iter()
            .position(|b| b.is_ascii_digit() == is_digit);
        found.map_or(bytes.len(), |i| from + i)
    };
    let start = place(at.min(bytes.len()), true);
    start..place(start, false)
}
