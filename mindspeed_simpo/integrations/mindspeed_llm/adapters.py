"""LoRA with full recomputation: gradients for the adapters with every recompute method."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from torch import Tensor


def keep_gradients(model: Any, args: Namespace) -> None:
    """Make the output of the embedding require a gradient where LoRA has frozen the embedding.

    The output of a recomputed layer requires no gradient where the layer's input requires none. Then the adapters of
    this layer and of all following layers silently get no gradient. MindSpeed-LLM 2.2.0, 2.3.0 and 26.0.0 prevent this
    with ``--recompute-method block`` only.

    Args:
        model: A pipeline chunk; without an embedding nothing is changed.
        args: Arguments of MindSpeed-LLM.
    """
    embedding = getattr(model, "embedding", None)
    if embedding is not None and getattr(args, "lora_target_modules", None) and args.recompute_granularity == "full":
        embedding.register_forward_hook(_require_grad)


def _require_grad(_module: Any, _inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)
