"""Makes `peft_kinds/`: adapters that change embeddings, heads and norms, as PEFT writes them, and what PEFT computes with them.

    python tests/goldens/peft_kinds.py

The bases are golden models, and `tied`: `qwen2_distill` without `lm_head.weight`, with `tie_word_embeddings` true. For each
adapter: the logits of the last positions; and the loss, the norm of every trained tensor's gradient, and the losses of AdamW
(PyTorch's defaults, learning rate 1e-3) before and after each of three updates.
"""

import json
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
OUT = HERE / "peft_kinds"
POSITIONS = 2
UPDATES = 3
TOKENS = [277, 3, 301]
KINDS = {
    "head": {"target_modules": ["o_proj", "lm_head"]},
    "embedding": {"target_modules": ["o_proj", "embed_tokens"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"], "use_rslora": True},
    "saved_embedding": {"target_modules": ["o_proj"], "modules_to_save": ["embed_tokens"]},
    "saved_head": {"target_modules": ["o_proj"], "modules_to_save": ["lm_head"]},
    "saved_norms": {"target_modules": ["o_proj"], "modules_to_save": ["norm"]},
    "tokens": {"target_modules": ["o_proj"], "trainable_token_indices": TOKENS},
}
CASES = [(base, kind) for base in ["qwen2_distill", "tied"] for kind in KINDS]
CASES += [("qwen2_distill", "stored_base"), ("deepseek_v3", "embedding"), ("deepseek_v3", "saved_norms")]


def model_of(base):
    folder = HERE / ("qwen2_distill" if base == "tied" else base)
    kwargs = {"dtype": torch.float32, "attn_implementation": "eager", "experts_implementation": "eager"}
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **kwargs)
    if base != "tied":
        return model
    config = transformers.AutoConfig.from_pretrained(folder)
    config.tie_word_embeddings = True
    weights = {name: value for name, value in model.state_dict().items() if name != "lm_head.weight"}
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="eager")
    model.load_state_dict(weights, strict=False)
    model.tie_weights()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    return model


def adapted(base, kind):
    torch.manual_seed(5)
    model = model_of(base)
    settings = KINDS["both" if kind == "stored_base" else kind]
    model = get_peft_model(model, LoraConfig(r=2, lora_alpha=6, task_type="CAUSAL_LM", **settings))
    with torch.no_grad():
        for _, p in model.named_parameters():
            if p.requires_grad:
                p.add_(0.05 * torch.randn_like(p))
        if kind == "stored_base":
            # A base that is another than the published one: PEFT stores it in the adapter.
            embedding = model.get_input_embeddings().base_layer.weight
            embedding.add_(0.05 * torch.randn_like(embedding))
    return model.eval()


def saved_name(key):
    """What PEFT calls a tensor in a file."""
    for part in [".default", ".modules_to_save"]:
        key = key.replace(part, "")
    return key


def make(base, kind):
    name = f"{base}_{kind}"
    folder = OUT / name
    model = adapted(base, kind)
    model.save_pretrained(folder, save_embedding_layers=kind == "stored_base")
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text())
    config["base_model_name_or_path"] = base
    config["target_modules"] = sorted(config["target_modules"])
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    ids = load_file(HERE / ("qwen2_distill" if base == "tied" else base) / "golden.safetensors")["input_ids"][:, :12]
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, -POSITIONS:].contiguous()
    trained = [(key, p) for key, p in model.named_parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW([p for _, p in trained], lr=1e-3)
    losses = []
    for update in range(UPDATES + 1):
        loss = model(input_ids=ids, labels=ids).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        if update == 0:
            norms = {saved_name(key): p.grad.norm().item() for key, p in trained}
        optimizer.step()
    return name, {"losses": losses, "grad_norms": norms}, logits


OUT.mkdir(exist_ok=True)
made = [make(base, kind) for base, kind in CASES]
numbers = {"versions": {m.__name__: m.__version__ for m in [torch, transformers, peft]}}
numbers |= {name: found for name, found, _ in made}
(OUT / "numbers.json").write_text(json.dumps(numbers, indent=1) + "\n")
save_file({name: logits for name, _, logits in made}, OUT / "logits.safetensors")
