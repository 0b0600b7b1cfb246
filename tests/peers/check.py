"""Reads what moeforge writes with the programs of others, and compares the numbers.

    python tests/peers/check.py target/debug/moeforge [FAMILY…] [--write]

transformers, PEFT, mlx-lm, huggingface_hub, tensorboard and gguf are read with if Python has them; llama.cpp if its programs are
in the folder LLAMA_BIN or on the path, and its converter if LLAMA_SRC is its source tree. What is missing is skipped by name.
Prints a line per output and reader, and exits with 1 if one differs by more than its tolerance. `--write` keeps what they read
in tests/goldens/peers/, where `cargo test` holds the program to it.
"""

import argparse
import contextlib
import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from pathlib import Path

import numpy as np

import readers
from outputs import FAMILIES, FILES, FOLDERS, GOLDENS, VARIANTS, Outputs, Refused, words

EXACT = 2e-4
"""The bar at every position, in nats, for f32 arithmetic in another order."""
STEPS = 1e-3
"""The same in llama.cpp, whose numbers come in steps of 2.4e-4."""
ROUNDED = {"f16": 0.03, "bf16": 0.2, "q8_0": 0.3, "q5_0": 0.3, "q4_0": 0.35, "q4_k_m": 0.3}
"""The bar at the median position where llama.cpp rounds the inputs of products, to the format of the weights or to 8 bits. Such
roundings choose other experts at some positions of a tiny model. What is read wrongly is off by more at most positions."""
ADAPTERS = [(), ("lora.use_rslora=true",), ("lora.target=\"self_attn\"",)]
DORA, SOME_EXPERTS = "lora.use_dora=true", "lora.target=[\"self_attn\", \"layers.1.mlp.experts.1\"]"
MIXTURES = [(DORA, "lora.exclude=[\"experts\"]"), (SOME_EXPERTS,)]
"""Of a mixture. PEFT has no form for these: it is enough if moeforge names PEFT when it trains them."""
LLAMA_ADAPTER = "lora.target=[\"o_proj\", \"mlp\", \"experts\"]"
"""What llama.cpp applies at run time, of DeepSeek too."""
GOLDEN_ADAPTERS = {"deepseek_v2_lite": ["adapter_peft", "adapter_classic"], "deepseek_v3": ["adapter_peft", "adapter_rslora", "adapter_dora"],
                   "qwen2_distill": ["adapter_rslora", "adapter_dora"]}
LIMITS = ["deepseek_v2_lite", "deepseek_v2_group", "v3_other_ramp", "v3_other_factor"]
"""Models that llama.cpp computes otherwise or cannot open, whoever wrote the file. There it is enough if moeforge refuses to write
the file, or names llama.cpp when it writes or opens it."""
OUT = GOLDENS / "peers"
ADAPTER_FILES = ["adapter_config.json", "adapter_model.safetensors"]
TOP, POSITIONS = 5, 7
TEXT = words(1500)


