"""Makes `cloze/test.jsonl`: passages of `test.jsonl`, each with the word that comes next.

    python3 cloze.py

Reads `train.jsonl` and `test.jsonl` beside this file and writes the same bytes every time.
Standard library only. README.md says which words are asked for.
"""

import json
import re
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent
LEAST_WORDS, MOST_WORDS = 40, 80  # Of a passage, counted between white space.
LEAST_LETTERS = 4
COMMON_WORDS = 100  # So many most frequent words of the training rows are not asked for.
APART = 20  # Spoken words from one asked word to the next, at least.
AGO = 5  # The word was spoken at least so many words before.

WORD = re.compile(r"[A-Za-z]+(?:['-][A-Za-z]+)*")
HEADING = re.compile(r"^.*\. (?:ACT|SCENE) .*\n\n")
# Stage directions, most of them in brackets, and the lines with a speaker's name.
UNSPOKEN = re.compile(r"\[[^\]]*\]|(?<=\n\n)Enter .*(?:\n.+)*|^[^a-z\n]+$", re.MULTILINE)


def rows(split):
    """The texts of a split."""
    lines = (HERE / f"{split}.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line)["text"] for line in lines]


def common_words():
    """The most frequent words, in lower case; of equally frequent ones the first by alphabet."""
    counts = Counter(word.lower() for text in rows("train") for word in WORD.findall(text))
    return set(sorted(counts, key=lambda word: (-counts[word], word))[:COMMON_WORDS])


def spoken_words(text):
    """Matches of the words that are spoken, at their places in the text."""
    return list(WORD.finditer(UNSPOKEN.sub(lambda found: " " * len(found[0]), text)))


def start(text, end):
    """Where the passage before `end` starts: at a speech, or else at a line; None if nowhere."""
    for begins in (r"(?<=\n\n)(?=\S)", r"(?<=\n)(?=\S)"):
        for found in re.finditer(begins, text[:end]):
            if LEAST_WORDS <= len(text[found.start() : end].split()) <= MOST_WORDS:
                return found.start()
    return None


def cloze_rows(text, common):
    """A row for each asked word of a text."""
    heading = HEADING.match(text)
    text = "\n\n" + text[heading.end() if heading else 0 :]
    words, last = spoken_words(text), -APART
    for at, found in enumerate(words):
        word, end = found[0], found.start() - 1
        is_plain = word.isalpha() and len(word) >= LEAST_LETTERS and word.lower() not in common
        if at - last < APART or not is_plain or text[end] != " ":
            continue
        begin = start(text, end)
        if begin is None:
            continue
        earlier = [other[0].lower() for other in words[: at - AGO + 1] if other.start() >= begin]
        if word.lower() in earlier:
            last = at
            yield {"passage": text[begin:end], "word": word}


def main():
    common = common_words()
    found = [row for text in rows("test") for row in cloze_rows(text, common)]
    body = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    path = HERE / "cloze" / "test.jsonl"
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(body.encode("utf-8"))


if __name__ == "__main__":
    main()
