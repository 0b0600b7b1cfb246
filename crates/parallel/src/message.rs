//! Values as the bytes of a message: little-endian, one after another, without names.

/// Writes values.
#[derive(Clone, Debug, Default)]
pub struct MessageWriter(Vec<u8>);

impl MessageWriter {
    /// A whole number.
    pub fn count(&mut self, value: u64) -> &mut Self {
        self.0.extend(value.to_le_bytes());
        self
    }

    /// A number, with its bits.
    pub fn number(&mut self, value: f64) -> &mut Self {
        self.count(value.to_bits())
    }

    /// Bytes, after their number.
    pub fn bytes(&mut self, bytes: &[u8]) -> &mut Self {
        self.count(bytes.len() as u64);
        self.0.extend(bytes);
        self
    }

    /// Values, after their number.
    pub fn values(&mut self, values: &[f32]) -> &mut Self {
        self.count(values.len() as u64);
        let start = self.0.len();
        self.0.resize(start + 4 * values.len(), 0);
        let places = self.0[start..].as_chunks_mut::<4>().0.iter_mut();
        for (place, value) in places.zip(values) {
            *place = value.to_le_bytes();
        }
        self
    }

    /// A message, as it is.
    pub fn append(&mut self, message: &[u8]) -> &mut Self {
        self.0.extend(message);
        self
    }

    /// The message.
    pub fn finish(self) -> Vec<u8> {
        self.0
    }
}

/// A message that ends too early: it was not written for this place.
#[derive(Clone, Copy, Debug, PartialEq, Eq, thiserror::Error)]
#[error("a message from another rank is shorter than it should be")]
pub struct ShortMessage;

/// Reads values in the order in which they were written.
#[derive(Clone, Copy, Debug)]
pub struct MessageReader<'a>(&'a [u8]);

impl<'a> MessageReader<'a> {
    /// From the beginning of a message.
    pub fn new(message: &'a [u8]) -> Self {
        Self(message)
    }

    /// Whether all is read.
    pub fn is_empty(&self) -> bool {
        self.0.is_empty()
    }

    /// A whole number.
    ///
    /// # Errors
    /// If the message has ended.
    pub fn count(&mut self) -> Result<u64, ShortMessage> {
        let (bytes, rest) = self.0.split_first_chunk::<8>().ok_or(ShortMessage)?;
        self.0 = rest;
        Ok(u64::from_le_bytes(*bytes))
    }

    /// A number, with its bits.
    ///
    /// # Errors
    /// If the message has ended.
    pub fn number(&mut self) -> Result<f64, ShortMessage> {
        self.count().map(f64::from_bits)
    }

    /// Bytes.
    ///
    /// # Errors
    /// If the message has ended.
    pub fn bytes(&mut self) -> Result<&'a [u8], ShortMessage> {
        let len = usize::try_from(self.count()?).map_err(|_| ShortMessage)?;
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(ShortMessage)?;
        self.0 = rest;
        Ok(bytes)
    }

    /// Text.
    ///
    /// # Errors
    /// If the message has ended.
    pub fn text(&mut self) -> Result<String, ShortMessage> {
        Ok(String::from_utf8_lossy(self.bytes()?).into_owned())
    }

    /// Values.
    ///
    /// # Errors
    /// If the message has ended.
    pub fn values(&mut self) -> Result<Vec<f32>, ShortMessage> {
        let len = usize::try_from(self.count()?).map_err(|_| ShortMessage)?;
        let len = len.checked_mul(4).ok_or(ShortMessage)?;
        let (bytes, rest) = self.0.split_at_checked(len).ok_or(ShortMessage)?;
        self.0 = rest;
        let words = bytes.as_chunks::<4>().0.iter();
        Ok(words.map(|word| f32::from_le_bytes(*word)).collect())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn values_come_back_with_their_bits() {
        let values = [0.0, -0.0, f32::NAN, f32::MIN_POSITIVE / 2.0];
        let mut message = MessageWriter::default();
        message
            .count(7)
            .number(-0.1)
            .bytes(b"text")
            .values(&values)
            .values(&[]);
        let message = message.finish();
        let mut reader = MessageReader::new(&message);
        assert_eq!(reader.count(), Ok(7));
        assert_eq!(reader.number(), Ok(-0.1));
        assert_eq!(reader.text().unwrap(), "text");
        let bits = |values: &[f32]| values.iter().map(|v| v.to_bits()).collect::<Vec<_>>();
        assert_eq!(bits(&reader.values().unwrap()), bits(&values));
        assert_eq!(reader.values(), Ok(vec![]));
        assert!(reader.is_empty());
        assert_eq!(reader.count(), Err(ShortMessage));
    }

    #[test]
    fn messages_that_are_cut_anywhere_are_errors() {
        let mut message = MessageWriter::default();
        message.bytes(b"some").values(&[1.0, 2.0]);
        let message = message.finish();
        for end in 0..message.len() {
            let mut reader = MessageReader::new(&message[..end]);
            let read = reader.bytes().and_then(|_| reader.values());
            assert_eq!(read, Err(ShortMessage), "{end}");
        }
        let mut huge = MessageWriter::default();
        huge.count(u64::MAX);
        let huge = huge.finish();
        assert_eq!(MessageReader::new(&huge).values(), Err(ShortMessage));
        assert_eq!(MessageReader::new(&huge).bytes(), Err(ShortMessage));
    }
}