class Table:
    """Lines of the table, and what goes into the golden."""

    def __init__(self):
        self.lines, self.kept, self.rows, self.adapters, self.failed = 0, [], {}, {}, 0

    def line(self, verdict, *cells):
        print(f"{verdict:5} " + "  ".join(cells), flush=True)
        self.lines += 1
        self.failed += verdict == "FAIL"

    def compare(self, reader, output, read, said=None):
        """`read` returns the reader's log-probabilities, ours, the tolerance, and what to keep. Where the reader is known to be unable
        to, it is enough if `said`, a test of what moeforge said, holds."""
        name = " ".join([output["family"], *(f"{value}" for key, value in output.items() if key != "family")])
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                found, expected, tolerance, keep = read()
        except Exception as error:  # Whatever a program of others does.
            if said and said():
                self.line("said", name, reader, " ".join(str(error).split())[:200])
                return
            self.line("FAIL", name, reader, f"{type(error).__name__}: {' '.join(str(error).split())[:300]}")
            return
        differences = np.abs(found - expected).max(-1)
        difference = float(np.median(differences) if tolerance in ROUNDED.values() else differences.max())
        is_equal = difference <= tolerance  # NaN is not.
        verdict = "ok" if is_equal else "said" if said and said() else "FAIL"
        self.line(verdict, name, reader, f"{difference:.1e} of {tolerance:.0e}")
        if is_equal and keep is not None and output["family"] in FAMILIES:
            ids = keep["ids"]
            row = f"{output['family']} {len(ids)}"
            self.rows[row] = ids
            bar = {"tolerance": tolerance, "at": "median" if tolerance in ROUNDED.values() else "all"}
            self.kept.append({**output, "reader": reader, **bar, "row": row, **numbers(found, ids),
                              **{key: value for key, value in keep.items() if key != "ids"}})

    def hold(self, reader, output, read):
        """`read` returns what is wrong, or nothing."""
        try:
            wrong = read()
        except Refused as error:
            self.line("said" if output.split()[0] in LIMITS else "FAIL", output, reader, str(error)[:200])
            return
        except Exception as error:
            wrong = f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        self.line("FAIL" if wrong else "ok", output, reader, wrong or "")


def numbers(found, ids):
    """The mean loss of a row, and the likeliest tokens at some positions. `found` are the last positions before the row's end."""
    first = len(ids) - len(found) if len(found) < len(ids) else 0
    first -= len(found) < len(ids)
    losses = [-found[i - first][ids[i + 1]] for i in range(first, len(ids) - 1)]
    at = np.linspace(first, len(ids) - 2, POSITIONS).astype(int).tolist()
    top = lambda row: [[int(token), round(float(row[token]), 5)] for token in np.argsort(-row)[:TOP]]
    return {"first": first, "loss": round(float(np.mean(losses)), 6), "top": {str(i): top(found[i - first]) for i in at}}


def ours(outputs, model, *options):
    return readers.log_softmax(outputs.logits(model, outputs.ids, *options))


def folders(table, outputs, family, there):
    """Folders: of every format, merged, and those that were a GGUF in between."""
    kinds = FOLDERS if family in FAMILIES else ["f32"]
    made = [({"to": f"hf:{kind}"}, lambda kind=kind: outputs.folder(kind)) for kind in kinds]
    made.append(({"to": "gguf:f32", "then": "hf:f32"}, outputs.folder_of_file))
    for name in GOLDEN_ADAPTERS.get(family, []):
        made.append(({"merge": name, "to": "hf:f32"}, lambda name=name: outputs.merged(outputs.base / name, "f32")))
    said = lambda output: limit(outputs, family, lambda: outputs.file("f32")) if "then" in output else None
    for output, make in made:
        keep = {"ids": outputs.ids, "compute": "f32"}
        read = lambda reader: lambda: (reader(make(), outputs.ids), ours(outputs, make()), EXACT, keep)
        if "transformers" in there:
            table.compare("transformers", {"family": family, **output}, read(readers.transformers_folder), said(output))
        # mlx-lm decodes the blocks of DeepSeek-V3 alone, and rounds them to bf16.
        if "mlx-lm" in there and output["to"] != "hf:fp8":
            table.compare("mlx-lm", {"family": family, **output}, read(readers.mlx_folder), said(output))


