"""Makes `adapter_mlx/` of a golden model with mlx-lm: an adapter of random values as it saves them, and `mlx.safetensors`, the
logits of the last positions.

    python tests/goldens/mlx_adapters.py deepseek_v2_lite qwen2_distill
"""

import json
import sys
from pathlib import Path

import mlx.core as mx
import mlx_lm
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model, save_config

HERE = Path(__file__).parent
SETTINGS = {"rank": 2, "scale": 3.0, "dropout": 0.0}
POSITIONS = 8


def make(name):
    folder, kind = HERE / name, "dora" if name.startswith("qwen") else "lora"
    out = folder / "adapter_mlx"
    out.mkdir(exist_ok=True)
    ids = mx.load(str(folder / "golden.safetensors"))["input_ids"]
    model, _ = load_model(folder, lazy=False)
    model.set_dtype(mx.float32)
    mx.random.seed(5)
    model.freeze()
    linear_to_lora_layers(model, len(model.layers), SETTINGS, use_dora=kind == "dora")
    trained = dict(tree_flatten(model.trainable_parameters()))
    trained = {key: value * (1 + 0.1 * mx.random.normal(value.shape)) if key.endswith(".m")
               else value + 0.05 * mx.random.normal(value.shape) for key, value in trained.items()}
    model.update(tree_unflatten(list(trained.items())))
    model.eval()
    mx.save_safetensors(str(out / "adapters.safetensors"), trained)
    save_config({"fine_tune_type": kind, "lora_parameters": SETTINGS, "num_layers": len(model.layers), "model": name,
                 "batch_size": 4, "learning_rate": 1e-5, "mlx_lm_version": mlx_lm.__version__},
                out / "adapter_config.json")
    logits = model(ids)[:, -POSITIONS:]
    mx.save_safetensors(str(folder / "mlx.safetensors"), {"logits": logits})
    print(name, {key: value.shape for key, value in list(trained.items())[:12]}, mx.abs(logits).max())


for name in sys.argv[1:]:
    make(name)
