"""The oracle's model: dense fp64 logits of one sequence, from a Hugging Face folder, sharing no code with the package.

It reads safetensors and config.json of the families Qwen2, Qwen3, Llama, Mistral, Gemma 2, Gemma 3 (text), Phi-3,
GLM-4, Qwen3-MoE, Mixtral, GLM-4.5, DeepSeek-V3 and gpt-oss, as transformers 4 and 5 write them. ``params`` is always
``{Hugging Face name: fp64 tensor}``, ``config`` the content of config.json.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.oracle_rotary import FULL, SLIDING, Config, head_dim, rotate, rotation

Params = dict[str, Tensor]


class Added(Params):
    """Weights whose products get an addend."""

    def added(self, name: str, values: Tensor, tokens: Tensor | None) -> Tensor | float:
        """What the product of ``values`` with the weight of the projection ``name`` gets; see :func:`_linear`."""
        raise NotImplementedError


CLOSE_CHOICE = 2e-6
"""Lead of the last chosen expert that the rounding of fp32 could turn round."""
CLOSE_LIMIT = 1e-6
"""Distance from a limit within which an activation may have a slope by fp64 and none by fp32, or the reverse."""
_EXPERT_PARTS = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


class CloseChoiceError(ValueError):
    """Two values lie within rounding: fp32 may choose another expert, or another side of a limit, than fp64."""


_NORMS: dict[str, tuple[str, str | None, str, str | None]] = {
    "gemma2": (
        "input_layernorm",
        "post_attention_layernorm",
        "pre_feedforward_layernorm",
        "post_feedforward_layernorm",
    ),
    "glm4": ("input_layernorm", "post_self_attn_layernorm", "post_attention_layernorm", "post_mlp_layernorm"),
}
_NORMS["gemma3_text"] = _NORMS["gemma2"]
_PRE_NORMS = ("input_layernorm", None, "post_attention_layernorm", None)
"""Names of the norms before and after the attention, before and after the MLP."""


def load(folder: str | Path) -> tuple[Params, dict[str, Any]]:
    """All tensors of a Hugging Face folder as fp64 leaves, and its config.json; all but router biases are trained."""
    folder = Path(folder)
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    params = {}
    for file in sorted(folder.glob("*.safetensors")):
        for name, tensor in load_file(file).items():
            params[name] = tensor.double().requires_grad_(not name.endswith("e_score_correction_bias"))
    if config.get("tie_word_embeddings", _is_gemma(config)):
        params.pop("lm_head.weight", None)
    return params, config


def _is_gemma(config: Config) -> bool:
    return config["model_type"].startswith("gemma")


def layer_types(config: Config) -> list[str]:
    """``full_attention`` or ``sliding_attention``, layer by layer."""
    family, layers = config["model_type"], range(config["num_hidden_layers"])
    if family in ("mistral", "mixtral", "phi3"):
        sliding = config.get("sliding_window", 4096 if family == "mistral" else None)
        return [SLIDING if sliding else FULL for _ in layers]
    if family in ("llama", "glm4", "glm4_moe", "deepseek_v3") or (
        family.startswith("qwen") and not config.get("use_sliding_window")
    ):
        return [FULL for _ in layers]
    if config.get("layer_types"):
        return config["layer_types"]
    if family == "qwen3_moe":
        return [SLIDING for _ in layers]
    if family in ("qwen2", "qwen3"):
        return [SLIDING if i >= config.get("max_window_layers", 28) else FULL for i in layers]
    pattern = {"gemma2": 2, "gemma3_text": config.get("sliding_window_pattern", 6)}[family]
    return [SLIDING if (i + 1) % pattern else FULL for i in layers]


def _norm(params: Params, config: Config, name: str | None, values: Tensor) -> Tensor:
    if name is None:
        return values
    gain = params[f"{name}.weight"] + 1 if _is_gemma(config) else params[f"{name}.weight"]
    return values / (values.square().mean(-1, keepdim=True) + config["rms_norm_eps"]).sqrt() * gain


def _linear(params: Params, name: str, values: Tensor, tokens: Tensor | None = None) -> Tensor:
    """``tokens`` has the numbers of the tokens of ``values``; None for all of them."""
    product = values @ params[f"{name}.weight"].T
    if isinstance(params, Added):
        product = product + params.added(name, values, tokens)
    return product + params[f"{name}.bias"] if f"{name}.bias" in params else product


def _softcap(values: Tensor, cap: float | None) -> Tensor:
    return values if cap is None else cap * torch.tanh(values / cap)


def _query_key_value(params: Params, config: Config, name: str, hidden: Tensor) -> list[Tensor]:
    """Each [seq, heads, head_dim]; rows of a fused tensor are all queries, all keys, all values."""
    dim = head_dim(config)
    if f"{name}.qkv_proj.weight" in params:
        queries = config["num_attention_heads"] * dim
        keys = (config.get("num_key_value_heads") or config["num_attention_heads"]) * dim
        parts = _linear(params, f"{name}.qkv_proj", hidden).split([queries, keys, keys], dim=-1)
    else:
        parts = tuple(_linear(params, f"{name}.{part}_proj", hidden) for part in ("q", "k", "v"))
    return [part.unflatten(-1, (-1, dim)) for part in parts]


def _latent_attention(
    params: Params, config: Config, name: str, hidden: Tensor, rotation: tuple[Tensor, Tensor]
) -> Tensor:
    """DeepSeek's attention (arXiv:2405.04434, equations 37 to 47), a head at a time."""
    plain, turned, wide = config["qk_nope_head_dim"], config["qk_rope_head_dim"], config["v_head_dim"]
    interleaved, rank = config.get("rope_interleave", True), config["kv_lora_rank"]

    def norm(part: str, values: Tensor) -> Tensor:
        # the norms of the latent vectors do not read rms_norm_eps
        return _norm(params, {**config, "rms_norm_eps": 1e-6}, f"{name}.{part}", values)

    if config.get("q_lora_rank"):
        query = _linear(params, f"{name}.q_b_proj", norm("q_a_layernorm", _linear(params, f"{name}.q_a_proj", hidden)))
    else:
        query = _linear(params, f"{name}.q_proj", hidden)
    compressed = _linear(params, f"{name}.kv_a_proj_with_mqa", hidden)
    shared_key = rotate(compressed[:, None, rank:], rotation, interleaved)[:, 0]
    key_value = _linear(params, f"{name}.kv_b_proj", norm("kv_a_layernorm", compressed[:, :rank]))
    scale = (plain + turned) ** -0.5
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    if rope.get("rope_type", rope.get("type", "default")) != "default" and rope.get("mscale_all_dim"):
        scale *= (0.1 * rope["mscale_all_dim"] * math.log(rope["factor"]) + 1) ** 2
    future, outputs = torch.ones(len(hidden), len(hidden)).triu(1).bool(), []
    for head in range(config["num_attention_heads"]):
        own = query[:, head * (plain + turned) : (head + 1) * (plain + turned)]
        key, value = key_value[:, head * (plain + wide) : (head + 1) * (plain + wide)].split([plain, wide], dim=-1)
        rotated = rotate(own[:, None, plain:], rotation, interleaved)[:, 0]
        scores = (own[:, :plain] @ key.T + rotated @ shared_key.T) * scale
        outputs.append(scores.masked_fill(future, -math.inf).softmax(-1) @ value)
    return _linear(params, f"{name}.o_proj", torch.cat(outputs, dim=-1))