def adapters(table, outputs, family, there):
    """Adapters that moeforge trains, of every method, and what it merges of them."""
    mixed = family.startswith("deepseek")
    for settings in [*ADAPTERS, *(MIXTURES if mixed else [(DORA,)])]:
        adapter = lambda: outputs.adapter(*settings)
        # PEFT puts the adapter on the base in f32, of which an FP8 base is decoded exactly.
        read = lambda: (readers.peft_adapter(outputs.folder("f32"), adapter(), outputs.ids),
                        ours(outputs, outputs.base, "--adapter", adapter()), EXACT, keep(adapter()))

        def keep(folder):
            if settings:
                return None
            table.adapters[family] = {name: (folder / name).read_bytes() for name in ADAPTER_FILES}
            return {"ids": outputs.ids, "compute": "f32", "trained": f"{family}_adapter"}

        said = (lambda: "PEFT" in outputs.said[adapter().parent]) if settings in MIXTURES else None
        if "peft" in there:
            table.compare("PEFT", {"family": family, "train": " ".join(settings) or "all-linear"}, read, said)
    adapter, merged = outputs.adapter, lambda: outputs.merged(outputs.adapter(), "f32")
    if "transformers" in there:
        read = lambda: (readers.transformers_folder(merged(), outputs.ids), ours(outputs, outputs.base, "--adapter", adapter()), EXACT, None)
        table.compare("transformers", {"family": family, "merged": "base + adapter"}, read)
    if "huggingface_hub" in there:
        for folder, library in [(adapter, "peft"), (merged, "transformers")]:
            wrong = lambda: None if readers.card(folder()).get("library_name") == library else "no such library_name"
            table.hold("huggingface_hub", f"{family} card of {library}", wrong)
    if "tensorboard" in there:
        losses = lambda: [json.loads(line) for line in (adapter().parent / "metrics.jsonl").read_text().splitlines()]
        table.hold("tensorboard", f"{family} event files", lambda: readers.event_differences(adapter().parent, losses()))


def files(table, outputs, family, there):
    """GGUF files of every format, with and without an adapter, and llama.cpp's own conversion of our folder."""
    kinds = FILES if family in FAMILIES else ["f32"]
    for kind in kinds:
        output, file = {"family": family, "to": f"gguf:{kind}"}, lambda: outputs.file(kind)
        if "llama.cpp" in there:
            table.compare("llama.cpp", output, lambda: llama_row(outputs, file(), kind), limit(outputs, family, file))
        if "gguf" in there:
            back = lambda: outputs.once(f"hf-of-{kind}", "quantize", file(), "--to", "hf:f32")
            table.hold("gguf", f"{family} gguf:{kind}", lambda: unequal(readers.gguf_squares(file()), readers.folder_squares(back())))
    if "llama.cpp" in there and family in FAMILIES:
        target = LLAMA_ADAPTER if family.startswith("deepseek") else "lora.use_rslora=true"
        trained = lambda: llama_adapter(outputs, outputs.adapter(target), keep=False)
        said = limit(outputs, family, lambda: outputs.file("f32"))
        table.compare("llama.cpp", {"family": family, "exported": target}, trained, said)
        if family == "qwen2_distill":
            golden = lambda: llama_adapter(outputs, outputs.base / "adapter_rslora")
            table.compare("llama.cpp", {"family": family, "exported": "adapter_rslora"}, golden)
    if "llama.cpp" in there and "converter" in there:
        conversions(table, outputs, family)


def conversions(table, outputs, family):
    """llama.cpp's conversions of our folder and of the folder that we make of our file, read by it and by us."""
    original = lambda: outputs.folder("f32")

    def convert(name, folder):
        out = outputs.place / f"{name}.gguf"
        return out if out.exists() else readers.converted(folder(), out)

    one, two = lambda: convert("converted", original), lambda: convert("converted-again", outputs.folder_of_file)
    for what, file, model in [("hf:f32 to gguf:f32", one, original), ("gguf:f32 to hf:f32 to gguf:f32", two, original)]:
        output = {"family": family, "converter": what}
        read = lambda: llama_row(outputs, file(), "f32", model())
        table.compare("llama.cpp", output, read, limit(outputs, family, lambda: outputs.file("f32")))
    read = lambda: llama_row(outputs, one(), "f32", one())

    def opened():
        outputs.logits(one(), [1, 2])
        return one()

    table.compare("moeforge", {"family": family, "converter": "its file"}, read, limit(outputs, family, opened))


def limit(outputs, family, file):
    """Whether moeforge said what llama.cpp lacks for a family, in writing or reading a file; none for others."""
    def said():
        try:
            return "llama.cpp" in outputs.said.get(file(), "")
        except Refused:
            return True
    return said if family in LIMITS else None


