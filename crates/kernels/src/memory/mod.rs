//! Memory: the program's allocator, scratch of a thread, and views of f32 values as matrices.

mod allocator;
mod scratch;
mod view;

pub use self::allocator::{
    AllocatedBytes, RecyclingAllocator, allocated_bytes, keep_large_blocks, map_large_blocks,
};
pub(crate) use self::scratch::{with_byte_scratch, with_scratch, zeros};
pub(crate) use self::view::{Mat, MatMut};
