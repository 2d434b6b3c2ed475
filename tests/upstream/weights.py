"""A small Llama, the same in Hugging Face's names (for the oracle) and in each rank's Megatron parameters."""

import re
import zlib

import torch

HIDDEN, FFN, HEADS, KV_HEADS, LAYERS, VOCABULARY = 32, 48, 4, 2, 4, 512
HEAD_DIM = HIDDEN // HEADS
CONFIG = {
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": LAYERS,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "vocab_size": VOCABULARY,
}
MODEL_FLAGS = f"""
    --use-mcore-models --num-layers {LAYERS} --hidden-size {HIDDEN} --ffn-hidden-size {FFN}
    --num-attention-heads {HEADS} --group-query-attention --num-query-groups {KV_HEADS} --kv-channels {HEAD_DIM}
    --padded-vocab-size {VOCABULARY} --make-vocab-size-divisible-by 1 --untie-embeddings-and-output-weights
    --disable-bias-linear --position-embedding-type rope --rotary-base 10000 --normalization RMSNorm
    --norm-epsilon 1e-5 --swiglu --attention-dropout 0.0 --hidden-dropout 0.0 --no-masked-softmax-fusion
    --attention-softmax-in-fp32 --no-gradient-accumulation-fusion --max-position-embeddings 4096 --use-flash-attn
"""


def _shapes():
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        yield f"{name}.input_layernorm.weight", (HIDDEN,)
        yield f"{name}.post_attention_layernorm.weight", (HIDDEN,)
        yield f"{name}.self_attn.q_proj.weight", (HIDDEN, HIDDEN)
        yield f"{name}.self_attn.k_proj.weight", (KV_HEADS * HEAD_DIM, HIDDEN)
        yield f"{name}.self_attn.v_proj.weight", (KV_HEADS * HEAD_DIM, HIDDEN)
        yield f"{name}.self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        yield f"{name}.mlp.gate_proj.weight", (FFN, HIDDEN)
        yield f"{name}.mlp.up_proj.weight", (FFN, HIDDEN)
        yield f"{name}.mlp.down_proj.weight", (HIDDEN, FFN)


def hf_params(salt=0):
    """{Hugging Face name: fp32 tensor}, a function of the names alone."""
    params = {}
    for name, shape in _shapes():
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + salt)
        noise = torch.randn(shape, generator=generator)
        params[name] = 1 + 0.1 * noise if len(shape) == 1 else noise * (1.0 if "embed" in name else HIDDEN**-0.5)
    return params


def megatron_part(hf, name, layer, tensor_rank, tensor_size):
    """The values of Megatron's parameter ``name`` on one tensor-parallel rank.

    Args:
        hf: Weights, or their gradients.
        name: As in ``named_parameters``, without wrappers' prefixes.
        layer: The layer's number in the whole model, from 0; None outside of layers.
    """

    def rows(tensor):
        return tensor.chunk(tensor_size, dim=0)[tensor_rank]

    def columns(tensor):
        return tensor.chunk(tensor_size, dim=1)[tensor_rank]

    outside = {
        "embedding.word_embeddings.weight": rows(hf["model.embed_tokens.weight"]),
        "output_layer.weight": rows(hf["lm_head.weight"]),
        "decoder.final_layernorm.weight": hf["model.norm.weight"],
    }
    if layer is None:
        return outside[name]
    get = {key.removeprefix(f"model.layers.{layer}."): value for key, value in hf.items()}
    part = re.sub(r"^decoder\.layers\.\d+\.", "", name)
    # MindSpeed's TransformerEngine layers hold the norm before them
    if part in ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"):
        return get["input_layernorm.weight"]
    if part in ("pre_mlp_layernorm.weight", "mlp.linear_fc1.layer_norm_weight"):
        return get["post_attention_layernorm.weight"]
    if part == "self_attention.linear_qkv.weight":
        # by query group: its queries, its key, its value
        q, k, v = (get[f"self_attn.{kind}_proj.weight"].unflatten(0, (KV_HEADS, -1)) for kind in "qkv")
        return rows(torch.cat((q, k, v), dim=1)).flatten(0, 1)
    if part == "self_attention.linear_proj.weight":
        return columns(get["self_attn.o_proj.weight"])
    if part == "mlp.linear_fc1.weight":
        return torch.cat([rows(get[f"mlp.{kind}_proj.weight"]) for kind in ("gate", "up")])
    assert part == "mlp.linear_fc2.weight", name
    return columns(get["mlp.down_proj.weight"])
