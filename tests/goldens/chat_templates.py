"""Renders chat templates as Hugging Face's library does, for comparison with ours.

    python chat_templates.py                         # makes chat_templates/golden.json from chat_templates/*.jinja
    python chat_templates.py OUT.json FOLDER...      # the same for the templates of others, to be compared by
    cargo run -p moeforge-data --example chat_templates -- OUT.json

A FOLDER may be one of an installed package (`trl/chat_templates`) or of llama.cpp (`models/templates`); `*.jinja` below it and
`chat_template` in `tokenizer_config.json` are read. Where Jinja2 refuses a chat, `rendered` is null: ours has to refuse it too.

Made with transformers 5.24.0 and jinja2 3.1.6.
"""

import json
import pathlib
import sys

from transformers.utils.chat_template_utils import _alias_reasoning_fields, _compile_jinja_template

OUT = pathlib.Path(__file__).parent / "chat_templates"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>", "pad_token": "<pad>", "unk_token": "<unk>"}
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Weather of a city: “now” & <later>",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "Name of the city"},
                "days": {"type": "integer", "enum": [1, 3, 7], "default": 3},
                "units": {"type": ["string", "null"], "enum": ["C", "F", None]},
            },
            "required": ["city"],
        },
        "return": {"type": "number", "description": "Degrees"},
    },
}
ADD = {
    "type": "function",
    "function": {
        "name": "add",
        "description": "Adds numbers.\n\nSlowly.",
        "parameters": {
            "type": "object",
            "properties": {
                "numbers": {"type": "array", "items": {"type": "number"}, "description": "The numbers"},
                "options": {"type": "object", "properties": {"exact": {"type": "boolean"}}, "additionalProperties": False},
            },
        },
    },
}


def user(content):
    return {"role": "user", "content": content}


def assistant(content, **more):
    return {"role": "assistant", "content": content, **more}


def call(name, arguments, number=1):
    return {"id": f"call{number:05}", "type": "function", "function": {"name": name, "arguments": arguments}}


def tool(content, number=1, name="get_weather"):
    return {"role": "tool", "tool_call_id": f"call{number:05}", "name": name, "content": content}


OSLO = {"city": "Oslo", "days": 3}
ODD = {"numbers": [1, 2.5, 1e-7, 1e22, 12345678901234567890123, -0.0], "options": {"exact": True, "note": None}, "é": "<'\"\\\n>"}

CHATS = {
    "one": [user("Hi")],
    "pair": [user("Hi"), assistant("Hello.")],
    "system": [{"role": "system", "content": "Be brief."}, user(" padded \n"), assistant(" Yes. "), user("Why?")],
    "unicode": [user("深度学习 é🚀 \u00a0x\u2028y\tz ‘“"), assistant("Да. 한국어 \\n 'a' \"b\" {{ x }} <|im_end|>")],
    "empty": [{"role": "system", "content": ""}, user(""), assistant("")],
    "developer": [{"role": "developer", "content": "Be kind."}, user("a"), assistant("b")],
    "parts": [user([{"type": "text", "text": "one"}, {"type": "text", "text": "two "}]), assistant([{"type": "text", "text": "three"}])],
    "empty parts": [user([]), assistant([])],
    "image": [user([{"type": "image"}, {"type": "text", "text": "what?"}]), assistant("a cat")],
    "thought": [user("2+2?"), assistant("4", reasoning_content="\nTwo and two.\n"), user("3+3?"), assistant("6", reasoning_content="Three.")],
    "thought within": [user("2+2?"), assistant("<think>\nTwo.\n</think>\n\n4"), user("sure?"), assistant("<think>Yes</think>Yes.")],
    "call": [user("Weather?"), assistant("", tool_calls=[call("get_weather", OSLO)]), tool('{"t": 4}'), assistant("4 °C.")],
    "call null": [user("Weather?"), assistant(None, tool_calls=[call("get_weather", OSLO)]), tool("4"), user("Thanks"), assistant("Bye.")],
    "call text": [user("Weather?"), assistant("Let me see.", tool_calls=[call("get_weather", '{"city": "Oslo"}')]), tool("4")],
    "calls": [
        user("Both."),
        assistant("", reasoning_content="Two calls.", tool_calls=[call("get_weather", OSLO), call("add", ODD, 2)]),
        tool("4"),
        tool("sum", 2, "add"),
        assistant("Done.", reasoning_content="So."),
    ],
    "call last": [user("a"), assistant("b"), user("Weather?"), {"role": "assistant", "tool_calls": [call("get_weather", {})]}],
    "bare call": [user("a"), assistant("", tool_calls=[{"name": "add", "arguments": ODD}]), tool({"sum": 1.0, "ok": True})],
    "tool parts": [user("a"), assistant("", tool_calls=[call("add", {"numbers": [1]})]), tool([{"type": "text", "text": "t1"}])],
    "long": [m for i in range(6) for m in (user(f"question {i}"), assistant(f"answer {i}", reasoning_content=f"thought {i}"))],
    "out of turn": [assistant("I begin."), user("a"), user("b"), assistant("c"), assistant("d")],
    "unknown": [user("a"), {"role": "observer", "content": "o"}, assistant("b")],
    "none": [],
}
TOOLS = {"no": None, "one": [WEATHER], "two": [WEATHER, ADD], "bare": [WEATHER["function"]]}


