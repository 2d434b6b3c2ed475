"""LoRA under recomputation of whole layers: adapters that train, whatever the method."""

from __future__ import annotations

from argparse import Namespace
from typing import Any

from torch import Tensor


def keep_gradients(model: Any, args: Namespace) -> None:
    """Let the output of the first stage's embedding require a gradient where LoRA has frozen it.

    A recomputed layer whose input requires none returns an output that requires none: its adapters get no gradient, and
    neither do those of the layers after it, without a word. MindSpeed-LLM 2.2.0, 2.3.0 and 26.0.0 see to it with
    ``--recompute-method block`` only.
    """
    embedding = getattr(model, "embedding", None)
    if embedding is not None and getattr(args, "lora_target_modules", None) and args.recompute_granularity == "full":
        embedding.register_forward_hook(_require_grad)


def _require_grad(_module: Any, _inputs: Any, output: Tensor) -> None:
    output.requires_grad_(True)
