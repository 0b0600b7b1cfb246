"""Programs of others that read our outputs. Each is there or not; each reader returns log-probabilities, `[positions, vocabulary]`."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

CONTEXT = 256
"""The shortest context of llama.cpp, of which `llama-perplexity` writes the second half."""


def version(package):
    """The version of a Python package; none if it is not installed."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def log_softmax(logits):
    logits = np.asarray(logits, np.float64)
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def causal(folder):
    """A model of transformers with every tensor of the folder in its place; those of MTP layers, which it does not run, are free."""
    import torch
    import transformers

    settings = {"dtype": torch.float32, "attn_implementation": "eager", "output_loading_info": True}
    with tempfile.TemporaryDirectory() as place:
        if "quantization_config" in json.loads((Path(folder) / "config.json").read_text()):
            folder = decoded(Path(folder), Path(place))
        model, report = transformers.AutoModelForCausalLM.from_pretrained(folder, **settings)
    mtp = f"layers.{model.config.num_hidden_layers}."
    unread = [name for name in report.pop("unexpected_keys") if mtp not in name]
    wrong = {key: sorted(names)[:3] for key, names in report.items() if names}
    if wrong or unread:
        raise RuntimeError(f"transformers: {wrong or ''}; not read: {unread[:3]}")
    return model.eval()


def decoded(folder, place):
    """A folder of block FP8 in f32, decoded by PyTorch as DeepSeek describes its weights.

    transformers' own way on a CPU divides a matrix evenly into as many blocks as there are scales, which is another grid
    where the last block is smaller.
    """
    from safetensors.torch import load_file, save_file

    config = json.loads((folder / "config.json").read_text())
    block = config.pop("quantization_config")["weight_block_size"]
    tensors = {}
    for shard in sorted(folder.glob("*.safetensors")):
        tensors |= load_file(shard)
    for name in [name for name in tensors if name.endswith("_scale_inv")]:
        scales, weight = tensors.pop(name), name.removesuffix("_scale_inv")
        codes = tensors[weight].float()
        for axis in (0, 1):
            scales = scales.repeat_interleave(block[axis], axis).narrow(axis, 0, codes.shape[axis])
        tensors[weight] = codes * scales
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, place / "model.safetensors", {"format": "pt"})
    (place / "config.json").write_text(json.dumps(config))
    return place


def row_of(model, ids):
    import torch

    with torch.no_grad():
        return log_softmax(model(input_ids=torch.tensor([ids])).logits[0].numpy())


def transformers_folder(folder, ids):
    return row_of(causal(folder), ids)


def peft_adapter(folder, adapter, ids):
    """PEFT leaves out what does not fit with a warning, or without one: the numbers tell."""
    import peft

    return row_of(peft.PeftModel.from_pretrained(causal(folder), adapter).eval(), ids)


def mlx_folder(folder, ids):
    import mlx.core as mx
    from mlx_lm.utils import load_model

    model, _ = load_model(Path(folder), lazy=False, strict=False)
    model.set_dtype(mx.float32)
    return log_softmax(np.array(model(mx.array([ids]))[0]))


def llama_tool(name):
    """A program of llama.cpp, in the folder `LLAMA_BIN` or on the path."""
    folder = os.environ.get("LLAMA_BIN")
    found = Path(folder) / name if folder else shutil.which(name)
    return found if found and Path(found).exists() else None


def llama_version():
    tool = llama_tool("llama-perplexity")
    if tool is None:
        return None
    said = subprocess.run([tool, "--version"], capture_output=True, text=True)
    lines = [line for line in (said.stdout + said.stderr).splitlines() if line.startswith("version")]
    return lines[0].removeprefix("version: ") if lines else "unknown"


