"""Makes gguf_tokens/: small vocabularies as GGUF files have them, and llama.cpp's ids for tricky texts.

    python gguf_tokens.py SmolLM2-135M-Instruct.gguf LICENSE-APACHE

The byte-level vocabulary is the beginning of SmolLM2's (Apache-2.0), with some merges and tokens
added; the SentencePiece vocabularies are trained here, on the second file and the texts below.
Each becomes a GGUF file without tensors, which llama.cpp opens for its vocabulary alone.

Made with xllamacpp 2026.10.11549 (llama.cpp), gguf 0.19.0, sentencepiece 0.2.3, CPU.
"""

import ctypes
import json
import pathlib
import sys
import tempfile
import unicodedata

import gguf
import sentencepiece
import xllamacpp.xllamacpp

OUT = pathlib.Path(__file__).parent / "gguf_tokens"
KEPT_TOKENS = 1500
PRE = ["default", "gpt-2", "smollm", "llama-bpe", "qwen2", "deepseek-r1-qwen", "deepseek-llm", "deepseek-coder", "deepseek-v3"]
# Across the cuts of some pre-tokenizers and not of others, so that no two give the same ids.
MORE_MERGES = ["1 2", "12 3", "123 4", "1234 5", "Ġ 1", "ed æ", "Ġ Ø", "' L", "'L L"]
# No merges make it: found whole where a word that is a token stays whole.
WHOLE = "Ġwanted"
# Where the original tokenizers compose text and llama.cpp does not.
COMPOSED = ["qwen2", "deepseek-r1-qwen"]
TEXTS = [
    "", " ", "  ", "   a", "Hello world", " Hello  world ", "\n", "\n\n\n", "\r\n", " \n ", "\t\tif (a) {\n\t\t\treturn;\n\t\t}\n",
    "don't you'll WE'RE I'VE it's 'Sx 'LL", "1234567 1 22 123 12345 12.5e10", "\u0663\u0664\u0665 \u00bd \u2167 x\u00b2",
    "日本語テキスト漢字かな。「引用」、終わり", "한국어 텍스트입니다", "mixed漢字and한글 with1234numbers567.",
    "emoji 😀👩\u200d👩\u200d👧🇩🇪 end", "line\nbreak\r\n\r\n\n  indented\n\t\ttabs\t \n", "trailing   ",
    "na\u00efve caf\u00e9 e\u0301A\u030a \u1100\u1161", "\u03a9 \u2126mega \u01c4 \u214e \ufb01 \uff21\uff42\uff43 \u0561 \u10a0 \u10d0",
    "Привет, мир!", "a العربية", "हिन्दी में", "ไทย ภาษา", "fn main() { let x = a[0] + b->c; /* !! */ }",
    "!!!??? ...,,, $100 + 5% = <x> ^ ~ | ` ``", "‘quotes’ “dq” –—…", "！？；：（）～", "▁ ▁▁ a▁b", "<0x0A> <0xE2>",
    "<|im_start|>user\nhi<|im_end|>\n <|endoftext|>", "<s> [INST] x</s> <unk>", "a<tool>b <tool>  c", "aaaaaaaaaaa bbbbb      ccc",
    " " * 33 + "y", "_snake_case camelCase SCREAMING a1b2c3", "there's the thing that they wanted",
]


class Llama:
    """llama.cpp's vocabulary of a GGUF file."""

    # Where `vocab_only` lies in `llama_model_params`, of this version.
    VOCAB_ONLY = 72

    class Params(ctypes.Structure):
        # Larger than the structure; what is behind its end is not looked at.
        _fields_ = [("bytes", ctypes.c_uint64 * 40)]

    def __init__(self, path):
        self.lib = ctypes.CDLL(xllamacpp.xllamacpp.__file__)
        self.lib.llama_model_default_params.restype = self.Params
        self.lib.llama_model_load_from_file.restype = ctypes.c_void_p
        self.lib.llama_model_load_from_file.argtypes = [ctypes.c_char_p, self.Params]
        self.lib.llama_model_get_vocab.restype = ctypes.c_void_p
        self.lib.llama_model_get_vocab.argtypes = [ctypes.c_void_p]
        self.lib.llama_tokenize.argtypes = [
            ctypes.c_void_p, ctypes.c_char_p, ctypes.c_int32, ctypes.POINTER(ctypes.c_int32), ctypes.c_int32, ctypes.c_bool, ctypes.c_bool,
        ]
        params = self.lib.llama_model_default_params()
        ctypes.memset(ctypes.addressof(params) + self.VOCAB_ONLY, 1, 1)
        self.vocab = self.lib.llama_model_get_vocab(self.lib.llama_model_load_from_file(str(path).encode(), params))

    def ids(self, text):
        text = text.encode()
        room = len(text) + 16
        ids = (ctypes.c_int32 * room)()
        count = self.lib.llama_tokenize(self.vocab, text, len(text), ids, room, False, True)
        assert count >= 0
        return ids[:count]


