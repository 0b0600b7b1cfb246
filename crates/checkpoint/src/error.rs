//! Errors of a model's files, with the evidence.
//!
//! A message is one sentence that stands alone: causes are part of it, not a chain below it.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use crate::DType;

/// A result with this crate's [`Error`].
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// An error of a file.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The operating system refused to open, map, read, write, flush or rename.
    #[error("cannot {act} `{path}`: {cause}")]
    Io {
        /// What was tried, as a verb.
        act: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// What the operating system said.
        cause: std::io::Error,
    },

    /// A file, or a folder that it should be in, is a link to nothing.
    #[error(
        "cannot {act} `{path}`: {} is a link to `{target}`, which does not exist",
        shown_link(path, link)
    )]
    BrokenLink {
        /// What was tried, as a verb.
        act: &'static str,
        /// The file or folder.
        path: PathBuf,
        /// The link: the path, or a folder of it.
        link: PathBuf,
        /// Where the link leads.
        target: PathBuf,
    },

    /// A repository was copied without its large files.
    #[error(
        "`{path}`: this is a git-lfs pointer, not the file itself; run `git lfs pull` in its repository, or download the file again"
    )]
    LfsPointer {
        /// The file.
        path: PathBuf,
    },

    /// The companion files of a GGUF cannot be made of its metadata.
    #[error("{cause}")]
    Companions {
        /// Whoever makes them says which file and key.
        cause: Box<dyn std::error::Error + Send + Sync>,
    },

    /// A path is a folder, pipe or device instead of a file.
    #[error("`{path}`: expected a file, found {found}")]
    NotAFile {
        /// The path.
        path: PathBuf,
        /// What is there.
        found: &'static str,
    },

    /// A text file is longer than any real one.
    #[error("`{path}`: expected at most {limit} bytes, found {found}")]
    TooLong {
        /// The file.
        path: PathBuf,
        /// The longest accepted length, in bytes.
        limit: u64,
        /// Its length, in bytes.
        found: u64,
    },

    /// A file is not JSON, or its values have a wrong type.
    #[error("`{path}`: {cause}")]
    Json {
        /// The file.
        path: PathBuf,
        /// What the parser said, with line and column.
        cause: serde_json::Error,
    },

    /// A JSON file is not an object.
    #[error("`{path}`: expected a JSON object, found {found}")]
    NotAnObject {
        /// The file.
        path: PathBuf,
        /// What it starts with.
        found: String,
    },

    /// The first eight bytes of a safetensors file give an impossible header length.
    #[error("`{file}`: expected a safetensors header of at most {limit} bytes, found {found}")]
    HeaderLength {
        /// The file.
        file: PathBuf,
        /// The longest header this file can have, in bytes.
        limit: u64,
        /// The stated length, in bytes.
        found: u64,
    },

    /// A safetensors header does not parse.
    #[error("`{file}`: malformed safetensors header: {cause}")]
    Header {
        /// The file.
        file: PathBuf,
        /// What the parser said.
        cause: serde_json::Error,
    },

    /// A GGUF file is malformed, or not of a kind that is read.
    #[error("`{file}`: {problem}")]
    Gguf {
        /// The file.
        file: PathBuf,
        /// The key or tensor, what was expected and what was found.
        problem: String,
    },

    /// A tensor's name is empty, longer than any real one, or has control characters.
    #[error(
        "`{file}`: expected a printable tensor name of 1 to {limit} bytes, found {len}: `{found}`"
    )]
    TensorName {
        /// The file.
        file: PathBuf,
        /// The longest accepted length, in bytes.
        limit: usize,
        /// Its length, in bytes.
        len: usize,
        /// Its beginning, escaped.
        found: String,
    },

    /// A safetensors file uses a dtype that is unknown or has no use here.
    #[error("`{file}`: tensor `{tensor}`: unknown dtype `{found}`")]
    UnknownDType {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The dtype as written.
        found: String,
    },

    /// A dtype of the safetensors format has no use in a model's files.
    #[error("unsupported dtype `{found}`")]
    UnsupportedDType {
        /// The dtype, as safetensors names it.
        found: String,
    },

    /// A shape whose size in bytes no machine can address.
    #[error("`{file}`: tensor `{tensor}`: {dtype} of an impossible shape {found:?}")]
    ShapeOverflow {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its dtype.
        dtype: DType,
        /// Its shape.
        found: Vec<usize>,
    },

    /// A tensor does not start where the one before it ends, or ends before it starts.
    #[error(
        "`{file}`: tensor `{tensor}`: expected data offsets that start at {expected}, found {found:?}"
    )]
    Offsets {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Where the tensor before it ends, in bytes.
        expected: usize,
        /// Start and end, in bytes.
        found: (usize, usize),
    },

    /// A tensor's bytes are more or fewer than its dtype and shape need.
    #[error("`{file}`: tensor `{tensor}`: expected {expected} bytes, found {found}")]
    TensorLength {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// What dtype and shape need, in bytes.
        expected: usize,
        /// What is there, in bytes.
        found: usize,
    },

    /// A safetensors file is shorter or longer than its header says.
    #[error(
        "`{file}`: expected {expected} bytes as its header says, found {found}; if the file was downloaded, download it again"
    )]
    FileLength {
        /// The file.
        file: PathBuf,
        /// What the header describes, in bytes.
        expected: u64,
        /// The file's length, in bytes.
        found: u64,
    },

    /// A tensor has a wrong shape.
    #[error("`{file}`: tensor `{tensor}`: expected shape {expected:?}, found {found:?}")]
    Shape {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// The shape its use needs.
        expected: Vec<usize>,
        /// Its shape.
        found: Vec<usize>,
    },

    /// A tensor's dtype is not a floating-point one that needs no scales.
    #[error("`{file}`: tensor `{tensor}`: expected dtype F64, F32, F16 or BF16, found {found}")]
    NotFloat {
        /// The file.
        file: PathBuf,
        /// The tensor.
        tensor: String,
        /// Its dtype.
        found: DType,
    },

    /// A file or folder has no tensor of that name.
    #[error("`{path}`: no tensor `{tensor}`")]
    NoTensor {
        /// The file or folder.
        path: PathBuf,
        /// The requested name.
        tensor: String,
    },

    /// A folder has a tensor under the name that it has inside a wrapper.
    #[error(
        "`{path}`: no tensor `{tensor}`, found `{found}`, its name inside a wrapper; save the model without the wrapper, \
         or rename its tensors"
    )]
    WrappedTensor {
        /// The folder.
        path: PathBuf,
        /// The requested name.
        tensor: String,
        /// The name that there is.
        found: String,
    },

    /// Two files of one model hold a tensor of the same name.
    #[error("tensor `{tensor}`: expected in one file, found in `{first}` and in `{second}`")]
    DuplicateTensor {
        /// The tensor.
        tensor: String,
        /// One file.
        first: PathBuf,
        /// The other.
        second: PathBuf,
    },

    /// An index puts a tensor into a file that does not exist.
    #[error("tensor `{tensor}`: `{index}` puts it into `{file}`, and there is no such file")]
    ShardAbsent {
        /// The index.
        index: PathBuf,
        /// The first tensor it puts there.
        tensor: String,
        /// The file.
        file: PathBuf,
    },

    /// An index puts a tensor into a file that does not hold it.
    #[error("tensor `{tensor}`: `{index}` puts it into `{file}`, which has no such tensor")]
    ShardLacks {
        /// The index.
        index: PathBuf,
        /// The tensor.
        tensor: String,
        /// The file.
        file: PathBuf,
    },

    /// A file name that would lead out of its folder.
    #[error("`{place}`: expected a plain file name, found `{found}`")]
    FileName {
        /// The index or folder that names it.
        place: PathBuf,
        /// The name, escaped.
        found: String,
    },

    /// A folder has no weights this program reads.
    #[error(
        "`{folder}`: expected `model.safetensors.index.json`, `model.safetensors` or one other `.safetensors` file, found {found}"
    )]
    NoWeights {
        /// The folder.
        folder: PathBuf,
        /// Files that look like weights in other formats, or none.
        found: String,
    },

    /// A folder has several weight files and no index.
    #[error(
        "`{folder}`: expected `model.safetensors.index.json` next to several `.safetensors` files, found only {found}"
    )]
    NoIndex {
        /// The folder.
        folder: PathBuf,
        /// The files.
        found: String,
    },

    /// A model is neither a path nor in the local Hugging Face cache.
    #[error("model `{model}`: no such file or folder, {cache}")]
    ModelNotFound {
        /// The model as it was requested.
        model: String,
        /// What the look into the cache gave, with a cure.
        cache: String,
    },

    /// An output is there already.
    #[error("`{path}`: expected no such file or an empty folder, found {found}")]
    OutputExists {
        /// The output.
        path: PathBuf,
        /// What is there.
        found: &'static str,
    },

    /// A file of an output folder was written twice.
    #[error("`{path}`: file written twice")]
    WrittenTwice {
        /// The file.
        path: PathBuf,
    },

    /// The values of a tensor to be written could not be made. For the errors of callers, see
    /// [`FolderWriter::add_shard`](crate::FolderWriter::add_shard).
    #[error("tensor `{tensor}`: {cause}")]
    Produce {
        /// The tensor.
        tensor: String,
        /// What its producer said.
        cause: Box<dyn std::error::Error + Send + Sync>,
    },

    /// An adapter has a setting that this program does not support.
    #[error("`{file}`: unsupported `{key}`: expected {expected}, found {found}")]
    UnsupportedSetting {
        /// The adapter's configuration file.
        file: PathBuf,
        /// The setting.
        key: String,
        /// The supported values.
        expected: &'static str,
        /// Its value, shortened.
        found: String,
    },

    /// An adapter's tensors are stored in a format that can run code when read.
    #[error(
        "`{folder}`: expected `adapter_model.safetensors`, found only `adapter_model.bin`; load it in PEFT and save it again with `safe_serialization=True`"
    )]
    AdapterPickled {
        /// The adapter's folder.
        folder: PathBuf,
    },
}

