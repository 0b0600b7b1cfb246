"""Makes tests/goldens/harness_tasks/: tasks, their rows, what the evaluation harness asks about each (prompts and continuations), and
what three models answer: log-likelihoods or texts, metrics and standard errors.

    HF_HUB_OFFLINE=1 python tests/goldens/harness_tasks.py tests/goldens/harness_tasks

Needs lm_eval[hf] 0.4.13 with transformers 4: transformers 5 does not read the tokenizers of the models as their files have them.
"""
import json
import random
import sys
from pathlib import Path

ROWS = {
    "choice": [
        {"question": f"What is {a} + {b}?", "choices": [str(a + b), str(a * b + 1), f"it's \"{a}\"", "é\n"][: 2 + (a + b) % 3], "answer": (a * b) % 2, "letter": "AB"[(a * b) % 2]}
        for a in range(4) for b in range(4)
    ],
    "blank": [
        {"sentence": f"The {x} was too {y} because _ was {z}.", "option1": f"the {x}", "option2": "it", "answer": str(1 + i % 2)}
        for i, (x, y, z) in enumerate([("cat", "fat", "big"), ("box", "red", "old"), ("sun", "hot", "near"), ("sea", "deep", "wide")])
    ],
    "long": [
        {"text": " ".join(f"Sentence {i} of {n} is {'short' if i % 3 else 'a little longer than the others'}." for i in range(n))}
        for n in (3, 17, 25)
    ],
    "text": [
        {"title": t, "text": s, "answers": a, "year": y}
        for t, s, a, y in [("One", "A first text.\nTwo lines. ", ["yes", "y"], 1901), ("Two", " Unicode: naïve café", ["no"], 2024), ("Three", "ends here", ["ends"], 7)]
    ],
}
TASKS = {
    "arc_like": ("choice", """
        output_type: multiple_choice
        doc_to_text: "Question: {{question}}\\nAnswer:"
        doc_to_target: "{{answer}}"
        doc_to_choice: "{{choices}}"
        num_fewshot: 3
        fewshot_split: test
        metric_list:
          - {metric: acc, aggregation: mean, higher_is_better: true}
          - {metric: acc_norm, aggregation: mean, higher_is_better: true}
    """),
    "mmlu_like": ("choice", """
        output_type: multiple_choice
        description: "The following are questions about {{letter}}.\\n\\n"
        doc_to_text: "{{question.strip()}}\\nA. {{choices[0]}}\\nB. {{choices[1]}}\\nAnswer:"
        doc_to_target: answer
        doc_to_choice: ["A", "B"]
        num_fewshot: 2
        fewshot_split: train
        fewshot_config: {sampler: first_n}
    """),
    "mapped": ("choice", """
        output_type: multiple_choice
        doc_to_text: question
        doc_to_target: letter
        doc_to_choice: {0: A, 1: B}
        target_delimiter: ""
        metric_list: [{metric: acc}, {metric: acc_mutual_info}, {metric: acc_bytes}]
    """),
    "winogrande_like": ("blank", """
        output_type: multiple_choice
        doc_to_text: "{% if answer == '1' %}0{% else %}1{% endif %}"
        doc_to_target: "{{sentence.split('_')[1].strip()}}"
        doc_to_choice: "{{[sentence.split('_')[0] + option1, sentence.split('_')[0] + option2]}}"
        num_fewshot: 1
        fewshot_split: train
    """),
    "lambada_like": ("text", """
        output_type: loglikelihood
        doc_to_text: "{{text.split(' ')[:-1]|join(' ')}}"
        doc_to_target: "{{' '+text.split(' ')[-1]}}"
        metric_list: [{metric: perplexity}, {metric: acc}]
    """),
    "rolling": ("text", """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: text
    """),
    "gsm_like": ("text", """
        output_type: generate_until
        description: "Answer."
        doc_to_text: "Q: {{title}} {{year + 1}}\\nA:"
        doc_to_target: "{{text}}"
        gen_prefix: "The answer is"
        fewshot_delimiter: "\\n--\\n"
        fewshot_config:
          samples:
            - {title: "T", text: "shown", year: 1}
            - {title: "U", text: " spaced", year: 22}
        num_fewshot: 2
        generation_kwargs: {until: ["\\n", "Q:"], do_sample: false, max_gen_toks: 9}
        filter_list:
          - name: strict
            filter: [{function: regex, regex_pattern: "(\\\\d+)\\\\Z", group_select: -1}, {function: take_first}]
    """),
    "answers": ("text", """
        output_type: generate_until
        doc_to_text: "{{title}}\\n{%- if year > 2000 %} new{% endif %}\\n"
        doc_to_target: "{{answers}}"
        generation_kwargs: {until: ["a"], max_gen_toks: 12}
        filter_list:
          - name: none
            filter: [{function: take_first}]
          - name: mapped
            filter: [{function: remove_whitespace}, {function: map, mapping_dict: {never: 1}, default_value: "Y"}, {function: take_first}]
        metric_list: [{metric: exact_match, ignore_case: true}]
    """),
    "votes": ("text", """
        output_type: generate_until
        doc_to_text: "{{title}}"
        doc_to_target: "{{year}}"
        repeats: 3
        generation_kwargs: {until: ["e"], max_gen_toks: 5}
        filter_list:
          - name: vote
            filter: [{function: take_first_k, k: 2}, {function: uppercase}, {function: majority_vote}, {function: take_first}]
    """),
    "windows": ("long", """
        output_type: loglikelihood_rolling
        doc_to_text: ""
        doc_to_target: "{{text}}"
    """),
    "cut": ("long", """
        output_type: loglikelihood
        doc_to_text: "{{text}}"
        doc_to_target: " the end"
    """),
    "labels": ("choice", """
        output_type: multiple_choice
        doc_to_text: "{{question}}\\n"
        doc_to_target: "{{letter}}"
        doc_to_choice: ["A", "B"]
        metric_list: [{metric: f1}, {metric: mcc}, {metric: exact_match}]
    """),
    "translated": ("text", """
        output_type: generate_until
        doc_to_text: "{{title}}"
        doc_to_target: "{{text}}"
        generation_kwargs: {until: ["e"], max_gen_toks: 2}
        filter_list:
          - name: same
            filter: [{function: map, mapping_dict: {never: 1}, default_value: "A first text ends here in a naïve café of two lines"}, {function: take_first}]
        metric_list: [{metric: bleu}, {metric: chrf}, {metric: ter}]
    """),
    "inherited": ("choice", """
        include: arc_like.yaml
        num_fewshot: 0
        doc_to_choice: "{{['x ' ~ choices[0], choices[-1]]}}"
    """),
}