def llama_of(keys):
    """Writes the keys as a GGUF file and opens it with llama.cpp."""
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "vocab.gguf"
        writer = gguf.GGUFWriter(path, "llama")
        for add in (writer.add_context_length, writer.add_embedding_length, writer.add_block_count, writer.add_feed_forward_length, writer.add_head_count):
            add(8)
        writer.add_layer_norm_rms_eps(1e-5)
        writer.add_tokenizer_model(keys["model"])
        writer.add_tokenizer_pre(keys["pre"])
        writer.add_token_list(keys["tokens"])
        writer.add_token_types(keys["types"])
        writer.add_bos_token_id(keys["bos"])
        writer.add_eos_token_id(keys["eos"])
        if "scores" in keys:
            writer.add_token_scores(keys["scores"])
            writer.add_add_space_prefix(keys["add_space_prefix"])
        else:
            writer.add_token_merges(keys["merges"])
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return Llama(path)


def byte_level(smollm2):
    fields = gguf.GGUFReader(smollm2).fields
    tokens, types, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges"))
    known = set(tokens[:KEPT_TOKENS])
    merges = [merge for merge in merges if {*merge.split(" "), merge.replace(" ", "")} <= known] + MORE_MERGES
    more = [merge.replace(" ", "") for merge in MORE_MERGES]
    tokens = tokens[:KEPT_TOKENS] + more + [WHOLE, "<tool>"]
    types = types[:KEPT_TOKENS] + [1] * len(more) + [1, 4]
    vocabulary = {"model": "gpt2", "tokens": tokens, "types": types, "merges": merges, "bos": 1, "eos": 2}
    ids = {}
    for pre in PRE:
        llama = llama_of({**vocabulary, "pre": pre})
        composed = (unicodedata.normalize("NFC", text) if pre in COMPOSED else text for text in TEXTS)
        ids[pre] = [llama.ids(text) for text in composed]
    return {**vocabulary, "texts": TEXTS, "ids": ids}


def sentence_piece(corpus, add_space_prefix):
    with tempfile.TemporaryDirectory() as folder:
        text = pathlib.Path(folder) / "corpus.txt"
        text.write_text(pathlib.Path(corpus).read_text() + "\n".join(TEXTS))
        sentencepiece.SentencePieceTrainer.train(
            input=str(text), model_prefix=f"{folder}/model", vocab_size=700, model_type="bpe", byte_fallback=True,
            add_dummy_prefix=add_space_prefix, remove_extra_whitespaces=False, normalization_rule_name="identity",
            character_coverage=0.99, allow_whitespace_only_pieces=True, user_defined_symbols=["<tool>"], minloglevel=2,
        )
        pieces = sentencepiece.SentencePieceProcessor(f"{folder}/model.model")
    tokens = [pieces.id_to_piece(i) for i in range(pieces.get_piece_size())]
    kinds = [(2, pieces.is_unknown), (3, pieces.is_control), (5, pieces.is_unused), (6, pieces.is_byte)]
    kind = lambda i: 4 if tokens[i] == "<tool>" else next((code for code, has in kinds if has(i)), 1)
    vocabulary = {
        "model": "llama", "pre": "default", "tokens": tokens, "types": [kind(i) for i in range(len(tokens))],
        "scores": [pieces.get_score(i) for i in range(len(tokens))], "bos": 1, "eos": 2, "add_space_prefix": add_space_prefix,
    }
    llama = llama_of(vocabulary)
    ids = [llama.ids(text) for text in TEXTS]
    # Three programs agree, where no control token is written in the text.
    for text, found in zip(TEXTS, ids):
        assert "<" in text or pieces.encode(text) == found, text
    return {**vocabulary, "texts": TEXTS, "ids": ids}


def write(name, golden):
    OUT.mkdir(exist_ok=True)
    lines = ",\n".join(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}" for key, value in golden.items())
    (OUT / name).write_text("{\n" + lines + "\n}\n")


if __name__ == "__main__":
    write("byte_level.json", byte_level(sys.argv[1]))
    write("sentencepiece.json", sentence_piece(sys.argv[2], True))
    write("sentencepiece_bare.json", sentence_piece(sys.argv[2], False))
