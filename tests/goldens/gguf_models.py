"""Makes tests/goldens/gguf/: small models as GGUF files, as llama.cpp's converter writes them, and their logits.

    pip install gguf safetensors torch transformers
    python tests/goldens/gguf_models.py

The weights are those of `llama_distill` (without its stretched rotary positions), `qwen2_distill`, `deepseek_v3` and
`deepseek_v2_lite`, the logits those of transformers with the weights as the `gguf` package decodes them, in float32. Of the
deepseek2 files some have the up-projection of latent attention in halves, as today's converter writes it, and one has it
whole, as files of 2024 do.
"""

import json
import pathlib
import tempfile

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
    "self_attn.q_a_proj": "attn_q_a",
    "self_attn.q_a_layernorm": "attn_q_a_norm",
    "self_attn.q_b_proj": "attn_q_b",
    "self_attn.kv_a_proj_with_mqa": "attn_kv_a_mqa",
    "self_attn.kv_a_layernorm": "attn_kv_a_norm",
    "self_attn.kv_b_proj": "attn_kv_b",
    "mlp.gate": "ffn_gate_inp",
    "mlp.shared_experts.gate_proj": "ffn_gate_shexp",
    "mlp.shared_experts.up_proj": "ffn_up_shexp",
    "mlp.shared_experts.down_proj": "ffn_down_shexp",
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


def settings_of_deepseek(writer, config, is_split):
    rank, rope = config["kv_lora_rank"], config["qk_rope_head_dim"]
    head, value = config["qk_nope_head_dim"] + rope, config["v_head_dim"]
    writer.add_head_count_kv(1 if is_split else config["num_attention_heads"])
    writer.add_leading_dense_block_count(config["first_k_dense_replace"])
    if config["q_lora_rank"]:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(rank)
    writer.add_key_length(rank + rope if is_split else head)
    writer.add_value_length(rank if is_split else value)
    if is_split:
        writer.add_key_length_mla(head)
        writer.add_value_length_mla(value)
    writer.add_expert_feed_forward_length(config["moe_intermediate_size"])
    writer.add_expert_count(config["n_routed_experts"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_used_count(config["num_experts_per_tok"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    if config["norm_topk_prob"]:
        writer.add_expert_weights_norm(True)
    if is_split:
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
        kinds = {"sigmoid": gguf.ExpertGatingFuncType.SIGMOID, "softmax": gguf.ExpertGatingFuncType.SOFTMAX}
        writer.add_expert_gating_func(kinds[config["scoring_func"]])
    writer.add_rope_dimension_count(rope)
    scaling = config["rope_scaling"]
    writer.add_rope_scaling_type(gguf.RopeScalingType.YARN)
    writer.add_rope_scaling_factor(scaling["factor"])
    writer.add_rope_scaling_orig_ctx_len(scaling["original_max_position_embeddings"])
    writer.add_rope_scaling_yarn_log_mul(0.1 * scaling["mscale_all_dim"])


def read(source):
    """The tensors of a folder in f32, its multi-token prediction left out."""
    config = json.loads((HERE / source / "config.json").read_text())
    state = {}
    for shard in sorted((HERE / source).glob("model*.safetensors")):
        state |= {key: tensor.float().numpy() for key, tensor in load_file(shard).items()}
    mtp = f"model.layers.{config['num_hidden_layers']}."
    return config, {key: state[key] for key in sorted(state) if not key.startswith(mtp)}


def make_deepseek(source, name, kind_of, is_split):
    config, state = read(source)
    writer = gguf.GGUFWriter(HERE / "gguf" / f"{name}.gguf", "deepseek2")
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_rope_freq_base(config["rope_theta"])
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    settings_of_deepseek(writer, config, is_split)
    add_tokenizer(writer, HERE / source, config)
    decoded = {}

    def add(name, values):
        kind = kind_of(name) if values.ndim > 1 and "gate_inp" not in name else Type.F32
        if values.shape[-1] % gguf.GGML_QUANT_SIZES[kind][0]:
            kind = Type.F16
        coded = gguf.quants.quantize(np.ascontiguousarray(values), kind)
        writer.add_tensor(name, coded, raw_dtype=kind)
        return gguf.quants.dequantize(coded, kind).reshape(values.shape)

    heads, nope = config["num_attention_heads"], config["qk_nope_head_dim"]
    for key, values in state.items():
        if ".mlp.experts." in key:
            _, _, layer, _, _, expert, part, _ = key.split(".")
            if expert == "0":
                every = [key.replace(".experts.0.", f".experts.{i}.") for i in range(config["n_routed_experts"])]
                stacked = np.stack([state[key] for key in every])
                found = add(f"blk.{layer}.ffn_{part.removesuffix('_proj')}_exps.weight", stacked)
                decoded |= dict(zip(every, found))
        elif key.endswith("e_score_correction_bias"):
            decoded[key] = add(f"blk.{key.split('.')[2]}.exp_probs_b.bias", values)
        elif is_split and key.endswith("kv_b_proj.weight"):
            per_head = values.reshape(heads, -1, values.shape[1])
            at = f"blk.{key.split('.')[2]}"
            keys = add(f"{at}.attn_k_b.weight", per_head[:, :nope].swapaxes(1, 2))
            rest = add(f"{at}.attn_v_b.weight", per_head[:, nope:])
            decoded[key] = np.concatenate([keys.swapaxes(1, 2), rest], axis=1).reshape(values.shape)
        else:
            decoded[key] = add(name_of(key), values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return logits_of_folder(config, decoded)


def logits_of_folder(config, state):
    """Transformers builds its own stacks of experts from a folder, so it is given one."""
    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        state = {key: torch.from_numpy(values.astype(np.float32).copy()) for key, values in state.items()}
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})
        (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": "float32"}))
        model = transformers.AutoModelForCausalLM.from_pretrained(
            folder, dtype=torch.float32, attn_implementation="eager"
        ).eval()
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
for source, name, kind_of, is_split in [
    ("deepseek_v3", "deepseek_v3_f32", lambda name: Type.F32, True),
    ("deepseek_v3", "deepseek_v3_q8_0", lambda name: Type.Q8_0, True),
    ("deepseek_v2_lite", "deepseek_v2_lite_bf16", lambda name: Type.BF16, False),
]:
    out[f"{name}.ids"], out[f"{name}.logits"] = make_deepseek(source, name, kind_of, is_split)
save_file(out, HERE / "gguf" / "golden.safetensors")
