//! Thrift's compact protocol, as Parquet's metadata is written in it: structs of numbered fields, read into a tree.
//!
//! Source: apache/thrift: doc/specs/thrift-compact-protocol.md.

/// Structs and lists inside each other; Parquet has fewer than ten.
const MAX_NESTING: usize = 24;

/// A value. Numbers of all widths are one kind.
#[derive(Clone, Debug, PartialEq)]
pub(super) enum Thrift {
    Bool(bool),
    Number(i64),
    Double,
    Bytes(Vec<u8>),
    List(Vec<Self>),
    Struct(Vec<(i16, Self)>),
}

impl Thrift {
    /// Reads a struct from the beginning of `bytes`. Returns it with the rest; none if it is malformed or incomplete.
    pub(super) fn read(bytes: &[u8]) -> Option<(Self, &[u8])> {
        let mut reader = Reader { bytes };
        let value = reader.structure(0)?;
        Some((value, reader.bytes))
    }

    /// A field of a struct.
    pub(super) fn field(&self, id: i16) -> Option<&Self> {
        let Self::Struct(fields) = self else {
            return None;
        };
        let field = fields.iter().find(|(known, _)| *known == id);
        field.map(|(_, value)| value)
    }

    /// A number in a field of a struct.
    pub(super) fn number(&self, id: i16) -> Option<i64> {
        match self.field(id)? {
            Self::Number(number) => Some(*number),
            _ => None,
        }
    }

    /// A number in a field of a struct that counts, measures or points to something.
    pub(super) fn size(&self, id: i16) -> Option<u64> {
        u64::try_from(self.number(id)?).ok()
    }

    /// A list in a field of a struct.
    pub(super) fn list(&self, id: i16) -> Option<&[Self]> {
        match self.field(id)? {
            Self::List(list) => Some(list),
            _ => None,
        }
    }

    /// A text in a field of a struct.
    pub(super) fn text(&self, id: i16) -> Option<&str> {
        match self.field(id)? {
            Self::Bytes(bytes) => std::str::from_utf8(bytes).ok(),
            _ => None,
        }
    }
}

struct Reader<'a> {
    bytes: &'a [u8],
}

impl Reader<'_> {
    fn byte(&mut self) -> Option<u8> {
        let (&first, rest) = self.bytes.split_first()?;
        self.bytes = rest;
        Some(first)
    }

    fn unsigned(&mut self) -> Option<u64> {
        let (value, rest) = varint(self.bytes)?;
        self.bytes = rest;
        Some(value)
    }

    fn size(&mut self) -> Option<usize> {
        // Every element has at least one byte, so that a list cannot take much more memory than it has bytes.
        let size = usize::try_from(self.unsigned()?).ok()?;
        (size <= self.bytes.len()).then_some(size)
    }

    fn structure(&mut self, depth: usize) -> Option<Thrift> {
        let (mut fields, mut id) = (Vec::new(), 0_i16);
        loop {
            let header = self.byte()?;
            let kind = header & 0x0F;
            if kind == 0 {
                return Some(Thrift::Struct(fields));
            }
            id = match header >> 4 {
                0 => i16::try_from(zigzag(self.unsigned()?)).ok()?,
                step => id.checked_add(i16::from(step))?,
            };
            let value = match kind {
                1 | 2 => Thrift::Bool(kind == 1),
                _ => self.value(kind, depth + 1)?,
            };
            fields.push((id, value));
        }
    }

    fn value(&mut self, kind: u8, depth: usize) -> Option<Thrift> {
        if depth > MAX_NESTING {
            return None;
        }
        Some(match kind {
            1 | 2 => Thrift::Bool(self.byte()? == 1),
            3 => Thrift::Number(i64::from(self.byte()? as i8)),
            4..=6 => Thrift::Number(zigzag(self.unsigned()?)),
            7 => {
                (0..8).try_for_each(|_| self.byte().map(drop))?;
                Thrift::Double
            }
            8 => {
                let size = self.size()?;
                let (bytes, rest) = self.bytes.split_at(size);
                self.bytes = rest;
                Thrift::Bytes(bytes.to_vec())
            }
            9 | 10 => {
                let header = self.byte()?;
                let size = match header >> 4 {
                    15 => self.size()?,
                    size => usize::from(size),
                };
                let kind = header & 0x0F;
                let values = (0..size).map(|_| self.value(kind, depth + 1));
                Thrift::List(values.collect::<Option<_>>()?)
            }
            11 => {
                // A map: nothing that is read has one.
                let size = self.size()?;
                let kinds = if size == 0 { 0 } else { self.byte()? };
                for _ in 0..size {
                    self.value(kinds >> 4, depth + 1)?;
                    self.value(kinds & 0x0F, depth + 1)?;
                }
                Thrift::List(Vec::new())
            }
            12 => self.structure(depth)?,
            _ => return None,
        })
    }
}

/// A number of seven bits per byte, lowest first, and the rest of the bytes.
pub(super) fn varint(bytes: &[u8]) -> Option<(u64, &[u8])> {
    let mut value = 0;
    for (index, &byte) in bytes.iter().enumerate().take(10) {
        value |= u64::from(byte & 0x7F).checked_shl(7 * index as u32)?;
        if byte & 0x80 == 0 {
            return Some((value, &bytes[index + 1..]));
        }
    }
    None
}

/// A signed number of an unsigned one: 0, −1, 1, −2, …
pub(super) fn zigzag(value: u64) -> i64 {
    (value >> 1) as i64 ^ -((value & 1) as i64)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn structs_are_read_with_their_fields() {
        // 1: -3, 2: true, 4: "ab", 5: [1, 2], 20: {1: false}
        let bytes = [
            0x15, 0x05, 0x11, 0x28, 2, b'a', b'b', 0x19, 0x25, 2, 4, 0x0C, 40, 0x12, 0, 0, 9,
        ];
        let (value, rest) = Thrift::read(&bytes).unwrap();
        assert_eq!(rest, [9]);
        assert_eq!(value.number(1), Some(-3));
        assert_eq!(value.size(1), None);
        assert_eq!(value.field(2), Some(&Thrift::Bool(true)));
        assert_eq!(value.text(4), Some("ab"));
        assert_eq!(
            value.list(5),
            Some(&[Thrift::Number(1), Thrift::Number(2)][..])
        );
        assert_eq!(
            value.field(20).unwrap().field(1),
            Some(&Thrift::Bool(false))
        );
        assert_eq!(value.field(3), None);
        assert!((0..bytes.len() - 1).all(|cut| Thrift::read(&bytes[..cut]).is_none()));
    }

    #[test]
    fn hostile_bytes_are_refused() {
        // Structs in structs, a list of 2⁶³ elements, a text longer than the rest.
        assert_eq!(Thrift::read(&[0x1C; 100_000]), None);
        assert_eq!(Thrift::read(&[0x19; 100_000]), None);
        assert_eq!(
            Thrift::read(&[0x19, 0xF5, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0xFF, 0x7F, 0]),
            None
        );
        assert_eq!(Thrift::read(&[0x18, 0x7F, 0]), None);
        assert_eq!(varint(&[0xFF; 20]), None);
        assert_eq!([0, 1, 2, 3, u64::MAX].map(zigzag), [0, -1, 1, -2, i64::MIN]);
    }
}
