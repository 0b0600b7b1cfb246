"""Makes tests/goldens/config_keys/: what transformers computes when a key of a model's `config.json` is dropped, renamed, of
another type or of another value, one at a time, and with settings of rotary positions and biases that no golden has.

    pip install safetensors torch transformers
    python tests/goldens/config_keys.py

`cases.json` has the cases; `logits.safetensors` has every third logit of two positions for those that transformers computes,
each result once. A case without logits is one that transformers refuses, or that does not fit the weights. What transformers
ignores and other programs obey is computed by hand and named in `own`.
"""

import copy
import json
import pathlib
import warnings

import torch
import transformers
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.deepseek_v2 import modeling_deepseek_v2

warnings.filterwarnings("ignore")
transformers.logging.set_verbosity_error()
HERE = pathlib.Path(__file__).parent
GOLDENS = ["deepseek_v2_lite", "deepseek_v2_group", "deepseek_v3", "qwen2_distill", "llama_distill"]
IDS = torch.tensor([[(7 * i * i + 3 * i + 2) % 256 for i in range(40)]])
POSITIONS = [17, 39]
# Values that mean something, for keys whose type alone does not give any.
OTHERS = {
    "model_type": ["mistral"],
    "hidden_act": ["gelu", "swish"],
    "topk_method": ["greedy", "group_limited_greedy", "noaux_tc"],
    "scoring_func": ["softmax", "sigmoid"],
    "type": ["linear", "dynamic", "default", "llama3", "yarn"],
    "rope_type": ["linear", "dynamic", "default", "llama3", "yarn"],
    "q_lora_rank": [None, 8],
    "rope_theta": [5000.0, 1e6],
    "sliding_window": [2, None],
    "layer_types": [["sliding_attention"] * 3],
    "n_group": [1, 2, None],
    "topk_group": [1, 3, None],
    "num_key_value_heads": [1, None],
}
ROPE = {"rope_scaling", "rope_parameters"}


def changed(key, value):
    if key in OTHERS:
        return [other for other in OTHERS[key] if other != value]
    match value:
        case bool():
            return [not value]
        case int():
            return [value + 1, value * 2]
        case float():
            return [value * 1.5, value * 0.5]
        case str():
            return ["other"]
        case list():
            return [value + value]
        case _:
            return []


def retyped(value):
    return 7 if isinstance(value, str | dict | list) else "7"


def cases_of(config):
    """(path, action, value) of every key; value is null where there is none."""
    for key, value in config.items():
        inner = [([key, k], v) for k, v in value.items()] if key in ROPE and value else []
        for path, v in [([key], value), *inner]:
            yield path, "drop", None
            yield path, "rename", None
            if v is not None:
                yield path, "retype", retyped(v)
            for other in changed(path[-1], v):
                yield path, "change", other


def apply(config, path, action, value):
    config = copy.deepcopy(config)
    holder = config
    for key in path[:-1]:
        holder = holder[key]
    key = path[-1]
    if action == "rename":
        holder[key + "_x"] = holder[key]
    if action in ("drop", "rename"):
        del holder[key]
    else:
        holder[key] = value
    return config


def patched(config, patch):
    config = copy.deepcopy(config)
    for key, value in patch.items():
        if value == "absent":
            config.pop(key, None)
        else:
            config[key] = value
    return config


class Reference:
    def __init__(self, golden):
        self.folder = HERE / golden
        self.config = json.loads((self.folder / "config.json").read_text())
        self.v5 = json.loads((self.folder / "config_v5_style.json").read_text())
        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32, attn_implementation="eager")
        self.state = model.state_dict()

    def logits(self, config, extra=None):
        config = copy.deepcopy(config)
        mapping = CONFIG_MAPPING[config.pop("model_type")].from_dict(config)
        mapping._attn_implementation = "eager"
        mapping._experts_implementation = "eager"
        mapping.dtype = torch.float32
        model = AutoModelForCausalLM.from_config(mapping, attn_implementation="eager").float().eval()
        model.load_state_dict({**self.state, **(extra or {})})
        with torch.no_grad():
            logits = model(IDS).logits[0, POSITIONS, ::3]
        assert logits.isfinite().all()
        return logits.contiguous()


def normalized(self, hidden_states):
    """V2's router with `norm_topk_prob`, as in DeepSeek's own code with a scale of 1, vLLM and llama.cpp."""
    logits, weights, ids = ROUTE(self, hidden_states)
    weights = weights / self.routed_scaling_factor
    return logits, weights / (weights.sum(-1, keepdim=True) + 1e-20) * self.routed_scaling_factor, ids


ROUTE = modeling_deepseek_v2.DeepseekV2TopkRouter.forward


def biases(reference, kinds):
    """Biases of a llama's modules, as a function of their names."""
    extra = {}
    for name, weight in reference.state.items():
        module = name.removesuffix(".weight")
        if name.endswith(".weight") and module.rsplit(".", 1)[-1] in kinds:
            n, seed = weight.shape[0], sum(name.encode())
            extra[module + ".bias"] = torch.tensor([((i * 37 + seed) % 41 - 20) / 80 for i in range(n)])
    return extra


