"""Makes tests/goldens/others/: models and adapters as other programs write them, and the numbers of the programs that wrote them.

    LLAMA_BIN=… LLAMA_SRC=… python tests/goldens/others.py

`LLAMA_BIN` has llama.cpp's programs, `LLAMA_SRC` is its source tree with the converter. The models are made up here, each of two
layers; transformers saves them in its layout of today (`rope_parameters`, tied weights left out, shards), llama.cpp's converter
makes GGUF files of those, its llama-quantize one more, mlx-lm folders of 4 and 8 bits, and PEFT adapters with modules that are
saved whole and with single tokens.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import transformers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent / "peers"))

import readers  # noqa: E402
from check import EXACT, ROUNDED, STEPS, TEXT, numbers  # noqa: E402

OUT = HERE / "others"
TOKENIZER = HERE / "qwen2_distill"
IDS = [(7 * i * i + 3 * i) % 320 for i in range(64)]
DENSE = {"vocab_size": 320, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 512,
         "bos_token_id": 0, "eos_token_id": 1, "intermediate_size": 64, "attn_implementation": "eager"}
LATENT = {"num_key_value_heads": 4, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
          "n_routed_experts": 4, "num_experts_per_tok": 2, "n_shared_experts": 1, "moe_intermediate_size": 32,
          "first_k_dense_replace": 1, "routed_scaling_factor": 1.5}
YARN = {"rope_type": "yarn", "rope_theta": 10000.0, "factor": 8.0, "original_max_position_embeddings": 64, "mscale": 0.7,
        "mscale_all_dim": 0.7}
STRETCHED = {"rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
             "original_max_position_embeddings": 64}
MODELS = {
    "llama": ("Llama", {"num_key_value_heads": 2, "rope_parameters": STRETCHED}),
    "llama_tied": ("Llama", {"num_key_value_heads": 4, "tie_word_embeddings": True}),
    "qwen2": ("Qwen2", {"num_key_value_heads": 2, "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0}}),
    "qwen2_tied": ("Qwen2", {"num_key_value_heads": 1, "tie_word_embeddings": True}),
    "deepseek_v2": ("DeepseekV2", {**LATENT, "q_lora_rank": 24, "topk_method": "greedy", "n_group": 1, "topk_group": 1}),
    "deepseek_v3": ("DeepseekV3", {**LATENT, "q_lora_rank": 24, "n_group": 2, "topk_group": 1, "norm_topk_prob": True,
                                   "rope_parameters": YARN}),
}
SHARDED = ["deepseek_v3", "qwen2"]
LINES = []


def keep(line, found, ids, bar, compute="f32"):
    """A line of the golden, as tests/peers/check.py writes them."""
    at = "median" if bar in ROUNDED.values() else "all"
    row = f"{len(ids)} {sum(ids)}"
    ROWS[row] = ids
    LINES.append({**line, "tolerance": bar, "at": at, "row": row, "compute": compute, **numbers(found, ids)})
    print(line)


ROWS = {}


def random_model(kind, settings):
    """A model whose logits spread over about ten, with weights that bf16 holds exactly."""
    torch.manual_seed(7)
    config = getattr(transformers, f"{kind}Config")(**{**DENSE, **settings})
    model = getattr(transformers, f"{kind}ForCausalLM")(config)
    with torch.no_grad():
        for name, values in [*model.named_parameters(), *model.named_buffers()]:
            if "inv_freq" in name:
                continue
            fan = values.shape[-1] ** -0.5 if values.dim() > 1 else 0.1
            fresh = torch.randn_like(values) * (0.5 if "embed" in name else fan * 1.5) + (values.dim() == 1 and "norm" in name)
            values.copy_(fresh.to(torch.bfloat16))
    return model.eval()


def saved(name, place):
    """The folder that transformers writes, in bf16, and its numbers of the same weights in f32."""
    kind, settings = MODELS[name]
    folder = place / name
    model = random_model(kind, settings).to(torch.bfloat16)
    model.save_pretrained(folder, max_shard_size="60KB" if name in SHARDED else "1GB")
    (folder / "generation_config.json").unlink(missing_ok=True)
    shutil.copytree(folder, OUT / name)
    found = readers.row_of(readers.causal(folder), IDS)
    keep({"open": name, "writer": f"transformers {transformers.__version__}"}, found, IDS, EXACT)
    for file in ["tokenizer.json", "tokenizer_config.json"]:
        shutil.copy(TOKENIZER / file, folder)
    if name == "deepseek_v3":
        # transformers leaves these out, and the converter does not know that they are always the same.
        config = json.loads((folder / "config.json").read_text())
        config |= {"scoring_func": "sigmoid", "topk_method": "noaux_tc"}
        (folder / "config.json").write_text(json.dumps(config))
    return folder


def as_gguf(name, folder, place):
    """The file of llama.cpp's converter. Of V2 it opens only those with as many layers as the published ones."""
    kind = {"qwen2": "f16", "deepseek_v3": "bf16", "llama": "q8_0"}.get(name, "f32")
    file = readers.converted(folder, OUT / f"{name}_{kind}.gguf", kind)
    writer = f"convert_hf_to_gguf.py of llama.cpp {readers.llama_version()}"
    ids, found = readers.llama_file(file, TEXT, place)
    compute = "int8" if kind == "q8_0" else "f32"
    keep({"open": file.name, "writer": writer}, found, ids, ROUNDED.get(kind, STEPS), compute)
    if name == "llama_tied":
        coded = OUT / "llama_tied_q4_0.gguf"
        subprocess.run([readers.llama_tool("llama-quantize"), "--pure", file, coded, "q4_0"], check=True, capture_output=True)
        file.unlink()
        LINES.pop()
        ids, found = readers.llama_file(coded, TEXT, place)
        keep({"open": coded.name, "writer": f"llama-quantize of {writer.split(' of ')[1]}"}, found, ids, ROUNDED["q4_0"], "int8")


