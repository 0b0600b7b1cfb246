//! Cached keys or values, as attention reads them.

use std::ops::Range;

use crate::formats::CacheType;
use crate::gemv::KvTile;

/// Cached rows `[len, heads, width]`.
#[derive(Clone, Copy, Debug)]
pub(crate) struct KvRows<'a> {
    pub(crate) form: CacheType,
    pub(crate) bytes: &'a [u8],
    pub(crate) len: usize,
    pub(crate) heads: usize,
    pub(crate) width: usize,
}

impl<'a> KvRows<'a> {
    /// A tile of a head's rows.
    pub(crate) fn tile(&self, rows: Range<usize>, head: usize) -> KvTile<'a> {
        let row_bytes = self.form.row_bytes(self.width);
        let stride = self.heads * row_bytes;
        let bytes = &self.bytes[rows.start * stride + head * row_bytes..];
        KvTile::new(self.form, bytes, stride, [rows.len(), self.width])
    }
}
