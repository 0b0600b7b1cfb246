//! What operations keep for their backward pass.
//!
//! The inputs of linear layers, of SwiGLU and of the experts wait in the form that the precision of the products asks
//! for: f32, 16 bits, or E4M3. All consumers of one tensor share what is kept of it. What is cheap to remake is not
//! kept at all: the output of a norm comes again from the norm's input, in f32, that of SwiGLU from what is kept of gate
//! and up.

use std::any::Any;
use std::cell::RefCell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use burn::backend::autodiff::NodeId;

use crate::formats::fp8::Tiles;
use crate::settings::Compute;

/// What waits for the backward pass in place of a tensor. It counts towards [`saved_activation_bytes`] while it lives.
#[derive(Debug)]
pub(crate) struct Kept<F> {
    form: Form<F>,
    bytes: usize,
}

/// The forms.
#[derive(Debug)]
pub(crate) enum Form<F> {
    /// As it is, or in 16 bits.
    Float(F),
    /// `[rows, cols]` in tiles of 1 × 128.
    Fp8(Tiles),
    /// The norm of its input, by a weight, with an epsilon.
    Norm(F, F, f32),
    /// SwiGLU of gate and up.
    Swiglu([Arc<Kept<F>>; 2]),
}

impl<F> Kept<F> {
    /// Something kept, and how many bytes that holds.
    pub(crate) fn new(form: Form<F>, bytes: usize) -> Self {
        let now = NOW.fetch_add(bytes, Ordering::Relaxed) + bytes;
        PEAK.fetch_max(now, Ordering::Relaxed);
        Self { form, bytes }
    }

    pub(crate) fn form(&self) -> &Form<F> {
        &self.form
    }
}

impl<F> Drop for Kept<F> {
    fn drop(&mut self) {
        NOW.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// The most bytes that waited for a backward pass at one time, as inputs of linear layers, of SwiGLU and of experts,
/// since the last call.
pub fn saved_activation_bytes() -> usize {
    let now = NOW.load(Ordering::Relaxed);
    PEAK.swap(now, Ordering::Relaxed)
}

/// What is kept of a tensor: its node, in what precision (none: whatever is asked for), and the thing itself.
type Entry = (NodeId, Option<Compute>, Weak<dyn Any + Send + Sync>);

thread_local! {
    /// What was kept last. Node ids are never used again, so an entry is right as long as the thing lives.
    static RECENT: RefCell<Vec<Entry>> = const { RefCell::new(Vec::new()) };
}

/// Tensors whose consumers come soon: a layer has fewer.
const RECENT_LEN: usize = 16;

/// What is kept of the tensor of a node: what another consumer kept already, or what `make` makes.
pub(crate) fn shared<F: Send + Sync + 'static>(
    node: NodeId,
    compute: Compute,
    make: impl FnOnce() -> Kept<F>,
) -> Arc<Kept<F>> {
    let known = RECENT.with_borrow(|recent| {
        let known = recent.iter().find(|(of, precision, _)| {
            *of == node && precision.is_none_or(|precision| precision == compute)
        });
        known.and_then(|(.., kept)| downcast(kept))
    });
    // Making runs parallel loops, in which this thread may turn to other work: the list is not held meanwhile.
    known.unwrap_or_else(|| {
        let kept = Arc::new(make());
        RECENT.with_borrow_mut(|recent| push(recent, (node, Some(compute), weak(&kept))));
        kept
    })
}

/// Lets the consumers of the tensor of a node keep this in its place.
pub(crate) fn remember<F: Send + Sync + 'static>(node: NodeId, kept: &Arc<Kept<F>>) {
    RECENT.with_borrow_mut(|recent| push(recent, (node, None, weak(kept))));
}

fn push(recent: &mut Vec<Entry>, entry: Entry) {
    recent.retain(|(.., kept)| kept.strong_count() > 0);
    if recent.len() == RECENT_LEN {
        recent.remove(0);
    }
    recent.push(entry);
}

fn weak<F: Send + Sync + 'static>(kept: &Arc<Kept<F>>) -> Weak<dyn Any + Send + Sync> {
    let weak: Weak<Kept<F>> = Arc::downgrade(kept);
    weak
}

fn downcast<F: Send + Sync + 'static>(kept: &Weak<dyn Any + Send + Sync>) -> Option<Arc<Kept<F>>> {
    kept.upgrade()?.downcast().ok()
}
