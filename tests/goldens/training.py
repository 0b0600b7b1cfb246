"""Makes `training/`: what transformers' Trainer, PEFT and TRL make of the golden models in a few updates, in float32 on the CPU.

    python tests/goldens/training.py

For each family, `FAMILY.json` has the rows, and for each case the loss and the norm of the gradient before each update, and
what the updates changed: for each trained tensor the norm of its change and the sum of its values at the end.
`FAMILY_lora/` and `FAMILY_dora/` are the adapters that the cases with an adapter start from. `optimizer.json` has torch's AdamW over many updates,
and transformers' schedules.
"""

import json
import logging
import shutil
import sys
import tempfile
from pathlib import Path

import peft
import torch
import transformers
import trl
from datasets import Dataset
from peft import LoraConfig, PeftModel, get_peft_model
from peft.optimizers import create_loraplus_optimizer
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments
from transformers.optimization import get_cosine_schedule_with_warmup, get_linear_schedule_with_warmup
from trl import DPOConfig, DPOTrainer

HERE = Path(__file__).parent
OUT = HERE / "training"
FAMILIES = ["deepseek_v2_lite", "deepseek_v3", "llama_distill", "qwen2_distill"]
VERSIONS = {"torch": torch.__version__, "transformers": transformers.__version__, "peft": peft.__version__,
            "trl": trl.__version__}
UPDATES = 6
SETTINGS = {"learning_rate": 2e-3, "weight_decay": 0.1, "adam_beta1": 0.9, "adam_beta2": 0.95, "adam_epsilon": 1e-8,
            "max_grad_norm": 0.5}
LORAPLUS_RATIO = 4.0
BETA = 0.25
SMOOTHING = 0.1


