"""Compares `moeforge eval --tasks` with lm-evaluation-harness on the harness's own task files, over small rows of the same columns.

    python tests/peers/harness.py MODEL MOEFORGE FOLDER

Needs lm_eval[hf] 0.4.13 with transformers 4. FOLDER gets the rows and the results. Says for each task how far log-likelihoods, metrics
and standard errors are apart, and which prompts differ; ends with 1 if something differs.
"""
import json
import os
import random
import subprocess
import sys
from pathlib import Path

TASKS = ["arc_easy", "mmlu_abstract_algebra", "mmlu_anatomy", "gsm8k", "lambada_openai", "hellaswag", "winogrande", "wikitext", "truthfulqa_mc1", "truthfulqa_mc2", "boolq", "piqa", "sciq", "openbookqa"]
WORDS = "time year people way day man thing woman life child world school state family student group country problem hand part place case week company system program question work government number".split()


def text(low: int, high: int) -> str:
    return " ".join(random.choices(WORDS, k=random.randint(low, high)))


def sentence(low: int = 6, high: int = 14) -> str:
    return text(low, high).capitalize() + "."


def arc() -> dict:
    labels = random.choice([["A", "B", "C", "D"], ["1", "2", "3"]])
    return {"id": text(1, 1), "question": sentence(), "choices": {"text": [text(1, 4) for _ in labels], "label": labels}, "answerKey": random.choice(labels)}


def mmlu() -> dict:
    return {"question": " " + sentence(), "subject": "abstract_algebra", "choices": [text(1, 4) for _ in range(4)], "answer": random.randrange(4)}


def gsm8k() -> dict:
    return {"question": sentence(), "answer": f"{sentence()}\n#### {random.randrange(1000):,}"}


def hellaswag() -> dict:
    return {"activity_label": text(1, 2).title(), "ctx_a": sentence(), "ctx_b": random.choice(["", "the " + text(1, 3)]), "endings": [f"[step] {text(3, 6)}  now [title] {text(2, 3)}." for _ in range(4)], "label": str(random.randrange(4))}


def winogrande() -> dict:
    return {"sentence": f"The {text(2, 4)} because _ was {text(1, 3)}.", "option1": text(1, 2), "option2": text(1, 1), "answer": random.choice("12")}


def wikitext() -> dict:
    lines = [f" = {text(1, 3).title()} = \n", *(f' {sentence()} , ( {text(1, 2)} ) @-@ " {text(2, 3)} " \'s 1 @,@ {random.randrange(1000)} ; = = {text(1, 2)} = = \n' for _ in range(12))]
    return {"page": "\n".join(lines)}


def truthful() -> dict:
    def targets(n: int) -> dict:
        return {"choices": [sentence(3, 6) for _ in range(n)], "labels": [1] + [random.randrange(2) if i else 0 for i in range(n - 1)]}

    return {"question": sentence(), "mc1_targets": targets(4), "mc2_targets": targets(5)}


# Repository: its config, and for each split the number of rows and what makes one.
DATA = {
    "allenai/ai2_arc": ("ARC-Easy", {"train": 20, "validation": 6, "test": 12}, arc),
    "cais/mmlu": (["abstract_algebra", "anatomy"], {"dev": 5, "validation": 3, "test": 10}, mmlu),
    "openai/gsm8k": ("main", {"train": 12, "test": 4}, gsm8k),
    "EleutherAI/lambada_openai": ("default", {"test": 8}, lambda: {"text": text(20, 30)}),
    "Rowan/hellaswag": (None, {"train": 4, "validation": 8}, hellaswag),
    "allenai/winogrande": ("winogrande_xl", {"train": 4, "validation": 10}, winogrande),
    "EleutherAI/wikitext_document_level": ("wikitext-2-raw-v1", {"train": 1, "validation": 1, "test": 3}, wikitext),
    "truthfulqa/truthful_qa": ("multiple_choice", {"validation": 6}, truthful),
    "aps/super_glue": (["boolq"], {}, None),
    "baber/piqa": (None, {"train": 4, "validation": 8}, lambda: {"goal": sentence(), "sol1": text(2, 5), "sol2": text(2, 5), "label": random.randrange(2)}),
    "allenai/sciq": (None, {"train": 4, "validation": 4, "test": 6}, lambda: {"question": sentence(), "support": sentence(), "correct_answer": text(1, 2), "distractor1": text(1, 2), "distractor2": text(1, 2), "distractor3": text(1, 2)}),
    "allenai/openbookqa": ("main", {"train": 4, "validation": 4, "test": 6}, lambda: {"question_stem": sentence(), "choices": {"text": [text(1, 3) for _ in range(4)], "label": list("ABCD")}, "answerKey": random.choice("ABCD")}),
}
SUPER_GLUE = {
    "boolq": lambda: {"passage": sentence(), "question": text(4, 6), "label": random.randrange(2)},
}


