"""Training steps of the engine on its NPU branch, with the real MindSpeed; run under torchrun.

    engine.py train CONFIG --flag value ...

The command line is that of a launch script, flags of the layout at its end; MindSpeed's adaptor finds it where it finds
a user's. ENGINE_JOB names a folder with the model, ``job.pt`` with ``(runs, layout)``, each run its batches and what
else ``tests.ranks.parity.Run`` takes, and the place for ``results.pt``: what ``tests.ranks.parity`` returns on rank 0.
``torch.npu`` has no tensors on this machine, so that the device's tensors are the CPU's, what asks where a tensor lies
is told "on an NPU", and what asks for the current device for a tensor of its own is told "cpu".
"""

import importlib
import os
import sys
from pathlib import Path

import torch

from mindspeed_simpo import device
from mindspeed_simpo.device import megatron_repairs, npu, npu_adaptor, npu_environment


def open_device(_):
    """The engine's own steps for an NPU, less the choice of a card."""
    npu_environment.set_defaults()
    npu_adaptor.install_adaptor()
    megatron_repairs.repair()
    return device.Device("npu", torch.device("cpu"))


def main():
    given = sys.argv[:]
    folder = Path(os.environ["ENGINE_JOB"])
    npu.is_on_npu = lambda _: True
    device.open_device = open_device
    from tests.ranks import parity

    runs, layout = torch.load(folder / "job.pt", weights_only=False)
    # torch_npu makes HCCL's groups of NCCL's; the stand-in makes groups of gloo that refuse what HCCL refuses
    importlib.import_module("torch_npu.contrib.transfer_to_npu")
    torch.distributed.init_process_group("nccl")
    parallel_state = importlib.import_module("megatron.core.parallel_state")
    torch.npu.current_device = lambda: "cpu"
    results = []
    for batches, options in runs:
        [result] = parity._rank(str(folder / "model"), batches, [parity.Run(**options)], None, dict(layout))
        for key in ("grads", "params"):
            result[key] = {name: torch.from_numpy(values) for name, values in result[key].items()}
        results.append(result | {"core": importlib.import_module("megatron.core").__version__})
        parallel_state.destroy_model_parallel()
    assert sys.argv == given
    if os.environ["RANK"] == "0":
        torch.save(results, folder / "results.pt")


if __name__ == "__main__":
    main()
