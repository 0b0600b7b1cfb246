"""Makes `adapter_dora/`, `adapter_rslora/` and `methods.*` of a golden model with PEFT, in float32 on the CPU.

    python tests/goldens/peft_methods.py deepseek_v3 qwen2_distill

For each adapter: the adapter as PEFT writes it, the logits of the last positions, the loss, the norm of every trained
tensor's gradient, and the losses of AdamW (PyTorch's defaults, learning rate 1e-3) before and after each of ten updates.
"""

import json
import sys
from pathlib import Path

import peft
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

HERE = Path(__file__).parent
LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj",
          "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
POSITIONS = 8
UPDATES = 10


def adapted(folder, method):
    """The model with an adapter of random values, and its trained tensors."""
    torch.manual_seed(5)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager")
    names = [name for name, _ in model.named_modules()]
    experts = any(name.endswith("mlp.experts.down_proj") for name, _ in model.named_parameters())
    targets = [name for name in LINEAR if any(path.endswith("." + name) for path in names)]
    if experts and method == "dora":
        targets = targets[:-3]  # PEFT takes these for experts' too, which have no DoRA.
    config = LoraConfig(
        r=2, lora_alpha=6, use_dora=method == "dora", use_rslora=method == "rslora", task_type="CAUSAL_LM",
        target_modules=targets,
        target_parameters=EXPERTS if experts and method == "rslora" else None)
    model = get_peft_model(model, config)
    trained = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    with torch.no_grad():
        for name, p in trained:
            if "magnitude" in name:
                p.mul_(1 + 0.1 * torch.randn_like(p))
            else:
                p.add_(0.05 * torch.randn_like(p))
    return model.eval(), trained


def saved_name(key):
    """What PEFT calls a tensor in a file."""
    return key.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector").replace(".default", "")


def loss_of(model, ids):
    return model(input_ids=ids, labels=ids).loss


def make(name):
    folder = HERE / name
    ids = load_file(folder / "golden.safetensors")["input_ids"]
    numbers, tensors = {"versions": {"torch": torch.__version__, "transformers": transformers.__version__,
                                     "peft": peft.__version__}}, {}
    for method in ["dora", "rslora"]:
        model, trained = adapted(folder, method)
        model.save_pretrained(folder / f"adapter_{method}", save_embedding_layers=False)
        (folder / f"adapter_{method}" / "README.md").unlink(missing_ok=True)
        config_path = folder / f"adapter_{method}" / "adapter_config.json"
        config = json.loads(config_path.read_text())
        config["base_model_name_or_path"] = name
        for key in ["target_modules", "target_parameters"]:
            config[key] = sorted(config[key]) if isinstance(config.get(key), list) else config.get(key)
        config_path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        with torch.no_grad():
            tensors[f"{method}.logits"] = model(input_ids=ids).logits[:, -POSITIONS:].contiguous()
        loss = loss_of(model, ids)
        loss.backward()
        norms = {saved_name(key): p.grad.norm().item() for key, p in trained}
        optimizer = torch.optim.AdamW([p for _, p in trained], lr=1e-3)
        curve = [loss.item()]
        for _ in range(UPDATES):
            optimizer.step()
            optimizer.zero_grad()
            loss = loss_of(model, ids)
            loss.backward()
            curve.append(loss.item())
        numbers[method] = {"loss": curve[0], "grad_norms": norms, "adamw_loss_curve": curve}
    (folder / "methods.json").write_text(json.dumps(numbers, indent=1) + "\n")
    save_file(tensors, folder / "methods.safetensors")


for name in sys.argv[1:]:
    make(name)
