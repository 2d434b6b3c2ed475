"""Training of adapters (LoRA), dense and in fp64, in the words of :mod:`tests.oracle`; the base weights are constant.

``adapters`` is always ``{name in the file of peft, without its prefix: fp64 tensor}``.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from tests.oracle import AdamW, Pair, grad_norm
from tests.oracle_model import Added, Params, load, sequence_logprob
from tests.oracle_objectives import STAGES, Options, Running, Scores, score

_PREFIX = "base_model.model."


def load_adapters(folder: str | Path) -> tuple[Params, float]:
    """The factors in a folder of peft as fp64 leaves that require a gradient, and ``lora_alpha / r``."""
    folder = Path(folder)
    config = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    tensors = load_file(folder / "adapter_model.safetensors")
    adapters = {name.removeprefix(_PREFIX): tensor.double().requires_grad_() for name, tensor in tensors.items()}
    return adapters, config["lora_alpha"] / config["r"]


def adapted(params: Params, adapters: Params, scale: float) -> Params:
    """``W + scale B A`` in place of each adapted weight."""
    changed = dict(params)
    for name in adapters:
        path, found, _ = name.partition(".lora_A.weight")
        if found:
            product = adapters[f"{path}.lora_B.weight"] @ adapters[name]
            changed[f"{path}.weight"] = params[f"{path}.weight"] + scale * product
    return changed


class Dropped(Added):
    """Adapted weights for one sequence, with ``scale B A (mask x) / (1 - rate)`` added to ``W x``."""

    def __init__(self, params: Params, adapters: Params, scale: float, rate: float, token_keys: np.ndarray) -> None:
        super().__init__(params)
        self._adapters, self._factor, self._rate, self._keys = adapters, scale / (1 - rate), rate, token_keys

    def added(self, name: str, values: Tensor, tokens: Tensor | None) -> Tensor | float:
        a = self._adapters.get(f"{name}.lora_A.weight")
        if a is None:
            return 0.0
        keys = self._keys if tokens is None else self._keys[tokens.numpy()]
        word = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "big")
        of_rows = _hashed(keys ^ np.uint64(word))
        of_features = _hashed(np.arange(values.shape[-1], dtype=np.uint64) ^ _GOLDEN)
        kept = _hashed(of_rows[:, None] ^ of_features) >= np.uint64(int(self._rate * 2**32))
        return self._factor * (values * torch.from_numpy(kept)) @ a.T @ self._adapters[f"{name}.lora_B.weight"].T


_GOLDEN = np.uint64(0x9E3779B9)


def _hashed(words: np.ndarray) -> np.ndarray:
    """Two rounds of shift and multiplication on numbers of 32 bits."""
    for shift, factor in ((16, 0x21F0AAAD), (15, 0x7FEB352D)):
        words = (words ^ words >> np.uint64(shift)) * np.uint64(factor) % np.uint64(2**32)
    return words ^ words >> np.uint64(15)


def _token_keys(seed: int, step: int, pair: int, side: int, prompt: int, response: int) -> np.ndarray:
    """Of a sequence: each token's number is its pair's, two bits for its part, and 28 for its place in the part."""
    key = np.array(_GOLDEN)
    for word in (seed, step):
        key = _hashed(key ^ np.uint64(word))
    places = [(pair << 30) + place for place in range(prompt)]
    places += [(pair << 30) + ((1 + side) << 28) + place for place in range(response)]
    numbers = np.array(places, dtype=np.uint64)
    return _hashed(_hashed(numbers % np.uint64(2**32) ^ key) ^ numbers // np.uint64(2**32))


def train_step(
    folder: str | Path,
    adapter_folder: str | Path,
    pairs: Sequence[Pair],
    lr: float,
    options: Options,
    running: Running | None = None,
    dropout: float = 0.0,
    seed: int = 0,
) -> tuple[float, float, Params, Params]:
    """The first optimizer step on a global batch; the reference is the model without adapters, and without dropout.

    Returns:
        Loss, gradient norm and gradients before the step, and the adapters after it.
    """
    params, config = load(folder)
    params = {name: tensor.detach() for name, tensor in params.items()}
    adapters, scale = load_adapters(adapter_folder)
    running = running or Running()
    total = {name: torch.zeros_like(tensor) for name, tensor in adapters.items()}
    losses = []
    for number, (prompt, *responses) in enumerate(pairs):
        unevenness: list[Tensor] = []
        scored = []
        for side, response in enumerate(responses):
            keys = _token_keys(seed, 0, number, side, len(prompt), len(response))
            changed = Dropped(params, adapters, scale, dropout, keys) if dropout else adapted(params, adapters, scale)
            scored.append(sequence_logprob(changed, config, prompt, response, unevenness))
        sums, counts = zip(*scored, strict=True)
        reference = None
        if STAGES[options.stage].needs_reference:
            reference = tuple(sequence_logprob(params, config, prompt, each)[0].item() for each in responses)
        loss, metrics = score(Scores(sums, counts, reference, running.value), options)
        if options.moe_aux_loss_coeff:  # of both sequences of the pair, half each
            loss = loss + options.moe_aux_loss_coeff / 2 * torch.stack(unevenness).sum()
        losses.append(metrics["loss"])
        # an expert that no token of the pair chooses has no gradient
        parts = torch.autograd.grad(loss / len(pairs), list(adapters.values()), materialize_grads=True)
        _accumulate(total, parts)
    norm = grad_norm(total)
    # the 1e-6 is megatron-core's and torch's guard against a zero norm
    clip = min(1.0, options.clip_grad / (norm + 1e-6)) if options.clip_grad else 1.0
    AdamW(adapters, options).step({name: grad * clip for name, grad in total.items()}, lr)
    after = {name: tensor.detach() for name, tensor in adapters.items()}
    return sum(losses) / len(losses), norm, total, after


def _accumulate(total: Mapping[str, Tensor], parts: Sequence[Tensor]) -> None:
    for accumulated, part in zip(total.values(), parts, strict=True):
        accumulated += part