def llama_file(file, text, place, adapter=None):
    """The ids that llama.cpp reads in a text, and the log-probabilities after the second half of them.

    They come from the file that llama-perplexity writes for its comparison of models: 16 bits each, over a range of 16 nats.
    """
    words, out = place / "text.txt", place / "llama.logits"
    words.write_text(text)
    out.unlink(missing_ok=True)
    command = [llama_tool("llama-perplexity"), "-m", file, "-f", words, "-c", CONTEXT, "-b", CONTEXT, "--chunks", 1, "-t", 2,
               "-ctk", "f32", "-ctv", "f32", "-fa", "off", "--no-repack", "--no-warmup", "--save-all-logits", out]
    command += ["--lora", adapter] if adapter else []
    said = subprocess.run([str(word) for word in command], capture_output=True, text=True)
    if said.returncode or not out.exists():
        errors = [line for line in said.stderr.splitlines() if "error" in line.lower() or "fail" in line.lower()]
        last = [*errors, *said.stderr.splitlines()[-1:], f"ended with code {said.returncode}"]
        raise RuntimeError(f"llama.cpp: {last[0][:200]}")
    raw = out.read_bytes()
    assert raw[:8] == b"_logits_", raw[:8]
    context, vocabulary, chunks = np.frombuffer(raw, np.int32, 3, 8)
    ids = np.frombuffer(raw, np.int32, context * chunks, 20)
    width = 2 * ((vocabulary + 1) // 2) + 4
    codes = np.frombuffer(raw, np.uint16, offset=20 + 4 * context * chunks).reshape(-1, width)
    scale_and_least = codes[:, :4].copy().view(np.float32)
    values = codes[:, 4:4 + vocabulary].astype(np.float64)
    return ids[:context].tolist(), scale_and_least[:, 1:2] + scale_and_least[:, :1] * values


def converter():
    """llama.cpp's converter, in its source tree `LLAMA_SRC`."""
    path = Path(os.environ.get("LLAMA_SRC", "absent")) / "convert_hf_to_gguf.py"
    return path if path.exists() else None


CONVERT = """
import runpy, sys
import conversion.base as base
sys.argv[0] = "convert_hf_to_gguf.py"
# The goldens' vocabularies are made up, so the converter does not know their hash; they are split as DeepSeek-V3's.
for kind in vars(base).values():
    if isinstance(kind, type) and "get_vocab_base_pre" in vars(kind):
        kind.get_vocab_base_pre = lambda self, tokenizer: "deepseek-v3"
runpy.run_path("convert_hf_to_gguf.py", run_name="__main__")
"""


def converted(folder, out, kind="f32"):
    """A folder as a GGUF file of llama.cpp's converter."""
    source = converter().parent
    paths = os.pathsep.join([str(source / "gguf-py"), str(source)])
    environment = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", CONVERT, Path(folder).resolve(), "--outfile", out, "--outtype", kind]
    said = subprocess.run([str(word) for word in command], capture_output=True, text=True, cwd=source, env=environment)
    if said.returncode or not out.exists():
        last = [*said.stderr.strip().splitlines()[-1:], f"ended with code {said.returncode}"]
        raise RuntimeError(f"converter: {last[0][:200]}")
    return out


def gguf_squares(file):
    """The sum of the squares of all weights of a GGUF file, as the `gguf` package decodes them. The factors of llama3's rotary
    frequencies are no weight: a folder has them as settings of its config."""
    import gguf

    total = 0.0
    for tensor in gguf.GGUFReader(file).tensors:
        if tensor.name == "rope_freqs.weight":
            continue
        values = gguf.quants.dequantize(tensor.data, tensor.tensor_type).astype(np.float64)
        total += float((values * values).sum())
    return total


def folder_squares(folder):
    from safetensors.numpy import load_file

    total, shards = 0.0, sorted(Path(folder).glob("*.safetensors"))
    if not shards:
        raise RuntimeError("the folder has no .safetensors file")
    for shard in shards:
        total += sum(float((values.astype(np.float64) ** 2).sum()) for values in load_file(shard).values())
    return total


def card(folder):
    """The metadata of a folder's card, as the Hub's own package reads it."""
    from huggingface_hub import ModelCard

    return ModelCard.load(Path(folder) / "README.md").data.to_dict()


def event_differences(run, lines):
    """Where the losses of a run's event files are not those of its metrics."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(run))
    events.Reload()
    for tag, key in [("train/loss", "loss"), ("eval/loss", "valid_loss")]:
        found = [(event.step, event.value) for event in events.Scalars(tag)]
        expected = [(line["step"], np.float32(line[key])) for line in lines if key in line]
        if found != expected:
            return f"{tag}: {found} instead of {expected}"
    return None