def cases():
    for name, messages in CHATS.items():
        messages = _alias_reasoning_fields(messages)
        with_tools = ("no", "two") if name not in ("pair", "call") else TOOLS
        for tools in with_tools:
            for prompt in (False, True):
                yield name, {"messages": messages, "tools": TOOLS[tools], "documents": None, "add_generation_prompt": prompt}
    for flag in (True, False):
        thoughts = {"enable_thinking": flag, "thinking": flag}
        yield "flags", {"messages": CHATS["thought"][:3], "tools": None, "documents": None, "add_generation_prompt": True, **thoughts}


def pairs(source, every):
    """Every n-th chat, and what the template makes of it."""
    template = _compile_jinja_template(source)
    for name, variables in list(cases())[::every]:
        try:
            rendered = template.render(**SPECIAL, **variables)
        except Exception:  # an exception of the template, or one of Python
            rendered = None
        yield {"chat": name, "variables": variables, "rendered": rendered}


def sources(folders):
    for folder in map(pathlib.Path, folders):
        for path in sorted([*folder.rglob("*.jinja"), *folder.rglob("tokenizer_config.json")]) if folder.is_dir() else [folder]:
            text = path.read_text(encoding="utf-8")
            if path.suffix == ".json":
                found = json.loads(text).get("chat_template") or []
                named = [("", found)] if isinstance(found, str) else [(t["name"], t["template"]) for t in found]
                yield from ((f"{path}#{name}", template) for name, template in named)
            else:
                yield str(path), text


def write(out, templates, every=1):
    done = []
    for name, source in templates:
        try:
            done.append({"template": name, "source": source, "pairs": list(pairs(source, every))})
        except Exception as problem:
            print(f"{name}: no template of chats: {problem}", file=sys.stderr)
    # Variables are the same for every template: once is enough.
    chats = [json.dumps(pair["variables"], ensure_ascii=False) for pair in done[0]["pairs"]]
    for template in done:
        template["rendered"] = [pair["rendered"] for pair in template.pop("pairs")]
    with open(out, "w", encoding="utf-8") as file:
        json.dump({"special_tokens": SPECIAL, "chats": chats, "templates": done}, file, ensure_ascii=False, indent=0)
    rendered = [text for template in done for text in template["rendered"]]
    print(f"{len(done)} templates, {len(rendered)} pairs, {sum(text is None for text in rendered)} of them refused")


if __name__ == "__main__":
    if len(sys.argv) > 2:
        write(sys.argv[1], sources(sys.argv[2:]))
    else:
        write(OUT / "golden.json", [(path.name, path.read_text(encoding="utf-8")) for path in sorted(OUT.glob("*.jinja"))], every=5)
