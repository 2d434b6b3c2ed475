"""Small models, the same in Hugging Face's names (for the oracle) and in each rank's Megatron parameters."""

import re
import zlib
from dataclasses import dataclass

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
EXPERTS, TOP_K, EXPERT_FFN = 4, 2, 24
_MOE_FLAGS = f"""
    --num-experts {EXPERTS} --moe-router-topk {TOP_K} --moe-intermediate-size {EXPERT_FFN}
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.0
"""


@dataclass(frozen=True)
class Family:
    """What a family adds to the small Llama."""

    config: dict
    flags: str
    qk_norm: bool = False
    experts: str | None = None
    """Hugging Face's names of an expert's projections: gate, up, down; None for a dense model."""

    @property
    def ffn(self):
        """Width of an expert, or of the MLP."""
        return EXPERT_FFN if self.experts else FFN

    @property
    def block(self):
        """Name of the module that holds router and experts."""
        return self.experts.split(".")[0]

    def mlps(self):
        """Names of the gate, up and down projection of each expert, or of the MLP."""
        if self.experts is None:
            return [("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")]
        return [tuple(self.experts.replace("{}", str(number)).split()) for number in range(EXPERTS)]


FAMILIES = {
    "llama": Family({}, ""),
    "qwen3_moe": Family(
        {
            "model_type": "qwen3_moe",
            "num_experts": EXPERTS,
            "num_experts_per_tok": TOP_K,
            "moe_intermediate_size": EXPERT_FFN,
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
            "head_dim": HEAD_DIM,
        },
        f"{_MOE_FLAGS} --norm-topk-prob --qk-layernorm --spec mindspeed_llm.tasks.models.spec.qwen3_spec layer_spec",
        qk_norm=True,
        experts="mlp.experts.{}.gate_proj mlp.experts.{}.up_proj mlp.experts.{}.down_proj",
    ),
    "mixtral": Family(
        {"model_type": "mixtral", "num_local_experts": EXPERTS, "num_experts_per_tok": TOP_K, "sliding_window": None},
        _MOE_FLAGS,
        experts="block_sparse_moe.experts.{}.w1 block_sparse_moe.experts.{}.w3 block_sparse_moe.experts.{}.w2",
    ),
}


@dataclass(frozen=True)
class Place:
    """A rank's place among those that divide parameters: ``(rank, size)`` of each group."""

    tensor: tuple[int, int] = (0, 1)
    expert: tuple[int, int] = (0, 1)
    expert_tensor: tuple[int, int] = (0, 1)


def config_of(family="llama"):
    """The content of config.json."""
    return CONFIG | FAMILIES[family].config


def _shapes(family):
    yield "model.embed_tokens.weight", (VOCABULARY, HIDDEN)
    yield "model.norm.weight", (HIDDEN,)
    yield "lm_head.weight", (VOCABULARY, HIDDEN)
    described = FAMILIES[family]
    for layer in range(LAYERS):
        name = f"model.layers.{layer}"
        yield f"{name}.input_layernorm.weight", (HIDDEN,)
        yield f"{name}.post_attention_layernorm.weight", (HIDDEN,)
        yield f"{name}.self_attn.q_proj.weight", (HIDDEN, HIDDEN)
        yield f"{name}.self_attn.k_proj.weight", (KV_HEADS * HEAD_DIM, HIDDEN)
        yield f"{name}.self_attn.v_proj.weight", (KV_HEADS * HEAD_DIM, HIDDEN)
        yield f"{name}.self_attn.o_proj.weight", (HIDDEN, HIDDEN)
        if described.qk_norm:
            yield f"{name}.self_attn.q_norm.weight", (HEAD_DIM,)
            yield f"{name}.self_attn.k_norm.weight", (HEAD_DIM,)
        if described.experts:
            yield f"{name}.{described.block}.gate.weight", (EXPERTS, HIDDEN)
        for mlp in described.mlps():
            gate, up, down = (f"{name}.{projection}.weight" for projection in mlp)
            yield gate, (described.ffn, HIDDEN)
            yield up, (described.ffn, HIDDEN)
            yield down, (HIDDEN, described.ffn)


