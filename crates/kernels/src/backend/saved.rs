//! Activations saved for the backward pass.
//!
//! The inputs of linear layers, of SwiGLU and of the experts are saved in the precision of the products: f32, 16 bits,
//! or E4M3. All consumers of a tensor share one saved copy. The outputs of norms and of SwiGLU are cheap to recompute
//! and are not saved: a norm's output is recomputed from its input, in f32, and that of SwiGLU from the saved gate and
//! up.

use std::any::Any;
use std::cell::RefCell;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Weak};

use burn::backend::autodiff::NodeId;

use crate::formats::fp8::Tiles;
use crate::settings::Compute;

/// A tensor saved for the backward pass. It counts towards [`saved_activation_bytes`] while it lives.
#[derive(Debug)]
pub(crate) struct SavedActivation<F> {
    form: SavedForm<F>,
    bytes: usize,
}

/// How a tensor is saved.
#[derive(Debug)]
pub(crate) enum SavedForm<F> {
    /// As it is, or in 16 bits.
    Float(F),
    /// `[rows, cols]` in tiles of 1 × 128.
    Fp8(Tiles),
    /// To be recomputed: the norm of an input, with its weight and epsilon.
    Norm(F, F, f32),
    /// To be recomputed: SwiGLU of gate and up.
    Swiglu([Arc<SavedActivation<F>>; 2]),
}

impl<F> SavedActivation<F> {
    /// A saved tensor, and the bytes it occupies.
    pub(crate) fn new(form: SavedForm<F>, bytes: usize) -> Self {
        let now = NOW.fetch_add(bytes, Ordering::Relaxed) + bytes;
        PEAK.fetch_max(now, Ordering::Relaxed);
        Self { form, bytes }
    }

    pub(crate) fn form(&self) -> &SavedForm<F> {
        &self.form
    }
}

impl<F> Drop for SavedActivation<F> {
    fn drop(&mut self) {
        NOW.fetch_sub(self.bytes, Ordering::Relaxed);
    }
}

static NOW: AtomicUsize = AtomicUsize::new(0);
static PEAK: AtomicUsize = AtomicUsize::new(0);

/// Peak bytes of activations saved for the backward pass since the last call: inputs of linear layers, of SwiGLU and
/// of experts.
pub fn saved_activation_bytes() -> usize {
    let now = NOW.load(Ordering::Relaxed);
    PEAK.swap(now, Ordering::Relaxed)
}

/// The node of a tensor, the precision it is saved in (`None` serves every precision), and the saved tensor.
type SavedEntry = (NodeId, Option<Compute>, Weak<dyn Any + Send + Sync>);

thread_local! {
    /// The tensors saved last. Node ids are never reused, so an entry is valid as long as its tensor lives.
    static RECENT: RefCell<Vec<SavedEntry>> = const { RefCell::new(Vec::new()) };
}

/// Tensors that may still get a consumer: a layer has fewer.
const RECENT_LEN: usize = 16;

/// The saved tensor of a node: the one that another consumer saved, or else a new one from `save`.
pub(crate) fn shared<F: Send + Sync + 'static>(
    node: NodeId,
    compute: Compute,
    save: impl FnOnce() -> SavedActivation<F>,
) -> Arc<SavedActivation<F>> {
    let known = RECENT.with_borrow(|recent| {
        let known = recent.iter().find(|(of, precision, _)| {
            *of == node && precision.is_none_or(|precision| precision == compute)
        });
        known.and_then(|(.., saved)| downcast(saved))
    });
    // Saving runs parallel loops, in which this thread may turn to other work: the list is not borrowed meanwhile.
    known.unwrap_or_else(|| {
        let saved = Arc::new(save());
        RECENT.with_borrow_mut(|recent| push(recent, (node, Some(compute), weak(&saved))));
        saved
    })
}

/// Lets all consumers of a node's tensor share `saved`, in every precision.
pub(crate) fn remember<F: Send + Sync + 'static>(node: NodeId, saved: &Arc<SavedActivation<F>>) {
    RECENT.with_borrow_mut(|recent| push(recent, (node, None, weak(saved))));
}

fn push(recent: &mut Vec<SavedEntry>, entry: SavedEntry) {
    recent.retain(|(.., saved)| saved.strong_count() > 0);
    if recent.len() == RECENT_LEN {
        recent.remove(0);
    }
    recent.push(entry);
}

fn weak<F: Send + Sync + 'static>(saved: &Arc<SavedActivation<F>>) -> Weak<dyn Any + Send + Sync> {
    let weak: Weak<SavedActivation<F>> = Arc::downgrade(saved);
    weak
}

fn downcast<F: Send + Sync + 'static>(
    saved: &Weak<dyn Any + Send + Sync>,
) -> Option<Arc<SavedActivation<F>>> {
    saved.upgrade()?.downcast().ok()
}
