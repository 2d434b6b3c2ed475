"""``torchrun ... -m mindspeed_simpo.posttrain_gpt ...``: MindSpeed-LLM's post-training with the added ``--stage``s."""

from __future__ import annotations

import os
import sys

from mindspeed_simpo.errors import ConfigError, SimpoError, let_first_rank_print
from mindspeed_simpo.integrations.mindspeed_llm import hooks


def main() -> None:
    """Run MindSpeed-LLM's post-training with this package's objectives as values of ``--stage``.

    Modules are imported in the same order as by MindSpeed-LLM's own ``posttrain_gpt.py``.

    Raises:
        ConfigError: where MindSpeed-LLM, MindSpeed, Megatron-LM or torch_npu cannot be imported.
    """
    hooks.install()
    try:
        from mindspeed_llm import megatron_adaptor  # noqa: F401
    except ModuleNotFoundError as error:
        if error.name not in ("mindspeed_llm", "mindspeed", "megatron", "torch_npu"):
            raise
        raise ConfigError(
            f"cannot import {error.name}: start from MindSpeed-LLM's root folder (with Megatron-LM's megatron/ in it), "
            "or put MindSpeed-LLM, MindSpeed and Megatron-LM core_v0.12.1 on PYTHONPATH"
        ) from None
    from mindspeed_llm.tasks.posttrain.launcher import AutoTrainer

    AutoTrainer().train()


def _main() -> None:
    try:
        main()
    except SimpoError as error:
        rank = int(os.environ.get("RANK", "0"))
        let_first_rank_print(rank)
        sys.stderr.write(f"mindspeed_simpo: {f'rank {rank}: ' if rank else ''}{error}\n")
        raise SystemExit(error.exit_code) from None


if __name__ == "__main__":
    _main()