def write(folder: Path) -> None:
    random.seed(3)
    for repository, (configs, splits, row) in DATA.items():
        place = folder / repository
        card = []
        for config in configs if isinstance(configs, list) else [configs]:
            make = SUPER_GLUE.get(config, row)
            files = splits or {"train": 4, "validation": 8}
            inner = place / config if config else place
            inner.mkdir(parents=True, exist_ok=True)
            for split, n in files.items():
                (inner / f"{split}.jsonl").write_text("".join(json.dumps(make()) + "\n" for _ in range(n)))
            if config:
                paths = "".join(f"\n  - split: {split}\n    path: {config}/{split}.jsonl" for split in files)
                card.append(f"- config_name: {config}\n  data_files:{paths}")
        if card:
            (place / "README.md").write_text("---\nconfigs:\n" + "\n".join(card) + "\n---\n")


def harness(model: str, folder: Path) -> dict:
    os.environ.update(HF_HUB_OFFLINE="1", HF_DATASETS_OFFLINE="1", HF_DATASETS_CACHE=str(folder / "cache"))
    import lm_eval
    import torch

    torch.set_num_threads(2)
    found = lm_eval.simple_evaluate(model="hf", model_args={"pretrained": model, "dtype": "float32"}, tasks=TASKS, batch_size=4, device="cpu", log_samples=True)
    return {"results": found["results"], "samples": found["samples"], "package": str(Path(lm_eval.__file__).parent)}


def compare(expected: dict, found: Path) -> bool:
    results = json.loads((found / "results.json").read_text())["results"]
    fine = True
    for task in TASKS:
        key = lambda sample: (sample["filter"], sample["doc_id"])  # noqa: E731
        ours = sorted(map(json.loads, (found / f"samples_{task}.jsonl").read_text().splitlines()), key=key)
        theirs = sorted(expected["samples"][task], key=key)
        prompts = sum(a["prompt_hash"] != b["prompt_hash"] for a, b in zip(theirs, ours)) + abs(len(ours) - len(theirs))
        distance, texts = 0.0, 0
        for a, b in zip(theirs, ours):
            for x, y in zip(a["resps"], b["resps"]):
                if isinstance(x[0], str):
                    texts += x[0] != y[0]
                else:
                    number = x[0][0] if isinstance(x[0], (list, tuple)) else x[0]
                    distance = max(distance, abs(float(number) - float(y[0][0])))
        wrong = []
        for name, value in expected["results"][task].items():
            if "," in name:
                other = results[task].get(name)
                same = other == value if isinstance(value, str) or isinstance(other, str) else abs(other - value) <= (5e-5 if "_stderr" in name else 5e-4) * max(1.0, abs(value))
                wrong += [] if same else [(name, value, other)]
        fine &= not prompts and distance < 1e-3 and not texts and not wrong
        print(f"{task}: {len(ours)} samples, {prompts} prompts differ, log-likelihoods within {distance:.1e}, {texts} texts differ, metrics {wrong or 'equal'}")
    return fine


if __name__ == "__main__":
    model, program, folder = str(Path(sys.argv[1]).resolve()), str(Path(sys.argv[2]).resolve()), Path(sys.argv[3]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    write(folder)
    os.chdir(folder)
    expected = harness(model, folder)
    words = [program, "eval", model, "--tasks", ",".join(TASKS), "--include-path", f"{expected['package']}/tasks", "--out", str(folder / "out")]
    subprocess.run(words, check=True)
    sys.exit(0 if compare(expected, folder / "out" / Path(model).name) else 1)