def _attention(
    params: Params, config: Config, name: str, hidden: Tensor, rotation: tuple[Tensor, Tensor], window: int | None
) -> Tensor:
    if f"{name}.kv_b_proj.weight" in params:
        return _latent_attention(params, config, name, hidden, rotation)
    query, key, value = _query_key_value(params, config, name, hidden)
    if f"{name}.q_norm.weight" in params:
        query, key = _norm(params, config, f"{name}.q_norm", query), _norm(params, config, f"{name}.k_norm", key)
    query, key = (rotate(part, rotation, interleaved=config["model_type"] == "glm4") for part in (query, key))
    shared_by = query.shape[1] // key.shape[1]
    key, value = (part.repeat_interleave(shared_by, dim=1) for part in (key, value))
    scores = torch.einsum("qhd,khd->hqk", query, key) / math.sqrt(config.get("query_pre_attn_scalar", query.shape[-1]))
    if config["model_type"] == "gemma2":  # Gemma 3's configuration has the key too, and its attention does not read it
        scores = _softcap(scores, config.get("attn_logit_softcapping", 50.0))
    position = torch.arange(hidden.shape[0])
    behind = position[:, None] - position
    hidden_keys = (behind < 0) | (behind >= window) if window else behind < 0
    scores = scores.masked_fill(hidden_keys, -math.inf)
    if f"{name}.sinks" in params:  # a key without a value
        sinks = params[f"{name}.sinks"][:, None, None].expand(-1, len(position), 1)
        weights = torch.cat((scores, sinks), dim=-1).softmax(-1)[..., :-1]
    else:
        weights = scores.softmax(-1)
    return _linear(params, f"{name}.o_proj", torch.einsum("hqk,khd->qhd", weights, value).flatten(-2))


