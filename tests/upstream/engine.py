"""One training step of the engine on its NPU branch, with the real MindSpeed; run under torchrun.

    engine.py HF_FOLDER JOB OUTPUT

JOB holds ``(pairs, layout)``; rank 0 writes what ``tests.ranks.parity`` returns. ``torch.npu`` has no tensors on this
machine, so that the device's tensors are the CPU's, and what asks where a tensor lies is told "on an NPU".
"""

import os
import sys

import torch

from mindspeed_simpo import device
from mindspeed_simpo.device import megatron_repairs, npu


def open_device(_):
    """The engine's own steps for an NPU, less the choice of a card."""
    npu.install_adaptor()
    megatron_repairs.repair()
    return device.Device("npu", torch.device("cpu"))


def main():
    folder, job, output = sys.argv[1:]
    # MindSpeed reads the command line, which in the engine is not for it
    sys.argv[1:] = ["train", "config.yaml"]
    npu.is_on_npu = lambda _: True
    device.open_device = open_device
    from tests.ranks import parity

    pairs, layout = torch.load(job, weights_only=False)
    torch.distributed.init_process_group("gloo")
    result = parity._rank(folder, [pairs], [parity.Run()], None, layout)[0]
    if os.environ["RANK"] == "0":
        torch.save({name: torch.from_numpy(gradient) for name, gradient in result["grads"].items()}, output)


if __name__ == "__main__":
    main()
