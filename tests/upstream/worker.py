"""``mindspeed_simpo.posttrain_gpt`` with known weights, whose gradients are left in a folder; run under torchrun.

    worker.py FOLDER FLAGS...

FOLDER gets ``RANK.pt``: ``{parameter name: (layer in the whole model or None, gradient of the last step, value after
it)}`` with the rank's place. Where FOLDER/forms.json lists configuration keys, each step after the first takes the next
ones, and ``RANK.pt`` has the gradients of every step.
"""

import json
import os
import re
import resource
import sys
import zlib
from dataclasses import astuple
from pathlib import Path

from mindspeed_simpo.integrations.mindspeed_llm import hooks

hooks.install()

import psutil  # noqa: E402
import torch  # noqa: E402
from mindspeed_llm import megatron_adaptor  # noqa: E402, F401
from mindspeed_llm.tasks.posttrain.launcher import AutoTrainer  # noqa: E402
from torch_npu import grouped  # noqa: E402
from weights import Place, hf_params, megatron_part  # noqa: E402 - MindSpeed-LLM has a package tests of its own


def named(model):
    """(name without wrappers, global layer, parameter) of one pipeline chunk."""
    modules = dict(model.named_modules())
    for name, parameter in model.named_parameters():
        short = re.sub(r"^((module|base_model|model)\.)+", "", name)
        local = re.search(r"^(.*decoder\.layers\.\d+)\.", name)
        layer = modules[local[1]].layer_number - 1 if local else None
        yield short, layer, parameter


def whole_gradients(model):
    """Undo the division of the gradients over data-parallel ranks by the distributed optimizer."""
    from megatron.core import mpu

    for buffers, group in (
        (model.buffers, mpu.get_data_parallel_group(with_context_parallel=True)),
        (model.expert_parallel_buffers, mpu.get_expert_data_parallel_group()),
    ):
        for bucket in (bucket for buffer in buffers for bucket in buffer.buckets):
            shards = bucket.grad_data.chunk(group.size())
            for rank, shard in enumerate(shards):
                torch.distributed.broadcast(shard, torch.distributed.get_global_rank(group, rank), group=group)


def fill(models, hf, place, family):
    """Give the models these weights, and LoRA's adapters noise: zeros, as they start, would hide gradients."""
    for model in models:
        for name, layer, parameter in named(model):
            if "lora_" in name:
                shard = place.tensor[0] if getattr(parameter, "tensor_model_parallel", False) else 0
                seed = zlib.crc32(f"{name} {layer} {shard}".encode())
                parameter.data.normal_(std=0.1, generator=torch.Generator().manual_seed(seed))
            else:
                parameter.data.copy_(megatron_part(hf, name.replace("base_layer.", ""), layer, place, family))


def main():
    folder = Path(sys.argv.pop(1))
    if "--moe-grouped-gemm" in sys.argv:
        grouped.install()
    trainer = AutoTrainer().trainer
    models, optimizer = trainer.train_args[1], trainer.train_args[2]
    from megatron.core import mpu
    from megatron.training import get_args

    family = (folder / "family.txt").read_text() if (folder / "family.txt").exists() else "llama"
    place = Place(
        tensor=(mpu.get_tensor_model_parallel_rank(), mpu.get_tensor_model_parallel_world_size()),
        expert=(mpu.get_expert_model_parallel_rank(), mpu.get_expert_model_parallel_world_size()),
        expert_tensor=(mpu.get_expert_tensor_parallel_rank(), mpu.get_expert_tensor_parallel_world_size()),
    )
    if get_args().iteration == 0:
        fill(models, hf_params(family=family), place, family)
        optimizer.reload_model_params()
        fill(getattr(getattr(trainer, "hyper_model", None), "refer_model", []), hf_params(1, family), place, family)
    steps = forms_in_turn(folder / "forms.json", trainer, optimizer, models)
    before = psutil.Process().memory_info().rss
    trainer.train()
    if get_args().use_distributed_optimizer:
        for model in models:
            whole_gradients(model)
    result = {
        "place": astuple(place),
        "steps": steps,
        "growth": 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before,
        "parameters": {
            re.sub(r"layers\.\d+", f"layers.{layer}", name): (layer, gradient(parameter), parameter.detach().clone())
            for model in models
            for name, layer, parameter in named(model)
            if parameter.requires_grad
        },
    }
    torch.save(result, folder / f"{os.environ['RANK']}.pt")


def forms_in_turn(path, trainer, optimizer, models):
    """Let each step train the next form, and keep the gradients of each: ``[{parameter name: gradient}]``."""
    from megatron.training import get_args

    from mindspeed_simpo.integrations.mindspeed_llm.pairs import pair_loss

    kept, forms, update = [], json.loads(path.read_text()) if path.exists() else [], optimizer.step

    def step():
        kept.append(
            {
                re.sub(r"layers\.\d+", f"layers.{layer}", name): gradient(parameter)
                for model in models
                for name, layer, parameter in named(model)
            }
        )
        result = update()
        if forms:
            vars(get_args()).update(forms.pop(0))
            for holder in (trainer, trainer.two_pass):
                if holder is not None:
                    holder._objective = pair_loss(get_args())
        return result

    if forms:
        optimizer.step = step
    return kept


def gradient(parameter):
    """fp32, of the last step."""
    return parameter.main_grad.float().clone()


if __name__ == "__main__":
    main()
