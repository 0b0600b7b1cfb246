"""Makes `peft_reads/`: adapters that moeforge writes, and what PEFT computes with them.

    python tests/goldens/peft_reads.py BINARY

Trains small adapters on golden models with the program and opens them with PEFT on transformers. Fails if PEFT computes other
logits than the program, or if it misses or invents a tensor; then what the program says of such an adapter has to be in its
`moeforge.json`. Checked in are the adapters and PEFT's logits, so that the project's own tests hold both.
"""

import json
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

import peft
import torch
import transformers
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
OUT = HERE / "peft_reads"
TOLERANCE = 2e-5  # of logits, relative to the largest
POSITIONS = 2
MIXTURES = ["deepseek_v2_lite", "deepseek_v2_group", "deepseek_v3"]
ATTENTION = '["q_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"]'
# Lines of the recipe's [lora]; the second element says whether PEFT can read it.
MIXTURE_CASES = {
    "default": ("", True),
    "rslora": ("use_rslora = true", True),
    "ranks": ('rank_pattern = { experts = 3, "layers.0.mlp" = 1 }\nalpha_pattern = { shared_experts = 5.0 }', True),
    "no_experts": ('exclude = ["experts"]', True),
    "experts": ('target = ["experts"]', True),
    "one_layer": ('target = ["layers.1"]', True),
    "dropout": ("dropout = 0.1", True),
    "shared_factors": ('experts_share = "outer"', True),
    "dora_experts": ('use_dora = true\nexclude = ["experts"]', False),
    "dora_attention": ('use_dora = true\nexclude = ["mlp"]', True),
    "single_experts": ('target = ["layers.1.mlp.experts.0", "layers.1.mlp.experts.2"]', False),
    "fused": ("adapter_peft", True),
    "fused_rslora": ("adapter_rslora", True),
    "half": ('target = ["experts.gate_proj", "experts.down_proj"]', False),
}
DENSE_CASES = {
    "default": ("", True),
    "dora": ("use_dora = true", True),
    "whole": ('target = ["all-linear", "embed_tokens", "lm_head"]', True),
}
CHECKED_IN = {"default", "fused", "fused_rslora", "rslora", "ranks", "no_experts", "whole", "dora_experts", "single_experts"}


def trained(binary, base, lora, place):
    """An adapter of three steps: a fresh one, or one of the golden's own in PEFT's stacked form, trained further."""
    start = f'adapter = "{HERE / base / lora}"' if lora.startswith("adapter_") else ""
    lora = f"[lora]\n{'' if start else 'rank = 2'}\n{'' if start else 'alpha = 6.0'}\n{'' if start else lora}\n"
    rows = place / "train.jsonl"
    rows.write_text("".join(json.dumps({"input_ids": list(range(at + 3, at + 19))}) + "\n" for at in range(8)))
    recipe = place / "recipe.toml"
    recipe.write_text(
        f'[model]\npath = "{HERE / base}"\n{start}\n[data]\npath = "{place}"\n{lora}'
        "[optimizer]\nlearning_rate = 3e-2\n[train]\nsteps = 3\nbatch_size = 4\n")
    done = subprocess.run([binary, "train", recipe, "--out", place / "run"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return place / "run" / "adapter", done.stderr


def with_peft(base, adapter, ids):
    """PEFT's logits, or what it says against the adapter."""
    model = transformers.AutoModelForCausalLM.from_pretrained(
        HERE / base, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            model = peft.PeftModel.from_pretrained(model, adapter).eval()
        except (ValueError, KeyError, RuntimeError) as error:
            return None, f"{type(error).__name__}: {error}"
    said = [str(w.message) for w in said if "missing" in str(w.message).lower() or "unexpected" in str(w.message).lower()]
    with torch.no_grad():
        return model(input_ids=ids).logits, "; ".join(said)


def check(binary, base, case, lora, readable):
    with tempfile.TemporaryDirectory() as place:
        place = Path(place)
        adapter, said = trained(binary, base, lora, place)
        ids = load_file(HERE / base / "golden.safetensors")["input_ids"][:1, :12]
        (place / "ids.json").write_text(json.dumps({"input_ids": ids.tolist()}))
        out = place / "logits.safetensors"
        subprocess.run([binary, "logits", HERE / base, "--ids", place / "ids.json", "--adapter", adapter, "--out", out],
                       check=True, capture_output=True)
        ours = load_file(out)["logits"].reshape(1, 12, -1)
        theirs, problem = with_peft(base, adapter, ids)
        off = None if theirs is None else ((theirs - ours).abs().max() / ours.abs().max()).item()
        notes = adapter / "moeforge.json"
        noted = notes.exists() and "unread_by_peft" in json.loads(notes.read_text())
        read = off is not None and off <= TOLERANCE
        good = read == readable and noted != readable and (readable or "PEFT" in said)
        print(f"{'ok' if good else 'FAIL'} {base} {case}: off by {off}, noted {noted}, {problem[:160]}", flush=True)
        name = f"{base}_{case}"
        if good and case in CHECKED_IN and base != "deepseek_v2_group":
            shutil.rmtree(OUT / name, ignore_errors=True)
            shutil.copytree(adapter, OUT / name)
            config = OUT / name / "adapter_config.json"
            config.write_text(config.read_text().replace(str(HERE / base), base))
        return good, name, theirs


OUT.mkdir(exist_ok=True)
found = [check(sys.argv[1], base, case, *settings) for base in MIXTURES for case, settings in MIXTURE_CASES.items()
         if not settings[0].startswith("adapter_") or (HERE / base / settings[0]).exists()]
found += [check(sys.argv[1], base, case, *settings)
          for base in ["qwen2_distill", "llama_distill"] for case, settings in DENSE_CASES.items()]
logits = {name: theirs[:, -POSITIONS:].contiguous() for _, name, theirs in found
          if theirs is not None and (OUT / name).exists()}
versions = {m.__name__: m.__version__ for m in [torch, transformers, peft]}
save_file(logits, OUT / "logits.safetensors", {"versions": json.dumps(versions)})
print(f"{sum(good for good, *_ in found)} of {len(found)}")
sys.exit(not all(good for good, *_ in found))
