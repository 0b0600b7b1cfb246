//! The FNV-1a hash, for seeds and for telling texts apart.

/// 64-bit FNV-1a of some bytes; 0 as `seed` is the plain hash. It resists no attack.
///
/// Source: draft-eastlake-fnv, section 2. The seed is XORed into the offset basis.
pub fn fnv1a(seed: u64, bytes: impl IntoIterator<Item = u8>) -> u64 {
    const OFFSET_BASIS: u64 = 0xcbf2_9ce4_8422_2325;
    const PRIME: u64 = 0x0100_0000_01b3;
    bytes.into_iter().fold(seed ^ OFFSET_BASIS, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(PRIME)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn hashes_are_those_of_the_draft() {
        // Its appendix C.
        assert_eq!(fnv1a(0, *b""), 0xcbf2_9ce4_8422_2325);
        assert_eq!(fnv1a(0, *b"a"), 0xaf63_dc4c_8601_ec8c);
        assert_eq!(fnv1a(0, *b"foobar"), 0x8594_4171_f739_67e8);
        assert_ne!(fnv1a(1, *b"a"), fnv1a(0, *b"a"));
    }
}