def _mlp(params: Params, config: Config, name: str, hidden: Tensor) -> Tensor:
    if f"{name}.gate_up_proj.weight" in params:
        gate, up = _linear(params, f"{name}.gate_up_proj", hidden).chunk(2, dim=-1)
    else:
        gate, up = (_linear(params, f"{name}.{part}_proj", hidden) for part in ("gate", "up"))
    if _is_gemma(config):  # GELU's approximation by tanh
        active = 0.5 * gate * (1 + torch.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
    else:
        active = gate * torch.sigmoid(gate)
    return _linear(params, f"{name}.down_proj", active * up)


def _expert(params: Params, config: Config, name: str, expert: int, hidden: Tensor, tokens: Tensor) -> Tensor:
    if config["model_type"] != "gpt_oss":
        gate, up, down = (f"{name}.{expert}.{part}" for part in _EXPERT_PARTS[config["model_type"] == "mixtral"])
        gated = _linear(params, gate, hidden, tokens)
        active = gated * torch.sigmoid(gated) * _linear(params, up, hidden, tokens)
        return _linear(params, down, active, tokens)
    # all experts of a layer are one tensor [expert, in, out], in which gate and up alternate
    both = hidden @ params[f"{name}.gate_up_proj"][expert] + params[f"{name}.gate_up_proj_bias"][expert]
    gate, up = both.unflatten(-1, (-1, 2)).unbind(-1)
    limit = config["swiglu_limit"]
    distance = torch.cat((gate - limit, up.abs() - limit)).abs()
    if distance.numel() and distance.min() < CLOSE_LIMIT:
        raise CloseChoiceError(f"{name}: a value is {distance.min():.1e} from the limit: take other weights or pairs")
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    active = (up + 1) * gate * torch.sigmoid(config.get("swiglu_alpha", 1.702) * gate)
    return active @ params[f"{name}.down_proj"][expert] + params[f"{name}.down_proj_bias"][expert]


def _highest(scores: Tensor, count: int, what: str) -> Tensor:
    """1 for the ``count`` highest scores of each row, 0 for the others."""
    ranked, order = scores.sort(descending=True)
    if count < scores.shape[-1] and (gap := (ranked[:, count - 1] - ranked[:, count]).min().item()) < CLOSE_CHOICE:
        raise CloseChoiceError(f"{what} of a token leads by {gap:.1e}: take other weights or pairs")
    return torch.zeros_like(scores).scatter(1, order[:, :count], 1.0)


def _experts(params: Params, config: Config, layer: str, hidden: Tensor, unevenness: list[Tensor]) -> Tensor:
    """The weighted sum of the experts that each token chooses, and the shared expert where the family has one.

    ``unevenness`` gets ``sum_e f_e P_e``: f_e is the share of expert e in the tokens' choices, times the number of
    experts, and P_e the mean of its scores, each divided by the sum of the token's (arXiv:2412.19437, eq. 17 to 20).
    """
    family, count = config["model_type"], config["num_experts_per_tok"]
    block = f"{layer}.block_sparse_moe" if family == "mixtral" else f"{layer}.mlp"
    glm = family in ("glm4_moe", "deepseek_v3")
    router = _linear(params, f"{block}.router" if family == "gpt_oss" else f"{block}.gate", hidden)
    scores = router.sigmoid() if glm else router.softmax(-1)
    choice = scores.detach() + (params[f"{block}.gate.e_score_correction_bias"] if glm else 0)
    if config.get("n_group", 1) > 1:
        by_group = choice.unflatten(-1, (config["n_group"], -1))
        best = by_group.sort(descending=True).values[..., :2].sum(-1)
        groups = _highest(best, config["topk_group"], f"{layer}: the last chosen group of experts")
        choice = torch.where(groups[..., None] > 0, by_group, -math.inf).flatten(1)
    choices = _highest(choice, count, f"{layer}: the last chosen expert")
    shares = choices.mean(0) * choices.shape[1] / count
    unevenness.append((shares * (scores / scores.sum(-1, keepdim=True)).mean(0)).sum())
    weights = choices * scores
    if family in ("mixtral", "gpt_oss") or config["norm_topk_prob"]:
        weights = weights / weights.sum(-1, keepdim=True)
    weights = weights * config.get("routed_scaling_factor", 1.0)
    mixed = torch.zeros_like(hidden)
    for expert in range(weights.shape[-1]):
        tokens = weights[:, expert].nonzero()[:, 0]
        output = _expert(params, config, f"{block}.experts", expert, hidden[tokens], tokens)
        mixed = mixed.index_add(0, tokens, weights[tokens, expert, None] * output)
    return mixed + _mlp(params, config, f"{block}.shared_experts", hidden) if glm else mixed


def _feed_forward(params: Params, config: Config, layer: str, hidden: Tensor, unevenness: list[Tensor]) -> Tensor:
    if f"{layer}.mlp.gate.weight" in params or config["model_type"] in ("mixtral", "gpt_oss"):
        return _experts(params, config, layer, hidden, unevenness)
    return _mlp(params, config, f"{layer}.mlp", hidden)


def logits(
    params: Params, config: Config, tokens: Sequence[int] | Tensor, unevenness: list[Tensor] | None = None
) -> Tensor:
    """Next-token logits of one sequence, [seq, vocabulary], fp64; ``unevenness`` gets that of each layer of experts.

    Rotations that depend on the length of the sequence take ``len(tokens)``.
    """
    unevenness = [] if unevenness is None else unevenness
    ids, types = torch.as_tensor(tokens), layer_types(config)
    rotations = {layer_type: rotation(config, layer_type, len(ids)) for layer_type in set(types)}
    before_attention, after_attention, before_mlp, after_mlp = _NORMS.get(config["model_type"], _PRE_NORMS)

    def norm(layer: str, name: str | None, values: Tensor) -> Tensor:
        return _norm(params, config, name and f"{layer}.{name}", values)

    hidden = params["model.embed_tokens.weight"][ids]
    if _is_gemma(config):
        hidden = hidden * math.sqrt(config["hidden_size"])
    for number, layer_type in enumerate(types):
        layer, window = f"model.layers.{number}", config.get("sliding_window", 4096) if layer_type == SLIDING else None
        normed = norm(layer, before_attention, hidden)
        output = _attention(params, config, f"{layer}.self_attn", normed, rotations[layer_type], window)
        hidden = hidden + norm(layer, after_attention, output)
        output = _feed_forward(params, config, layer, norm(layer, before_mlp, hidden), unevenness)
        hidden = hidden + norm(layer, after_mlp, output)
    hidden = _norm(params, config, "model.norm", hidden)
    scores = hidden @ params.get("lm_head.weight", params["model.embed_tokens.weight"]).T
    return _softcap(scores, config.get("final_logit_softcapping", 30.0 if config["model_type"] == "gemma2" else None))


def sequence_logprob(
    params: Params,
    config: Config,
    prompt_ids: Sequence[int],
    response_ids: Sequence[int],
    unevenness: list[Tensor] | None = None,
) -> tuple[Tensor, int]:
    """Sum of the response tokens' log-probabilities given all tokens before each (nats), and their number.

    A token with nothing before it has no probability: the first one of a response without a prompt is not scored.
    """
    tokens = [*prompt_ids, *response_ids]
    scored = tokens[max(1, len(prompt_ids)) :]
    # the last token predicts nothing, and yet counts in the length that some rotations depend on
    logprobs = logits(params, config, tokens, unevenness)[:-1].log_softmax(-1)[-len(scored) :]
    return logprobs.gather(1, torch.as_tensor(scored)[:, None]).sum(), len(scored)