/// Makes an [`Error::Io`] of an error of the operating system: `.map_err(io("read", path))`.
// This and `shown` are in `train` too, for its own errors: a crate's errors are its own.
pub(crate) fn io(act: &'static str, path: &Path) -> impl FnOnce(std::io::Error) -> Error {
    let path = path.to_owned();
    move |cause| match broken_link(&path, &cause) {
        Some([link, target]) => Error::BrokenLink {
            act,
            path,
            link,
            target,
        },
        None => Error::Io { act, path, cause },
    }
}

/// The link that leads to nothing, and where it leads, if that is why nothing was found at a path: the path itself, or a folder
/// that it is in.
// This is in `data` too: neither crate knows the other.
pub fn broken_link(path: &Path, cause: &std::io::Error) -> Option<[PathBuf; 2]> {
    if cause.kind() != ErrorKind::NotFound {
        return None;
    }
    // The first part of the path that is there.
    let link = path
        .ancestors()
        .find(|path| path.symlink_metadata().is_ok())?;
    let target = link.read_link().ok()?;
    (!link.exists()).then(|| [link.to_owned(), target])
}

/// A link as the subject of a sentence on a path.
fn shown_link(path: &Path, link: &Path) -> String {
    match path == link {
        true => "it".to_owned(),
        false => format!("`{}`", link.display()),
    }
}

/// The beginning of a string from a file, fit for a message: without control characters, which
/// could steer a terminal, and at most 120 characters.
pub(crate) fn shown(text: &str) -> String {
    const MAX_SHOWN_NAME_CHARS: usize = 120;
    let mut shown = String::new();
    for c in text.chars().take(MAX_SHOWN_NAME_CHARS) {
        if c.is_control() {
            shown.extend(c.escape_default());
        } else {
            shown.push(c);
        }
    }
    if text.chars().nth(MAX_SHOWN_NAME_CHARS).is_some() {
        shown.push('…');
    }
    shown
}