def llama_row(outputs, file, kind, model=None):
    """llama.cpp's numbers of a file, and ours of it, or of another form of the model."""
    ids, found = readers.llama_file(file, TEXT, outputs.place)
    compute = "f32" if kind in ("f32", "f16", "bf16") else "int8"
    keep = None if model else {"ids": ids, "compute": compute}
    expected = clipped(outputs.logits(model or file, ids, "--compute", compute))
    return found, expected, ROUNDED.get(kind, STEPS), keep


def llama_adapter(outputs, adapter, keep=True):
    """llama.cpp's numbers of a file with an adapter's file, and ours with the adapter's folder. moeforge does not read the adapter's
    file, so its hash is kept."""
    base, file = outputs.file("f32"), outputs.adapter_file(adapter)
    ids, found = readers.llama_file(base, TEXT, outputs.place, file)
    keep = {"ids": ids, "compute": "f32", "sha256": hashlib.sha256(file.read_bytes()).hexdigest()} if keep else None
    return found, clipped(outputs.logits(base, ids, "--adapter", adapter)), STEPS, keep


def clipped(logits):
    """Log-probabilities of the positions that llama.cpp writes, with what is 16 nats below the likeliest raised to that, as there."""
    whole = readers.log_softmax(logits)
    return np.maximum(whole, whole.max(-1, keepdims=True) - 16)[len(whole) // 2:-1]


def unequal(found, expected):
    is_equal = abs(found - expected) <= 1e-5 * expected
    return None if is_equal else f"the squares of its values sum to {found:.6e}, of ours to {expected:.6e}"


def programs():
    """The programs that are here, with their versions. What is missing is said."""
    names = ["transformers", "peft", "mlx-lm", "huggingface_hub", "tensorboard", "gguf"]
    found = {name: readers.version(name) for name in names}
    found["llama.cpp"] = readers.llama_version()
    found["converter"] = found["llama.cpp"] if readers.converter() else None
    try:
        import mlx.core  # noqa: F401
    except ImportError:
        found["mlx-lm"] = None
    for name, version in found.items():
        print(f"{name}: {version or 'not installed, skipped'}")
    return {name: version for name, version in found.items() if version}


def write(there, table):
    """The golden: what was read, and the adapters that PEFT read."""
    shutil.rmtree(OUT, ignore_errors=True)
    OUT.mkdir()
    for name in [kept["trained"] for kept in table.kept if "trained" in kept]:
        family, folder = name.removesuffix("_adapter"), OUT / name
        folder.mkdir()
        config, tensors = table.adapters[family].values()
        config = json.loads(config) | {"base_model_name_or_path": family}
        (folder / ADAPTER_FILES[0]).write_text(json.dumps(config, indent=2) + "\n")
        (folder / ADAPTER_FILES[1]).write_bytes(tensors)
    lines = lambda values: ",\n".join(values)
    rows = lines(f"{json.dumps(name)}: {json.dumps(ids)}" for name, ids in table.rows.items())
    read = lines(json.dumps(kept) for kept in table.kept)
    (OUT / "read.json").write_text(f'{{"versions": {json.dumps(there)},\n"rows": {{\n{rows}\n}},\n"read": [\n{read}\n]}}\n')


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("moeforge", type=Path)
    parser.add_argument("family", nargs="*", default=[*FAMILIES, *VARIANTS])
    parser.add_argument("--write", action="store_true")
    arguments = parser.parse_args()
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    there, table = programs(), Table()
    place = Path(tempfile.mkdtemp())
    os.environ["XDG_CACHE_HOME"] = str(place / "cache")
    for family in arguments.family:
        outputs = Outputs(arguments.moeforge.resolve(), family, place / family)
        folders(table, outputs, family, there)
        if family in FAMILIES:
            adapters(table, outputs, family, there)
        files(table, outputs, family, there)
    shutil.rmtree(place)
    print(f"{table.lines - table.failed} of {table.lines}")
    if arguments.write:
        write(there, table)
    sys.exit(table.failed > 0)


if __name__ == "__main__":
    main()