def write(folder: Path) -> None:
    import textwrap

    for name, rows in ROWS.items():
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        (folder / f"{name}.jsonl").write_text("".join(lines))
    for name, (rows, text) in TASKS.items():
        text = textwrap.dedent(text).strip() + "\n"
        if "include" not in text:
            files = f"dataset_path: json\ndataset_kwargs: {{data_files: {{train: {rows}.jsonl, test: {rows}.jsonl}}}}\ntest_split: test\ntraining_split: train\n"
            text = files + text
        (folder / f"{name}.yaml").write_text(f"task: {name}\n" + text)


# A chat template with a system message, a switch for thoughts, and answers without white space around them.
CHAT_TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'system' %}{{ m.content }}\n\n{% elif m.role == 'user' %}"
    "User: {{ m.content }}\n{% else %}Assistant: {{ m.content | trim }}{{ eos_token }}\n{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}Assistant:{% if enable_thinking is defined and not enable_thinking %}</think>{% endif %}{% endif %}"
)
SYSTEM = "Answer well."
# Conversations: whether examples are turns, the system message, and whether thoughts are on or off.
CHATS = {
    "turns": (True, None, None),
    "system": (True, SYSTEM, None),
    "one message": (False, SYSTEM, False),
}


def chats(folder: Path, model: Path) -> dict:
    """What the harness asks in conversations: by kind of conversation and task, prompts and continuations."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model)
    tokenizer.chat_template = CHAT_TEMPLATE
    found = {}
    for name, (turns, system, thinking) in CHATS.items():
        def render(messages, add_generation_prompt=True):
            options = {} if thinking is None else {"enable_thinking": thinking}
            return tokenizer.apply_chat_template(
                messages,
                tokenize=False,
                add_generation_prompt=add_generation_prompt,
                continue_final_message=not add_generation_prompt,
                **options,
            )

        found[name] = asked(folder, {"apply_chat_template": True, "fewshot_as_multiturn": turns, "chat_template": render}, system)
    return found


def asked(folder: Path, chat: dict = {}, system: str | None = None) -> dict:
    import os

    from lm_eval.tasks import TaskManager

    os.chdir(folder)
    tasks = TaskManager(include_path=str(folder), include_defaults=False).load(sorted(TASKS))
    tasks = tasks["tasks"] if "tasks" in tasks else tasks
    found = {}
    for name, task in tasks.items():
        task.set_fewshot_seed(1234)
        count = task.config.num_fewshot or 0
        questions = []
        for doc in task.eval_docs:
            prefix = task.doc_to_prefix(doc)
            context = task.fewshot_context(doc, num_fewshot=count, gen_prefix=prefix, system_instruction=system, **chat)
            requests = task.construct_requests(doc, context, metadata=(name, 0, 1), apply_chat_template=bool(chat))
            requests = requests if isinstance(requests, list) else [requests]
            pairs = []
            for request in requests:
                args = request.args
                if task.OUTPUT_TYPE == "loglikelihood_rolling":
                    pairs.append(["", args[0]])
                else:
                    pairs.append([args[0], args[1] if isinstance(args[1], str) else None])
            questions.append(pairs)
        found[name] = questions
    return found


PAGE = """ = Title = \n\n The ships ' masts , 1 @,@ 234 ( or 5 @.@ 5 ) @-@ long ; they 's " quoted text " and ' so ' on .\n = = = Sub = = = \n [ 12 ] { a } 7 ° C N times : yes ! no ? "a" '"""
TWINS = {
    "hellaswag/utils.py": {
        "process_docs": [
            {"ind": 1, "activity_label": " Roof work", "ctx_a": "A man sits.  He", "ctx_b": "hE Starts [x] TO [title] pull.", "endings": ["is  fast. [step] Go.", " [title] b [substeps] c ", ""], "label": " 2 "},
            {"ind": 2, "activity_label": "Épée", "ctx_a": "", "ctx_b": "", "endings": ["a"], "label": "0"},
        ]
    },
    "winogrande/preprocess_winogrande.py": {
        name: [{"sentence": "The cat sat, because _ was  tired. ", "option1": "the cat", "option2": "it", "answer": answer} for answer in "12"]
        for name in ["doc_to_text", "doc_to_target", "doc_to_choice"]
    },
    "wikitext/preprocess_wikitext.py": {"wikitext_detokenizer": [{"page": PAGE}, {"page": ""}, {"page": " ' '\x1c( \u2003x\x1f ) s 's 's /' 4/ = = = = "}]},
    "mmlu_pro/utils.py": {
        name: [{"question": "Why?", "options": [" a ", "b\n"] * 6, "cot_content": "A: Let's think step by step. So (A).", "category": "law"}]
        for name in ["doc_to_text", "fewshot_to_text", "fewshot_to_target"]
    },
}


