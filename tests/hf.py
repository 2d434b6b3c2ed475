"""Small but real inputs for tests: Hugging Face checkpoints and preference data."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from tests.tokenizers import CHINESE, ENGLISH, TOKENIZER_SIZE, Family, make_tokenizer

ExpertFamily = Literal["qwen3_moe", "mixtral", "glm4_moe", "deepseek_v3", "gpt_oss"]
TOKENIZER_OF: dict[str, Family] = {
    "qwen3_moe": "qwen3",
    "mixtral": "mistral",
    "glm4_moe": "glm4",
    "deepseek_v3": "llama",
    "gpt_oss": "qwen3",
}
"""The family whose tokenizer a family with experts has; gpt-oss has one of its own, which no test needs."""
RopeScaling = Literal["llama3", "linear", "dynamic", "yarn", "longrope"]

DYNAMIC_CONTEXT = 16
"""``max_position_embeddings`` of a model with dynamic scaling."""


def make_checkpoint(
    folder: str | Path,
    family: Family | ExpertFamily = "qwen2",
    *,
    hidden: int = 64,
    layers: int = 2,
    heads: int = 4,
    kv_heads: int = 2,
    head_dim: int | None = None,
    intermediate: int | None = None,
    vocab_size: int | None = None,
    tied: bool = False,
    window: int | None = None,
    rope_scaling: RopeScaling | None = None,
    partial: float | None = None,
    experts: int = 4,
    max_positions: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
    std: float = 0.1,
    max_shard_size: str = "5GB",
) -> Path:
    """Write a randomly initialised model of ``family``, with its tokenizer, as a Hugging Face folder.

    Nothing is left at a value that hides a mistake: ``std`` makes the logits anything but flat, norm weights are not
    one and biases not zero.

    Args:
        folder: Where to write; made where absent.
        family: Architecture, special tokens and chat template.
        hidden: Hidden size; ``heads``, ``kv_heads`` and ``layers`` as the names say.
        layers: Transformer layers.
        heads: Query heads.
        kv_heads: Key and value heads.
        head_dim: Size of a head; default ``hidden // heads``.
        intermediate: Size of the MLP; default twice ``hidden``.
        vocab_size: Rows of the embedding; default the tokenizer's 512. A smaller one makes the tokenizer as small
            (at least 270), a larger one leaves rows that no token uses.
        tied: Whether the embedding is the LM head.
        window: Tokens that a token of a sliding layer sees, itself included; default 8 for Gemma and gpt-oss, which
            have sliding layers always, and none for the others. Mistral's and Phi-3's layers all slide; of Qwen's,
            those from the middle on; of Gemma's and gpt-oss's, the first, the third and so on.
        rope_scaling: By name, each with an original context so small that short tests feel it; Gemma 3 scales its
            full layers only. Phi-3 knows ``longrope`` only.
        partial: Rotated part of each head; default 1 for Phi-3 and 0.5 for GLM-4, the only ones that have it.
        experts: Experts of a layer where the family has them; a token chooses two.
        max_positions: ``max_position_embeddings``; default 4096, with a scaling that reads it what fits the scaling.
        dtype: Type of the stored weights.
        seed: Seed of the weights.
        std: Standard deviation of the weights.
        max_shard_size: Largest safetensors file.
    """
    vocab_size = vocab_size or TOKENIZER_SIZE
    tokenizer = make_tokenizer(TOKENIZER_OF.get(family, family), min(vocab_size, TOKENIZER_SIZE))
    rope = _rope(family, rope_scaling, head_dim or hidden // heads, partial)
    context = rope.get("original_max_position_embeddings", DYNAMIC_CONTEXT)
    scaled = {"dynamic": DYNAMIC_CONTEXT, "yarn": 4 * context, "longrope": 4 * context}.get(rope_scaling or "", 4096)
    shape: dict[str, Any] = _windows(family, window, layers) | _experts(family, hidden, experts)
    shape |= {
        "hidden_size": hidden,
        "intermediate_size": intermediate or 2 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "max_position_embeddings": max_positions or scaled,
        "vocab_size": vocab_size,
        "tie_word_embeddings": tied,
        "initializer_range": std,
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "rope_parameters": rope,
    }
    if family not in ("qwen2", "phi3") or head_dim:
        shape["head_dim"] = head_dim or hidden // heads
    if rope_scaling == "longrope" and family == "phi3":
        shape["original_max_position_embeddings"] = context
    if family == "gemma3_text":
        # a base of its own for each type of layer, so that one in the other's place is seen
        local = {"rope_type": "default", "rope_theta": 700.0}
        shape["rope_parameters"] = {"full_attention": rope, "sliding_attention": local}
    shape |= _scores(family)
    if family == "deepseek_v3":
        # all sizes differ, so that one in another's place is seen
        del shape["head_dim"]
        shape |= {"num_key_value_heads": heads, "q_lora_rank": 20, "kv_lora_rank": 18}
        shape |= {"qk_nope_head_dim": 12, "qk_rope_head_dim": 8, "v_head_dim": 10}
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **shape))
        for name, param in model.named_parameters():
            if param.dim() == 1 or name.endswith("_bias"):
                param.data += (1.0 if name.endswith("sinks") else std) * torch.randn_like(param)
        for name in (name for name, _ in model.named_buffers() if name.endswith("e_score_correction_bias")):
            model.get_buffer(name).normal_(0.0, std)
        if tokenizer.pad_token_id is not None:  # the padding row of an embedding begins at zero
            model.get_input_embeddings().weight.data[tokenizer.pad_token_id] = std * torch.randn(hidden)
    model.to(getattr(torch, dtype)).save_pretrained(folder, max_shard_size=max_shard_size)
    tokenizer.save_pretrained(folder)
    return Path(folder)


def to_mxfp4(folder: str | Path, seed: int = 0) -> Path:
    """Replace the weights of the experts of a gpt-oss folder by random ones in MXFP4, as published checkpoints are."""
    path, draw = Path(folder) / "model.safetensors", torch.Generator().manual_seed(seed)
    tensors = load_file(path)
    for name in [name for name, tensor in tensors.items() if tensor.dim() == 3]:
        experts, inputs, outputs = tensors.pop(name).shape
        size = (experts, outputs, inputs // 32)
        tensors[f"{name}_blocks"] = torch.randint(256, (*size, 16), generator=draw, dtype=torch.uint8)
        tensors[f"{name}_scales"] = torch.randint(120, 125, size, generator=draw, dtype=torch.uint8)
    save_file(tensors, path, metadata={"format": "pt"})
    config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    kept = ["model.layers.*.self_attn", "model.layers.*.mlp.router", "model.embed_tokens", "lm_head"]
    config["quantization_config"] = {"quant_method": "mxfp4", "modules_to_not_convert": kept}
    (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return Path(folder)


def _rope(family: Family, scaling: RopeScaling | None, head_dim: int, partial: float | None) -> dict[str, Any]:
    if partial is not None and family not in ("phi3", "glm4", "glm4_moe"):
        raise ValueError(f"{family} has no partial rotation")
    if family in ("glm4", "glm4_moe"):
        partial = partial or 0.5
    pairs = int(head_dim * (partial or 1)) // 2
    rope = {"rope_theta": 10000.0, "rope_type": scaling or "default"} | (
        {"partial_rotary_factor": partial} if partial else {}
    )
    options: dict[RopeScaling | None, dict[str, Any]] = {
        None: {},
        "llama3": {
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        },
        "linear": {"factor": 4.0},
        "dynamic": {"factor": 4.0},
        # over 64 positions the ramp has two pairs of a head of 16 on its slope
        "yarn": {"factor": 4.0, "original_max_position_embeddings": 64}
        | ({"truncate": False} if family == "gpt_oss" else {}),
        "longrope": {
            "short_factor": [1 + 0.05 * pair for pair in range(pairs)],
            "long_factor": [1.5 + 0.5 * pair for pair in range(pairs)],
            "original_max_position_embeddings": 16,
        },
    }
    return rope | options[scaling]


def _scores(family: str) -> dict[str, Any]:
    if family not in ("gemma2", "gemma3_text"):
        return {}
    caps = {"attn_logit_softcapping": 1.5, "final_logit_softcapping": 2.5} if family == "gemma2" else {}
    return {"query_pre_attn_scalar": 24} | caps


def _experts(family: str, hidden: int, experts: int) -> dict[str, Any]:
    """Sizes of the experts, smaller than those of a dense layer where the family has both."""
    shape: dict[str, Any] = {"num_experts_per_tok": 2}
    if family == "mixtral":
        return shape | {"num_local_experts": experts}
    if family == "gpt_oss":  # a limit that some activations reach
        return shape | {"num_local_experts": experts, "swiglu_limit": 2.5}
    shape |= {"moe_intermediate_size": hidden // 2}
    if family == "qwen3_moe":
        return shape | {"num_experts": experts, "norm_topk_prob": True, "mlp_only_layers": [1]}
    if family == "deepseek_v3":
        grouped = {
            "n_group": 4,
            "topk_group": 3,
            "num_experts_per_tok": 3,
            "routed_scaling_factor": 1.5,
            "n_shared_experts": 2,
        }
        return shape | grouped | {"n_routed_experts": 2 * experts, "first_k_dense_replace": 1}
    if family == "glm4_moe":
        scaled = {"routed_scaling_factor": 1.5, "n_shared_experts": 2, "use_qk_norm": True}
        return shape | scaled | {"n_routed_experts": experts, "first_k_dense_replace": 1}
    return {}


def _windows(family: Family, window: int | None, layers: int) -> dict[str, Any]:
    if family in ("gemma2", "gemma3_text", "gpt_oss"):
        types = ["full_attention" if layer % 2 else "sliding_attention" for layer in range(layers)]
        return {"sliding_window": window or 8, "layer_types": types}
    if family in ("mistral", "mixtral", "phi3"):
        return {"sliding_window": window}
    if window is None:
        return {}
    if family in ("qwen2", "qwen3"):
        return {"use_sliding_window": True, "sliding_window": window, "max_window_layers": layers // 2}
    raise ValueError(f"{family} has no sliding window")


def make_pairs(path: str | Path, n: int, seed: int = 0, *, system: bool = True) -> Path:
    """Write ``n`` preference pairs as JSONL rows ``prompt, chosen, rejected`` of message lists.

    Every run of eight rows has both languages, one with a system turn (unless ``system`` is false: Gemma 2 has none),
    one of several turns, one with one-word answers and one long one; chosen answers are sentences of the tokenizers'
    text, rejected ones their shuffled pieces.
    """
    draw = random.Random(seed)
    sentences = [ENGLISH.strip().splitlines(), CHINESE.strip().splitlines()]
    kinds = [0 if number % 8 == 1 and not system else number % 8 for number in range(n)]
    rows = [_pair(draw, sentences[number % 2], kind) for number, kind in enumerate(kinds)]
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def _pair(draw: random.Random, sentences: list[str], kind: int) -> dict[str, list[dict[str, str]]]:
    prompt = [{"role": "user", "content": draw.choice(sentences)}]
    if kind == 1:
        prompt.insert(0, {"role": "system", "content": draw.choice(sentences)})
    for _ in range({2: 1, 5: 3}.get(kind, 0)):
        prompt.append({"role": "assistant", "content": draw.choice(sentences)})
        prompt.append({"role": "user", "content": draw.choice(sentences)})
    if kind == 3:
        chosen, rejected = ("好", "不") if draw.random() < 0.5 else ("Yes", "No")
    else:
        chosen = "\n".join(draw.choice(sentences) for _ in range(12 if kind == 6 else draw.randint(1, 3)))
        pieces = chosen.split(" ") if " " in chosen else list(chosen)
        rejected = (" " if " " in chosen else "").join(draw.sample(pieces, k=draw.randint(2, len(pieces) - 1)))
    answers = ({"role": "assistant", "content": text} for text in (chosen, rejected))
    return {"prompt": prompt, "chosen": [next(answers)], "rejected": [next(answers)]}


class Pairs(list):
    """``TokenizedPair`` records and their lengths, as a dataset has them."""

    @property
    def lengths(self):
        return np.array([pair.lengths for pair in self])


def make_token_pairs(
    n: int, vocab_size: int = TOKENIZER_SIZE, seed: int = 0, max_prompt: int = 12, max_response: int = 16
) -> list[tuple[list[int], list[int], list[int]]]:
    """``n`` pairs ``(prompt_ids, chosen_ids, rejected_ids)`` of random ids.

    The first pairs hold what breaks sharded softmaxes: id 0 and both ids at each boundary of 2, 4 and 8 vocabulary
    shards as labels, responses of one token, and chosen and rejected of very unequal length.
    """
    draw = random.Random(seed)

    def ids(count: int) -> list[int]:
        return [draw.randrange(vocab_size) for _ in range(count)]

    edges = sorted({i * vocab_size // 8 - side for i in range(1, 9) for side in (0, 1)} - {vocab_size} | {0})
    pairs = [
        (ids(draw.randint(1, max_prompt)), ids(draw.randint(1, max_response)), ids(draw.randint(1, max_response)))
        for _ in range(n)
    ]
    special = [
        (edges[: len(edges) // 2 + 1], edges[len(edges) // 2 :]),
        ([0], ids(max_response)),
        (ids(max_response), [0]),
    ]
    for number, (chosen, rejected) in enumerate(special[:n]):
        pairs[number] = (pairs[number][0], chosen, rejected)
    return pairs


def write_random_weights(folder: str | Path, model: PreTrainedModel, seed: int) -> None:
    """Write a model with weights that hide no mistake: large ones, and norms that differ from one."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator)
            if parameter.dim() > 1:
                parameter.copy_(noise * 0.12)
            else:
                parameter.add_(noise * 0.1)
    model.save_pretrained(folder)
