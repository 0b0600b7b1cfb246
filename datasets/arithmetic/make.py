"""Makes the arithmetic rows: `addition/`, `subtraction/` and `multiplication/` beside this file.

    python3 make.py

Writes `train.jsonl` and `test.jsonl` in each folder, the same bytes every time. Standard library
only.
"""

import json
import random
from pathlib import Path

HERE = Path(__file__).parent
SEED = 1729
# Both numbers are drawn from the same range, or one from each of two.
TWO_DIGITS, THREE_DIGITS = range(10, 100), range(100, 1000)
FACTORS = range(2, 10), range(11, 100)
# Operation: rows to test, rows to learn from, and the ranges, which take turns.
ROWS = {
    "addition": (200, 100, [(TWO_DIGITS, TWO_DIGITS), (THREE_DIGITS, THREE_DIGITS)]),
    "subtraction": (200, 100, [(TWO_DIGITS, TWO_DIGITS), (THREE_DIGITS, THREE_DIGITS)]),
    "multiplication": (100, 50, [FACTORS]),
}


def row(operation, a, b):
    """A question about two numbers, and its answer."""
    if operation == "addition":
        asked, answer = f"{a} plus {b}", a + b
    elif operation == "subtraction":
        a, b = max(a, b), min(a, b)
        asked, answer = f"{a} minus {b}", a - b
    else:
        asked, answer = f"{a} times {b}", a * b
    return {"question": f"What is {asked}?", "answer": str(answer)}


def rows(operation, n_rows, ranges, rng):
    """Rows of an operation. No two have the same two numbers, in either order."""
    out, seen = [], set()
    while len(out) < n_rows:
        numbers = [rng.choice(choices) for choices in ranges[len(out) % len(ranges)]]
        rng.shuffle(numbers)
        if frozenset(numbers) not in seen:
            seen.add(frozenset(numbers))
            out.append(row(operation, *numbers))
    return out


def main():
    for operation, (n_test, n_train, ranges) in ROWS.items():
        made = rows(operation, n_test + n_train, ranges, random.Random(f"{SEED} {operation}"))
        (HERE / operation).mkdir(exist_ok=True)
        for split, part in (("test", made[:n_test]), ("train", made[n_test:])):
            body = "".join(json.dumps(question) + "\n" for question in part)
            (HERE / operation / f"{split}.jsonl").write_bytes(body.encode("utf-8"))


if __name__ == "__main__":
    main()