def twins() -> dict:
    """What Python functions of the harness's tasks give for rows: by file and function pairs of row and value."""
    import importlib.util

    import datasets
    import lm_eval

    found = {}
    for module, functions in TWINS.items():
        path = Path(lm_eval.__file__).parent / "tasks" / module
        spec = importlib.util.spec_from_file_location("module", path)
        code = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(code)
        for name, rows in functions.items():
            function = getattr(code, name)
            values = list(function(datasets.Dataset.from_list(rows))) if name == "process_docs" else [function(row) for row in rows]
            found.setdefault(module, {})[name] = list(map(list, zip(rows, values)))
    return found


# Not DeepSeek V2: transformers 4.57 leaves the factor out that its rotary scaling puts into the softmax.
MODELS = ["deepseek_v3", "llama_distill", "qwen2_distill"]


def scored(folder: Path, model: Path, chat: bool = False) -> dict:
    import os
    import shutil
    import tempfile

    import lm_eval
    from lm_eval.tasks import TaskManager

    os.environ["DISABLE_MULTIPROC"] = "1"
    os.chdir(folder)
    if chat:
        copy = Path(tempfile.mkdtemp()) / model.name
        shutil.copytree(model, copy)
        model = copy
        (model / "chat_template.jinja").write_text(CHAT_TEMPLATE)

    def evaluate(tasks: list, draws: int) -> dict:
        return lm_eval.simple_evaluate(
            model="hf",
            model_args={"pretrained": str(model), "dtype": "float32"},
            tasks=tasks,
            task_manager=TaskManager(include_path=str(folder), include_defaults=False),
            batch_size=4,
            device="cpu",
            log_samples=True,
            bootstrap_iters=draws,
            apply_chat_template=chat,
            fewshot_as_multiturn=chat,
            system_instruction=SYSTEM if chat else None,
        )

    # 100,000 draws of scikit-learn's F1 take a quarter of an hour.
    slow = ["labels"]
    found = evaluate([name for name in sorted(TASKS) if name not in slow], 100000)
    without_errors = evaluate(slow, 0)
    for key in ["results", "samples"]:
        found[key].update(without_errors[key])
    results = {}
    for name, metrics in found["results"].items():
        samples = sorted(found["samples"][name], key=lambda sample: (sample["filter"], sample["doc_id"]))
        keep = {key: (value if isinstance(value, str) else float(value)) for key, value in metrics.items() if "," in key}
        if name in slow:
            keep = {key: value for key, value in keep.items() if "_stderr" not in key}
        answers = [[response[0] for response in sample["resps"]] for sample in samples]
        hashes = [[sample["prompt_hash"], sample["target_hash"]] for sample in samples]
        results[name] = {"metrics": keep, "answers": answers, "hashes": hashes}
    return results


if __name__ == "__main__":
    folder = Path(sys.argv[1]).resolve()
    folder.mkdir(parents=True, exist_ok=True)
    random.seed(0)
    write(folder)
    (folder / "asked.json").write_text(json.dumps(asked(folder), ensure_ascii=False, indent=0) + "\n")
    (folder / "twins.json").write_text(json.dumps(twins(), ensure_ascii=False, indent=0) + "\n")
    models = Path(__file__).resolve().parent
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)
    (folder / "chats.json").write_text(json.dumps(chats(folder, models / MODELS[0]), ensure_ascii=False, indent=0) + "\n")
    answers = {name: scored(folder, models / name) for name in MODELS}
    answers[f"{MODELS[0]} chat"] = scored(folder, models / MODELS[0], chat=True)
    (folder / "scored.json").write_text(json.dumps(answers, ensure_ascii=False, indent=0) + "\n")
