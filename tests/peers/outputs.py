"""What moeforge writes of a golden model: folders, GGUF files, a trained adapter, and what is made of that."""

import json
import random
import shutil
import subprocess
from pathlib import Path

GOLDENS = Path(__file__).resolve().parent.parent / "goldens"
FAMILIES = ["deepseek_v2_lite", "deepseek_v2_group", "deepseek_v3", "deepseek_v3_fp8", "qwen2_distill", "llama_distill"]
FOLDERS = ["bf16", "f32", "fp8"]
FILES = ["f32", "bf16", "f16", "q8_0", "q5_0", "q4_0", "q4_k_m"]
IDS = 64
"""Ids of the one row that folders and adapters are compared on."""

RECIPE = """model.path = {model}
data.path = {data}
lora.rank = 2
lora.alpha = 6
optimizer.learning_rate = 0.02
train.steps = 4
train.batch_size = 2
"""


VARIANTS = {
    "v2_lite_27_layers": ("deepseek_v2_lite", {"num_hidden_layers": 27}),
    "v3_other_ramp": ("deepseek_v3", {"rope_scaling": {"beta_fast": 0.5, "beta_slow": 0.1}}),
    "v3_other_factor": ("deepseek_v3", {"rope_scaling": {"mscale": 0.5}}),
    "v3_ungrouped": ("deepseek_v3", {"n_group": 1, "topk_group": 1}),
    "qwen2_tied": ("qwen2_distill", {"tie_word_embeddings": True}),
    "qwen2_yarn": ("qwen2_distill", {"rope_scaling": {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}}),
    "llama_low_freq": ("llama_distill", {"rope_scaling": {"low_freq_factor": 2.0, "original_max_position_embeddings": 512}}),
    "llama_linear": ("llama_distill", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    "llama_tied": ("llama_distill", {"tie_word_embeddings": True}),
}
"""A golden with other settings, by name. Settings of `rope_scaling` of the same type join the golden's."""


def variant(name, place):
    """The folder of a golden with other settings, made below `place`."""
    family, changes = VARIANTS[name]
    out = place / "base"
    shutil.copytree(GOLDENS / family, out, ignore=shutil.ignore_patterns("golden*", "adapter*", "methods*", "mlx*", "config_v5*"))
    config = json.loads((out / "config.json").read_text())
    rope, changed = config.get("rope_scaling") or {}, changes.get("rope_scaling", {})
    layers = config["num_hidden_layers"]
    config |= changes
    if changed:
        config["rope_scaling"] = changed if "rope_type" in changed else rope | changed
    (out / "config.json").write_text(json.dumps(config, indent=2))
    if config["num_hidden_layers"] > layers or config["tie_word_embeddings"]:
        rewrite(out, config, layers)
    return out


def rewrite(folder, config, layers):
    """Repeats the last two layers up to the config's number, and drops the head of a tied model."""
    from safetensors.torch import load_file, save_file

    path = folder / "model.safetensors"
    tensors = load_file(path)
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
    for layer in range(layers, config["num_hidden_layers"]):
        source = f"model.layers.{layers - 1 - (layer - layers) % 2}."
        copies = [key for key in tensors if key.startswith(source)]
        tensors |= {key.replace(source, f"model.layers.{layer}."): tensors[key].clone() for key in copies}
    save_file(tensors, path, {"format": "pt"})


class Refused(RuntimeError):
    """moeforge ended with an error."""


class Outputs:
    """Makes outputs of one golden model, or of a variant of one, below a folder, each at most once."""

    def __init__(self, moeforge, family, place):
        place.mkdir(parents=True, exist_ok=True)
        self.moeforge, self.place, self.said = moeforge, place, {}
        self.base = variant(family, place) if family in VARIANTS else GOLDENS / family
        vocabulary = json.loads((self.base / "config.json").read_text())["vocab_size"]
        self.ids = [(7 * i * i + 3 * i) % vocabulary for i in range(IDS)]

    def run(self, *words):
        """Runs a verb; an error of it is one of the check."""
        result = subprocess.run([str(word) for word in (self.moeforge, *words)], capture_output=True, text=True)
        if result.returncode:
            raise Refused(f"moeforge {words[0]}: {(result.stderr.strip().splitlines() or ['no message'])[-1]}")
        return result

    def once(self, name, *words):
        out = self.place / name
        if not out.exists():
            self.said[out] = self.run(*words, "--out", out).stderr
        return out

    def folder(self, kind):
        return self.once(f"hf-{kind}", "quantize", self.base, "--to", f"hf:{kind}")

    def file(self, kind):
        return self.once(f"{kind}.gguf", "quantize", self.base, "--to", f"gguf:{kind}")

    def folder_of_file(self):
        return self.once("hf-of-gguf", "quantize", self.file("f32"), "--to", "hf:f32")

    def adapter(self, *settings):
        """An adapter that was trained for a few steps, with what a recipe sets besides."""
        name = "run" + "".join("-" + "".join(c for c in setting if c.isalnum()) for setting in settings)
        data, recipe = self.place / "data", self.place / "recipe.toml"
        if not data.exists():
            data.mkdir()
            rows = [{"prompt": f"the {i} and", "completion": f" the end of {i * i}"} for i in range(16)]
            for split, rows in [("train", rows), ("valid", rows[:4])]:
                (data / f"{split}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            recipe.write_text(RECIPE.format(model=json.dumps(str(self.base)), data=json.dumps(str(data))))
        options = [word for setting in settings for word in ("--set", setting)]
        return self.once(name, "train", recipe, *options) / "adapter"

    def merged(self, adapter, kind):
        return self.once(f"{adapter.parent.name}-{adapter.name}-{kind}", "merge", self.base, "--adapter", adapter, "--dtype", f"hf:{kind}")

    def adapter_file(self, adapter):
        return self.once(f"{adapter.parent.name}-{adapter.name}.gguf", "export-adapter", self.base, "--adapter", adapter)

    def logits(self, model, ids, *options):
        """moeforge's own logits of one row, `[ids, vocabulary]`."""
        from safetensors.numpy import load_file

        row, out = self.place / "ids.json", self.place / "logits.safetensors"
        row.write_text(json.dumps({"input_ids": [ids]}))
        out.unlink(missing_ok=True)
        self.said[model] = self.said.get(model, "") + self.run("logits", model, "--ids", row, "--out", out, *options).stderr
        return load_file(out)["logits"][0]


def words(n):
    """A text without meaning, the same every time."""
    order = random.Random(5)
    known = "the and of to in is that it was for on are with as his they at be this from have or by one had not but".split()
    return " ".join(order.choice(known) for _ in range(n))
