"""Makes tables/: the same rows as JSON lines and in every other kind of file, by the programs that write them.

    python tables.py

`chats.jsonl`, `answers.jsonl` and `values.jsonl` have the rows as Python's `json` writes them. The other files of these
names have the same rows, and must be read as the same:

- `chats`: conversations with calls of tools. The keys that a message lacks are null, as in every table of such rows.
- `answers`: prompts and completions with quotes, separators and line ends in them.
- `ids`: tokens and their labels, for runs that train on them. `nested.parquet` and `delta.parquet` have more columns, and
  are small: tests break them.
- `values`: every type of number, and lists, structs and maps inside each other with nulls at every depth, in the
  encodings and packings that the writers have. Columns of times and bytes have no form in JSON, and are not in the twin.

`saved/` is what `save_to_disk` of `datasets` writes, and is refused with a sentence.

Made with pyarrow 26.0.1, datasets 5.2.0, pandas 3.1.1, polars 2.1.0, duckdb 2.0.1 and Python's gzip; `.zst` with
pyarrow's Zstandard. The files of polars and duckdb are made where these are installed.
"""

import datetime
import gzip
import json
import math
import pathlib

import datasets
import pandas
import pyarrow
import pyarrow.parquet

OUT = pathlib.Path(__file__).parent / "tables"


def chats():
    """Conversations, some with a call."""
    rows = []
    for i in range(12):
        call = {"type": "function", "function": {"name": "add", "arguments": json.dumps({"a": i, "b": 1})}}
        turns = [{"role": "user", "content": f"Was ist {i}+1? 深{i}"}]
        if i % 3 == 0:
            turns.append({"role": "assistant", "content": None, "tool_calls": [call]})
            turns.append({"role": "tool", "content": str(i + 1), "name": "add"})
        turns.append({"role": "assistant", "content": f"Es ist {i + 1}."})
        source = "é\"\\\u2028" if i % 2 else None
        keys = ["role", "content", "name", "tool_calls"]
        rows.append({"messages": [{key: turn.get(key) for key in keys} for turn in turns], "source": source, "id": i})
    return rows


def answers():
    """Texts that need quotes."""
    texts = ["2", 'he said "two"', "a, b; c\td", "first\nsecond\r\nthird", " spaces ", "’é🚀", "'", "NA", "null", "1e5"]
    return [{"prompt": f"{i}: {text}", "completion": text, "note": "x" if i % 2 else None} for i, text in enumerate(texts)]


def values():
    """Columns by name, each of 200 values; the first three in `types` are given, the others inferred."""
    n = 200
    some = lambda value: [value(i) if i % 7 else None for i in range(n)]
    return {
        "text": [f"row {i} " + "x" * (i % 5) for i in range(n)],
        "repeated": some(lambda i: ["red", "green", "blue"][i % 3]),
        "empty": some(lambda i: ""),
        "none": [None] * n,
        "yes": some(lambda i: i % 3 == 0),
        "small": some(lambda i: i % 256 - 128),
        "int": some(lambda i: (i - 100) * 10**7),
        "long": some(lambda i: (i - 100) * 9 * 10**16),
        "byte": some(lambda i: i % 256),
        "unsigned": some(lambda i: 2**32 - 1 - i),
        "unsigned_long": some(lambda i: 2**64 - 1 - i),
        "double": [math.nan if i == 5 else i / 3 for i in range(n)],
        "list": [None if i % 7 == 0 else [None if j % 3 == 2 else i + j for j in range(i % 4)] for i in range(n)],
        "lists": [None if i % 5 == 0 else [None if j == 1 else [f"{i}{k}" for k in range(j)] for j in range(i % 4)] for i in range(n)],
        "struct": [
            None if i % 6 == 0 else {"a": i if i % 4 else None, "b": None if i % 3 == 0 else {"c": [i] * (i % 3), "d": str(i)}}
            for i in range(n)
        ],
        "structs": [
            None if i % 9 == 0 else [None if j == 2 else {"role": f"r{j}", "parts": None if j == 1 else [{"t": "x", "n": i}] * j} for j in range(i % 4)]
            for i in range(n)
        ],
        "map": [None if i % 5 == 0 else [(f"k{j}", None if j == 1 else j * i) for j in range(i % 3)] for i in range(n)],
        "when": [datetime.datetime(2024, 1, 1 + i % 28) for i in range(n)],
        "day": [datetime.date(2024, 1, 1 + i % 28) for i in range(n)],
        "bytes": [bytes([i % 256]) for i in range(n)],
    }


TYPES = {
    "none": pyarrow.string(),
    "small": pyarrow.int8(),
    "int": pyarrow.int32(),
    "byte": pyarrow.uint8(),
    "unsigned": pyarrow.uint32(),
    "unsigned_long": pyarrow.uint64(),
    "list": pyarrow.list_(pyarrow.int16()),
    "map": pyarrow.map_(pyarrow.string(), pyarrow.int64()),
}
UNREAD = ["when", "day", "bytes"]


def plain(value):
    """A value as JSON: pairs of a map as an object, numbers that are none as null."""
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, list) and value and isinstance(value[0], tuple):
        return dict(value)
    return value


def write_lines(path, rows):
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")