def hf_params(salt=0, family="llama"):
    """{Hugging Face name: fp32 tensor}, a function of the names alone."""
    params = {}
    for name, shape in _shapes(family):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()) + salt)
        noise = torch.randn(shape, generator=generator)
        params[name] = 1 + 0.1 * noise if len(shape) == 1 else noise * (1.0 if "embed" in name else HIDDEN**-0.5)
    return params


def megatron_part(hf, name, layer, place, family="llama"):
    """The values of Megatron's parameter ``name`` on one rank.

    Args:
        hf: Weights, or their gradients.
        name: As in ``named_parameters``, without wrappers' prefixes.
        layer: The layer's number in the whole model, from 0; None outside of layers.
        place: Of the rank.
        family: Of the model.
    """
    if layer is None:
        outside = {
            "embedding.word_embeddings.weight": rows(hf["model.embed_tokens.weight"], place.tensor),
            "output_layer.weight": rows(hf["lm_head.weight"], place.tensor),
            "decoder.final_layernorm.weight": hf["model.norm.weight"],
        }
        return outside[name]
    get = {key.removeprefix(f"model.layers.{layer}."): value for key, value in hf.items()}
    part = re.sub(r"^decoder\.layers\.\d+\.", "", name)
    if part.startswith("mlp."):
        return _mlp_part(get, part, place, FAMILIES[family])
    # MindSpeed's TransformerEngine layers hold the norm before them
    if part in ("input_layernorm.weight", "self_attention.linear_qkv.layer_norm_weight"):
        return get["input_layernorm.weight"]
    if part == "pre_mlp_layernorm.weight":
        return get["post_attention_layernorm.weight"]
    if part in ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight"):
        return get[f"self_attn.{part.split('.')[1][0]}_norm.weight"]
    if part == "self_attention.linear_qkv.weight":
        # by query group: its queries, its key, its value
        q, k, v = (get[f"self_attn.{kind}_proj.weight"].unflatten(0, (KV_HEADS, -1)) for kind in "qkv")
        return rows(torch.cat((q, k, v), dim=1), place.tensor).flatten(0, 1)
    assert part == "self_attention.linear_proj.weight", name
    return columns(get["self_attn.o_proj.weight"], place.tensor)


def _mlp_part(get, part, place, described):
    if part == "mlp.linear_fc1.layer_norm_weight":
        return get["post_attention_layernorm.weight"]
    if part == "mlp.router.weight":
        return get[f"{described.block}.gate.weight"]
    mlps, division = described.mlps(), place.tensor
    if described.experts:
        rank, size = place.expert
        mlps, division = mlps[rank * EXPERTS // size : (rank + 1) * EXPERTS // size], place.expert_tensor
    both = [
        (
            torch.cat([rows(get[f"{projection}.weight"], division) for projection in mlp[:2]]),
            columns(get[f"{mlp[2]}.weight"], division),
        )
        for mlp in mlps
    ]
    if part in ("mlp.experts.weight1", "mlp.experts.weight2"):
        # [expert, inputs, outputs] of the rank's experts, seen as a matrix of other sides
        first = part.endswith("1")
        joined = torch.stack([weights[0 if first else 1].t() for weights in both])
        return joined.reshape(HIDDEN, -1) if first else joined.reshape(-1, HIDDEN)
    number = re.search(r"local_experts\.(\d+)\.", part)
    return both[int(number[1]) if number else 0][0 if "linear_fc1" in part else 1]


def rows(tensor, division):
    """The rows of one rank; ``division`` is ``(rank, size)``."""
    return tensor.chunk(division[1], dim=0)[division[0]]


def columns(tensor, division):
    """The columns of one rank; ``division`` is ``(rank, size)``."""
    return tensor.chunk(division[1], dim=1)[division[0]]
