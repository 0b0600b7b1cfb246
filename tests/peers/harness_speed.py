"""Times `moeforge eval --tasks` against lm-evaluation-harness: four-way choice and written answers after five examples, drawn anew for
each question or the same for all.

    python tests/peers/harness_speed.py MODEL MOEFORGE FOLDER [PAIRS]

Needs lm_eval[hf] 0.4.13 with transformers 4. FOLDER gets the tasks and their rows. The harness's seconds are those after its model is
open; moeforge's are those of the whole process. Prints a line of CSV for each pair: task, seconds of both, ratio, the peak memory of
both in MiB, and the tokens that moeforge reads and that it would read without sharing.
"""
import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path

THREADS = 2
# Per task: items, and the batch that was the fastest for the harness.
TASKS = {"choice_fresh": (20, 16), "choice_fixed": (20, 16), "written_fresh": (12, 12), "written_fixed": (12, 12)}
WORDS = "the of in river city machine energy large small water number students system found people common history light answer field science method".split()
COMMON = """dataset_path: json
dataset_kwargs: {data_files: {train: train.jsonl, test: test.jsonl}}
training_split: train
test_split: test
fewshot_split: train
num_fewshot: 5
doc_to_text: "Question: {{question}}\\nAnswer:"
"""
CHOICE = """output_type: multiple_choice
doc_to_choice: choices
doc_to_target: answer
"""
WRITTEN = """output_type: generate_until
doc_to_target: "{{solution}}"
generation_kwargs: {until: ["Question:"], do_sample: false, max_gen_toks: 64}
"""
FIXED = "fewshot_config: {sampler: first_n}\n"


def write(folder: Path) -> None:
    random.seed(3)
    text = lambda n: " ".join(random.choices(WORDS, k=n))
    for name, n in [("train", 50), ("test", 20)]:
        rows = [{"question": text(30) + "?", "choices": [text(6) for _ in range(4)], "answer": random.randrange(4), "solution": text(60)} for _ in range(n)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name in TASKS:
        kind, examples = name.split("_")
        parts = [f"task: {name}\n", COMMON, CHOICE if kind == "choice" else WRITTEN, FIXED if examples == "fixed" else ""]
        (folder / f"{name}.yaml").write_text("".join(parts))


def harness(model: str, folder: Path, task: str) -> None:
    """Runs in a process of its own, and prints seconds and MiB."""
    import resource

    import torch

    torch.set_num_threads(THREADS)
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    os.chdir(folder)
    items, batch = TASKS[task]
    lm = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=batch)
    started = time.time()
    lm_eval.simple_evaluate(model=lm, tasks=[task], task_manager=TaskManager(include_path=str(folder), include_defaults=False), limit=items, bootstrap_iters=0)
    print(time.time() - started, resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024)


def peak(process: subprocess.Popen) -> tuple[str, float]:
    """What a process prints, and its peak memory in MiB."""
    out = process.stdout.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        sys.exit(f"exit status {status}")
    return out, usage.ru_maxrss / 1024


def main(model: str, moeforge: str, folder: Path, pairs: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    write(folder)
    print("task,harness_sec,ours_sec,ratio,harness_mib,ours_mib,read,asked")
    for task in [task for _ in range(pairs) for task in TASKS]:
        words = [sys.executable, __file__, "--harness", model, str(folder), task]
        out = subprocess.run(words, check=True, capture_output=True, text=True).stdout
        theirs, their_mib = map(float, out.split()[-2:])
        words = [moeforge, "eval", model, "--include-path", str(folder), "--tasks", task, "--max-samples", str(TASKS[task][0]), "--threads", str(THREADS), "--json", "--quiet"]
        started = time.time()
        out, our_mib = peak(subprocess.Popen(words, cwd=folder, stdout=subprocess.PIPE, text=True))
        ours = time.time() - started
        found = json.loads(out)["models"][0]["tasks"][0]
        print(f"{task},{theirs:.2f},{ours:.2f},{theirs / ours:.1f},{their_mib:.0f},{our_mib:.0f},{found['read']},{found['asked']}", flush=True)


if __name__ == "__main__":
    if sys.argv[1] == "--harness":
        harness(sys.argv[2], Path(sys.argv[3]), sys.argv[4])
    else:
        absolute = [str(Path(path).resolve()) for path in sys.argv[1:4]]
        main(absolute[0], absolute[1], Path(absolute[2]), int(sys.argv[4]) if len(sys.argv) > 4 else 3)