def write_packed(path):
    """The file once more, packed with gzip in two members and with Zstandard in two frames."""
    text = path.read_bytes()
    parts = [text[: len(text) // 2], text[len(text) // 2 :]]
    (OUT / f"{path.name}.gz").write_bytes(b"".join(gzip.compress(part, mtime=0) for part in parts))
    codec = pyarrow.Codec("zstd")
    (OUT / f"{path.name}.zst").write_bytes(b"".join(codec.compress(part, asbytes=True) for part in parts))


def write_values():
    columns = values()
    table = pyarrow.table({name: pyarrow.array(column, type=TYPES.get(name)) for name, column in columns.items()})
    names = [name for name in columns if name not in UNREAD]
    rows = [{name: plain(columns[name][i]) for name in names} for i in range(len(columns["text"]))]
    for row in rows:
        if row["map"] == []:
            row["map"] = {}
    write_lines(OUT / "values.jsonl", rows)
    write = lambda name, **options: pyarrow.parquet.write_table(table, OUT / f"values.{name}.parquet", **options)
    small = {"row_group_size": 64, "data_page_size": 256, "write_batch_size": 16}
    for codec in ["none", "snappy", "gzip", "zstd", "lz4"]:
        write(codec, compression=codec, **small)
    write("v2", data_page_version="2.0", compression="snappy", **small)
    write("plain", use_dictionary=False, compression="zstd")
    delta = {"text": "DELTA_BYTE_ARRAY", "repeated": "DELTA_LENGTH_BYTE_ARRAY", "int": "DELTA_BINARY_PACKED"}
    delta |= {"long": "DELTA_BINARY_PACKED", "double": "BYTE_STREAM_SPLIT", "byte": "BYTE_STREAM_SPLIT"}
    write("delta", use_dictionary=False, column_encoding=delta, data_page_version="2.0", compression="snappy")
    write("old", version="1.0", use_compliant_nested_type=False, compression="gzip")
    try:
        import polars

        frame = polars.from_arrow(table.drop_columns(["map"]))
        frame.write_parquet(OUT / "values.polars.parquet", compression="zstd", row_group_size=50)
    except ImportError:
        pass
    try:
        import duckdb

        duckdb.connect().execute(
            f"COPY (SELECT * FROM '{OUT}/values.snappy.parquet') TO '{OUT}/values.duckdb.parquet' (FORMAT parquet, PARQUET_VERSION v2)"
        )
    except ImportError:
        pass


def write_ids(rows):
    """Small files with as many forms of columns as there are, to be broken."""
    columns = {key: [row[key] for row in rows] for key in ["input_ids", "labels", "id"]}
    extra = {name: column[: len(rows)] for name, column in values().items() if name in ["structs", "lists", "map", "yes"]}
    types = TYPES | {"structs": None}
    table = pyarrow.table(
        {name: pyarrow.array(column, type=types.get(name)) for name, column in (columns | extra).items()}
    )
    pyarrow.parquet.write_table(table, OUT / "nested.parquet", row_group_size=6, compression="zstd")
    delta = {"input_ids.list.element": "DELTA_BINARY_PACKED", "labels.list.element": "BYTE_STREAM_SPLIT"}
    delta |= {"id": "DELTA_BYTE_ARRAY", "map.key_value.key": "DELTA_LENGTH_BYTE_ARRAY"}
    options = {"use_dictionary": ["yes"], "column_encoding": delta, "data_page_version": "2.0"}
    pyarrow.parquet.write_table(table, OUT / "delta.parquet", compression="lz4", **options)


def main():
    OUT.mkdir(exist_ok=True)
    rows = chats()
    write_lines(OUT / "chats.jsonl", rows)
    write_packed(OUT / "chats.jsonl")
    (OUT / "chats.json").write_text(json.dumps(rows, indent=1), encoding="utf-8")
    (OUT / "chats.data.json").write_text(json.dumps({"data": rows}, ensure_ascii=False), encoding="utf-8")
    data = datasets.Dataset.from_list(rows)
    data.to_parquet(OUT / "chats.parquet")
    data.to_json(OUT / "chats.datasets.jsonl")
    datasets.DatasetDict({"train": data}).save_to_disk(OUT / "saved")

    rows = answers()
    write_lines(OUT / "answers.jsonl", rows)
    frame = pandas.DataFrame(rows)
    frame.to_csv(OUT / "answers.csv", index=False)
    frame.to_csv(OUT / "answers.tsv", index=False, sep="\t", quoting=1, lineterminator="\r\n")
    frame.to_parquet(OUT / "answers.parquet")
    frame.to_json(OUT / "answers.json", orient="records")
    datasets.Dataset.from_list(rows).to_csv(OUT / "answers.datasets.csv")
    write_packed(OUT / "answers.csv")
    rows = [{"input_ids": [(i * 7 + j * j) % 280 for j in range(8)], "id": f"row {i}"} for i in range(10)]
    for row in rows:
        row["labels"] = [-100] * 3 + row["input_ids"][3:]
    write_lines(OUT / "ids.jsonl", rows)
    datasets.Dataset.from_list(rows).to_parquet(OUT / "ids.parquet", batch_size=4)
    write_packed(OUT / "ids.jsonl")
    write_ids(rows)
    write_values()


if __name__ == "__main__":
    main()