YARN = {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
# Settings that no golden has: golden, name, changes of its config.
VARIANTS = [
    ("qwen2_distill", "linear", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    ("qwen2_distill", "yarn", {"rope_scaling": YARN}),
    ("qwen2_distill", "yarn attention_factor", {"rope_scaling": YARN | {"attention_factor": 1.3}}),
    ("qwen2_distill", "yarn truncate", {"rope_scaling": YARN | {"truncate": False}}),
    ("qwen2_distill", "yarn mscale", {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 0.5}}),
    ("qwen2_distill", "yarn mscale alone", {"rope_scaling": YARN | {"mscale": 2.0}}),
    ("qwen2_distill", "yarn betas", {"rope_scaling": YARN | {"beta_fast": 4, "beta_slow": 0.5}}),
    ("qwen2_distill", "yarn without original", {"rope_scaling": {"type": "yarn", "factor": 4.0}}),
    ("qwen2_distill", "yarn factor null", {"rope_scaling": YARN | {"factor": None}}),
    ("qwen2_distill", "both", {"rope_parameters": {"rope_theta": 10000, "rope_type": "default"}, "rope_scaling": YARN}),
    ("qwen2_distill", "empty scaling", {"rope_scaling": {}, "rope_parameters": YARN | {"rope_theta": 10000}}),
    ("qwen2_distill", "theta in parameters", {"rope_theta": "absent", "rope_parameters": {"rope_theta": 5e5, "rope_type": "default"}}),
    ("qwen2_distill", "original outside", {"rope_scaling": {"type": "yarn", "factor": 4.0}, "original_max_position_embeddings": 16}),
    ("qwen2_distill", "llama3", {"rope_scaling": LLAMA3 | {"low_freq_factor": 1.0, "high_freq_factor": 4.0}}),
    ("llama_distill", "linear", {"rope_scaling": {"rope_type": "linear", "factor": 2.0}}),
    ("llama_distill", "yarn", {"rope_scaling": YARN | {"attention_factor": 0.8, "beta_fast": 16}}),
    ("llama_distill", "low_freq_factor", {"rope_scaling": LLAMA3 | {"low_freq_factor": 1.5, "high_freq_factor": 4.0}}),
    ("llama_distill", "low_freq_factor 2", {"rope_scaling": LLAMA3 | {"low_freq_factor": 2.0, "high_freq_factor": 8.0}}),
    ("deepseek_v3", "attention_factor", {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "attention_factor": 2.0}}),
    ("deepseek_v3", "truncate", {"rope_scaling": YARN | {"mscale": 1.0, "mscale_all_dim": 1.0, "truncate": False}}),
    ("deepseek_v3", "no mscale", {"rope_scaling": YARN}),
    ("deepseek_v3", "linear", {"rope_scaling": {"type": "linear", "factor": 4.0}}),
    ("deepseek_v3", "half-split", {"rope_interleave": False}),
    ("deepseek_v3", "norm", {"norm_topk_prob": False}),
    ("deepseek_v2_lite", "attention_factor", {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7, "attention_factor": 1.2}}),
    ("deepseek_v2_group", "no rope_scaling", {"rope_scaling": None}),
    ("deepseek_v2_group", "betas", {"rope_scaling": YARN | {"mscale": 0.7, "mscale_all_dim": 0.7, "beta_fast": 8}}),
]


def main():
    cases, logits = [], []

    def place(found):
        """The number of a result; equal ones have the same."""
        for i, known in enumerate(logits):
            if known.shape == found.shape and (known - found).abs().max() < 1e-6:
                return i
        logits.append(found)
        return len(logits) - 1

    def result(compute):
        try:
            return place(compute())
        except Exception:
            return None

    for golden in GOLDENS:
        reference = Reference(golden)
        plain = place(reference.logits(reference.config))
        print(golden, plain, flush=True)
        assert place(reference.logits(reference.v5)) == plain
        dialects = [("config.json", reference.config, lambda key: True)]
        new = lambda key: key not in reference.config
        dialects.append(("config_v5_style.json", reference.v5, new))
        for file, config, wanted in dialects:
            for path, action, value in cases_of(config):
                if not wanted(path[0]):
                    continue
                case = {"golden": golden, "file": file, "path": path, "action": action, "value": value}
                case["logits"] = result(lambda: reference.logits(apply(config, path, action, value)))
                if path == ["norm_topk_prob"] and "v2" in golden and action == "change":
                    modeling_deepseek_v2.DeepseekV2TopkRouter.forward = normalized
                    case |= {"logits": place(reference.logits(config)), "own": True}
                    modeling_deepseek_v2.DeepseekV2TopkRouter.forward = ROUTE
                cases.append(case)
        for owner, name, patch in VARIANTS:
            if owner == golden:
                case = {"golden": golden, "file": "config.json", "variant": name, "patch": patch}
                cases.append(case | {"logits": place(reference.logits(patched(reference.config, patch)))})
        if golden == "llama_distill":
            for name, kinds in [("attention_bias", ["q_proj", "k_proj", "v_proj", "o_proj"]), ("mlp_bias", ["gate_proj", "up_proj", "down_proj"])]:
                config = reference.config | {name: True}
                found = place(reference.logits(config, biases(reference, kinds)))
                cases.append({"golden": golden, "file": "config.json", "variant": name, "patch": {name: True}, "biases": kinds, "logits": found})
    out = HERE / "config_keys"
    out.mkdir(exist_ok=True)
    lines = ",\n".join(json.dumps(case) for case in cases)
    ids = IDS[0].tolist()
    head = {"transformers": transformers.__version__, "torch": torch.__version__, "ids": ids, "positions": POSITIONS, "stride": 3}
    (out / "cases.json").write_text(json.dumps(head)[:-1] + ', "cases": [\n' + lines + "\n]}\n")
    save_file({str(i): found for i, found in enumerate(logits)}, out / "logits.safetensors")
    print(len(cases), "cases,", len(logits), "results")


if __name__ == "__main__":
    main()
