"""Makes tests/goldens/gguf/: two small models as GGUF files, as llama.cpp's converter writes them, and their logits.

    pip install gguf safetensors torch transformers
    python tests/goldens/gguf_models.py

The weights are those of `llama_distill` (without its stretched rotary positions) and `qwen2_distill`, the logits those of
transformers with the weights as the `gguf` package decodes them, in float32.
"""

import json
import pathlib

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as Type
from safetensors.torch import load_file, save_file

HERE = pathlib.Path(__file__).parent
LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}


def name_of(key):
    fixed = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
    module, kind = key.rsplit(".", 1)
    if module in fixed:
        return f"{fixed[module]}.{kind}"
    _, _, layer, part = module.split(".", 3)
    return f"blk.{layer}.{LAYER[part]}.{kind}"


def interleaved(values, heads):
    """The rows of each head with its halves beside each other, as ggml turns them."""
    rows = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return rows.swapaxes(1, 2).reshape(values.shape)


def back(values, heads):
    rows = values.reshape(heads, values.shape[0] // heads // 2, 2, *values.shape[1:])
    return rows.swapaxes(1, 2).reshape(values.shape)


def add_tokenizer(writer, folder, config):
    """The folder's tokenizer, which is cut to pieces as DeepSeek-V3's."""
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    texts = {id: text for text, id in tokenizer["model"]["vocab"].items()}
    added = {token["id"]: token for token in tokenizer["added_tokens"]}
    texts |= {id: token["content"] for id, token in added.items()}
    kinds = [
        (gguf.TokenType.CONTROL if added[id]["special"] else gguf.TokenType.USER_DEFINED) if id in added
        else gguf.TokenType.NORMAL
        for id in range(config["vocab_size"])
    ]
    merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in tokenizer["model"]["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("deepseek-v3")
    writer.add_token_list([texts[id] for id in range(config["vocab_size"])])
    writer.add_token_types(kinds)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(config["bos_token_id"])
    writer.add_eos_token_id(config["eos_token_id"])
    writer.add_add_bos_token(True)


def make(source, name, kind_of):
    config = json.loads((HERE / source / "config.json").read_text())
    config.pop("rope_scaling", None)
    config["torch_dtype"] = "float32"
    arch = config["model_type"]
    heads, kv_heads = config["num_attention_heads"], config["num_key_value_heads"]
    writer = gguf.GGUFWriter(HERE / "gguf" / f"{name}.gguf", arch)
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    add_tokenizer(writer, HERE / source, config)
    state = {}
    for key, tensor in sorted(load_file(HERE / source / "model.safetensors").items()):
        values = tensor.float().numpy()
        of = None
        if arch == "llama" and (".q_proj" in key or ".k_proj" in key):
            of = heads if ".q_proj" in key else kv_heads
            values = np.ascontiguousarray(interleaved(values, of))
        kind = kind_of(key) if values.ndim == 2 else Type.F32
        if values.shape[-1] % 32 and kind not in (Type.F32, Type.F16):
            kind = Type.F16
        coded = gguf.quants.quantize(values, kind)
        writer.add_tensor(name_of(key), coded, raw_dtype=kind)
        decoded = gguf.quants.dequantize(coded, kind).reshape(values.shape)
        state[key] = torch.from_numpy(np.ascontiguousarray(back(decoded, of) if of else decoded).copy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    model_class = {"llama": transformers.LlamaForCausalLM, "qwen2": transformers.Qwen2ForCausalLM}[arch]
    config_class = {"llama": transformers.LlamaConfig, "qwen2": transformers.Qwen2Config}[arch]
    for key in ("architectures", "torch_dtype", "transformers_version", "model_type"):
        config.pop(key, None)
    model = model_class(config_class(**config, attn_implementation="eager")).float().eval()
    model.load_state_dict(state)
    ids = torch.tensor([[(7 * i * i + 3 * i) % config["vocab_size"] for i in range(24)]])
    with torch.no_grad():
        return ids[0].to(torch.int32), model(ids).logits[0]


(HERE / "gguf").mkdir(exist_ok=True)
out = {}
for source, name, kind_of in [
    ("llama_distill", "llama_f32", lambda key: Type.F32),
    ("llama_distill", "llama_q4_1", lambda key: Type.Q8_0 if "embed" in key or "head" in key else Type.Q4_1),
    ("qwen2_distill", "qwen2_q5_0", lambda key: Type.BF16 if "embed" in key else Type.Q5_0),
]:
    out[f"{name}.ids"], out[f"{name}.logits"] = make(source, name, kind_of)
save_file(out, HERE / "gguf" / "golden.safetensors")