def of_mlx(folder):
    """Folders of 4 and 8 bits, in groups of 32."""
    import mlx.core as mx
    import mlx_lm
    import numpy as np

    for bits in (4, 8):
        out = OUT / f"llama_mlx_{bits}"
        mlx_lm.convert(str(folder), mlx_path=str(out), quantize=True, q_bits=bits, q_group_size=32)
        for file in out.iterdir():
            if not file.name.startswith(("config", "model")):
                file.unlink()
        model, _ = mlx_lm.utils.load_model(out, lazy=False)
        found = readers.log_softmax(np.array(model(mx.array([IDS]))[0].astype(mx.float32)))
        keep({"open": out.name, "writer": f"mlx-lm {mlx_lm.__version__}", "may_refuse": "quantiz"}, found, IDS, ROUNDED["bf16"])


def of_peft(folder):
    """Adapters that save modules whole and that train single tokens."""
    import peft

    settings = {
        "plain": {},
        "saved": {"modules_to_save": ["lm_head", "embed_tokens"]},
        "tokens": {"trainable_token_indices": [3, 7]},
        "head": {"target_modules": ["q_proj", "lm_head"]},
    }
    for name, changes in settings.items():
        torch.manual_seed(5)
        config = peft.LoraConfig(**{"r": 2, "lora_alpha": 6, "task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"], **changes})
        model = peft.get_peft_model(readers.causal(folder), config)
        with torch.no_grad():
            for values in (values for values in model.parameters() if values.requires_grad):
                values.add_(0.1 * torch.randn_like(values))
        out = OUT / f"qwen2_adapter_{name}"
        model.save_pretrained(out)
        (out / "README.md").unlink()
        written = json.loads((out / "adapter_config.json").read_text())
        written["base_model_name_or_path"] = "qwen2"
        written["target_modules"] = sorted(written["target_modules"])
        (out / "adapter_config.json").write_text(json.dumps(written, indent=2, sort_keys=True) + "\n")
        found = readers.row_of(model.eval(), IDS)
        keep({"open": "qwen2", "adapter": out.name, "writer": f"PEFT {peft.__version__}"}, found, IDS, EXACT)


def main():
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        for name in MODELS:
            folder = saved(name, place)
            if name not in ("deepseek_v2", "qwen2_tied"):
                as_gguf(name, folder, place)
            if name == "llama":
                of_mlx(folder)
            if name == "qwen2":
                of_peft(folder)
    text = json.dumps(ROWS), ",\n".join(json.dumps(line) for line in LINES)
    (OUT / "golden.json").write_text(f'{{"rows": {text[0]},\n"read": [\n{text[1]}\n]}}\n')


main()