def rows():
    """Rows of several lengths whose first tokens are not trained, by a linear congruential generator."""
    state, made = 12345, []
    for length in [9, 14, 6, 17, 11, 8, 20, 5]:
        ids = []
        for _ in range(length):
            state = (state * 1103515245 + 12345) % 2**31
            ids.append(3 + (state >> 8) % 200)
        made.append({"input_ids": ids, "labels": [-100] * (length // 3) + ids[length // 3:]})
    return made


def pairs():
    words = "the sun rises over a hill while wind moves the grass and nobody is there to see it all day long".split()
    part = lambda start, n: " ".join(words[(start + i) % len(words)] for i in range(n))
    return [{"prompt": part(3 * i, 4) + ":", "chosen": " " + part(5 * i + 1, 3), "rejected": " " + part(7 * i + 2, 5)}
            for i in range(6)]


def base(family):
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_pretrained(
        HERE / family, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager").eval()


def start_adapter(family, use_dora):
    """An adapter of random values on attention, as PEFT writes it: experts have no copy in TRL, and none with DoRA."""
    folder = OUT / f"{family}_{'dora' if use_dora else 'lora'}"
    model = base(family)
    linear = {name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear) and "self_attn" in name}
    targets = sorted({name.rsplit(".", 1)[1] for name in linear})
    model = get_peft_model(model, LoraConfig(
        r=2, lora_alpha=6, use_dora=use_dora, target_modules=targets, task_type="CAUSAL_LM"))
    torch.manual_seed(5)
    with torch.no_grad():
        for name, p in trained(model):
            if "magnitude" in name:
                p.mul_(1 + 0.1 * torch.randn_like(p))
            else:
                p.add_(0.05 * torch.randn_like(p))
    shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(folder, save_embedding_layers=False)
    (folder / "README.md").unlink(missing_ok=True)
    path = folder / "adapter_config.json"
    config = json.loads(path.read_text()) | {"base_model_name_or_path": family, "target_modules": targets}
    path.write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def trained(model):
    return [(name, p) for name, p in model.named_parameters() if p.requires_grad]


def adapted(family, method):
    """The model with the adapter that a case starts from."""
    folder = OUT / f"{family}_{'dora' if method == 'dora' else 'lora'}"
    with tempfile.TemporaryDirectory() as place:
        copy = Path(shutil.copytree(folder, Path(place) / "adapter"))
        path = copy / "adapter_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"use_rslora": method == "rslora"}))
        return PeftModel.from_pretrained(base(family), copy, is_trainable=True)


def collate(batch):
    width = max(len(row["input_ids"]) for row in batch)
    pad = lambda values, value: values + [value] * (width - len(values))
    return {"input_ids": torch.tensor([pad(row["input_ids"], 0) for row in batch]),
            "labels": torch.tensor([pad(row["labels"], -100) for row in batch]),
            "attention_mask": torch.tensor([pad([1] * len(row["input_ids"]), 0) for row in batch])}


def recording(kind):
    """A trainer that takes rows in order and remembers the loss of every update."""

    class Recording(kind):
        def _get_train_sampler(self, *args, **kwargs):
            return SequentialSampler(self.train_dataset)

        def training_step(self, *args, **kwargs):
            loss = super().training_step(*args, **kwargs)
            self.losses = getattr(self, "losses", []) + [loss.item()]
            return loss

    return Recording


def arguments(kind, place, **more):
    return kind(output_dir=place, max_steps=UPDATES, lr_scheduler_type="constant", logging_steps=1, use_cpu=True,
                save_strategy="no", report_to=[], disable_tqdm=True, dataloader_pin_memory=False, bf16=False,
                gradient_checkpointing=False, seed=0, **SETTINGS, **more)


def figures(trainer, model, before):
    trainer.train()
    per_update = len(trainer.losses) // UPDATES
    losses = [sum(trainer.losses[i * per_update:(i + 1) * per_update]) for i in range(UPDATES)]
    norms = [line["grad_norm"] for line in trainer.state.log_history if "grad_norm" in line]
    change = {}
    for name, p in trained(model):
        if name in before:
            now, then = p.detach().double(), before[name].double()
            change[saved_name(name)] = [(now - then).norm().item(), now.sum().item()]
    return {"losses": losses, "grad_norms": [float(norm) for norm in norms], "tensors": change}


def saved_name(name):
    """What PEFT calls a tensor in a file."""
    return name.replace("lora_magnitude_vector.default.weight", "lora_magnitude_vector").replace(".default", "")


def copies(model):
    return {name: p.detach().clone() for name, p in trained(model)}


def supervised(family, method):
    model = base(family) if method == "full" else adapted(family, method)
    before = copies(model)
    optimizers = (None, None)
    with tempfile.TemporaryDirectory() as place:
        args = arguments(TrainingArguments, place, per_device_train_batch_size=2, gradient_accumulation_steps=2)
        if method == "loraplus":
            optimizer = create_loraplus_optimizer(
                model, torch.optim.AdamW, lr=SETTINGS["learning_rate"], loraplus_lr_ratio=LORAPLUS_RATIO,
                loraplus_weight_decay=SETTINGS["weight_decay"], betas=(0.9, 0.95), eps=1e-8)
            optimizers = (optimizer, None)
        trainer = recording(Trainer)(model=model, args=args, train_dataset=Dataset.from_list(rows()),
                                     data_collator=collate, optimizers=optimizers)
        return figures(trainer, model, before)


def preferences(family, reference, smoothing):
    model = adapted(family, "lora")
    before = copies(model)
    tokenizer = AutoTokenizer.from_pretrained(HERE / family)
    # transformers leaves out the token that `add_bos_token` asks for.
    assert tokenizer("a")["input_ids"][0] != tokenizer.bos_token_id
    begun = [pair | {"prompt": tokenizer.bos_token + pair["prompt"]} for pair in pairs()]
    with tempfile.TemporaryDirectory() as place:
        args = arguments(DPOConfig, place, per_device_train_batch_size=3, beta=BETA,
                         loss_type=["robust"] if smoothing else ["sigmoid"])
        trainer = recording(DPOTrainer)(
            model=model, ref_model=base(family) if reference == "base" else None, args=args,
            train_dataset=Dataset.from_list(begun), processing_class=tokenizer)
        # Robust DPO is ((1 - e) * loss - e * loss of the opposite) / (1 - 2e): with this e it is the conservative loss,
        # (1 - smoothing) * loss + smoothing * loss of the opposite, which TRL has no name for.
        trainer.label_smoothing = -smoothing / (1 - 2 * smoothing)
        found = figures(trainer, model, before)
    logged = [line for line in trainer.state.log_history if "rewards/margins" in line]
    found["margins"] = [line["rewards/margins"] for line in logged]
    return found


def adamw():
    """Values of torch's AdamW after some updates, with gradients that are exact in f32."""
    n, kept, made = 8, [1, 2, 10, 100, 1000], {}
    for beta2 in [0.95, 0.999, 0.9999]:
        p = torch.nn.Parameter(torch.tensor([(i - 3.5) / 4 for i in range(n)]))
        optimizer = torch.optim.AdamW([p], lr=1e-3, betas=(0.9, beta2), eps=1e-8, weight_decay=0.01, foreach=False)
        states = {}
        for update in range(1, max(kept) + 1):
            values = [((i * 7919 + update * 104729) % 2048 - 1024 + 200 * i) / 4096 for i in range(n)]
            p.grad = torch.tensor(values)
            optimizer.step()
            if update in kept:
                state = optimizer.state[p]
                states[update] = {"p": p.tolist(), "m": state["exp_avg"].tolist(), "v": state["exp_avg_sq"].tolist()}
        made[str(beta2)] = states
    return made


def schedules():
    made = []
    for kind, make in [("cosine", get_cosine_schedule_with_warmup), ("linear", get_linear_schedule_with_warmup)]:
        for warmup, total in [(1, 9), (3, 10), (5, 40)]:
            optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=2e-4)
            schedule = make(optimizer, warmup, total)
            rates = []
            for _ in range(total + 1):
                rates.append(schedule.get_last_lr()[0])
                optimizer.step()
                schedule.step()
            made.append({"kind": kind, "warmup": warmup, "total": total, "rates": rates})
    return made


def write(name, value):
    (OUT / name).write_text(json.dumps(value, indent=1) + "\n")


def main():
    logging.disable(logging.WARNING)
    OUT.mkdir(exist_ok=True)
    write("optimizer.json", {"versions": VERSIONS, "adamw": adamw(), "schedules": schedules()})
    for family in sys.argv[1:] or FAMILIES:
        start_adapter(family, use_dora=False)
        start_adapter(family, use_dora=True)
        cases = {method: supervised(family, method) for method in ["full", "lora", "rslora", "dora", "loraplus"]}
        cases["dpo"] = preferences(family, "start", 0.0)
        cases["dpo_smoothed"] = preferences(family, "start", SMOOTHING)
        cases["dpo_base"] = preferences(family, "base", 0.0)
        write(f"{family}.json", {"versions": VERSIONS, "rows": rows(), "pairs": pairs(), "settings": SETTINGS,
                                 "loraplus_ratio": LORAPLUS_RATIO, "beta": BETA, "smoothing": SMOOTHING, "cases": cases})


main()
