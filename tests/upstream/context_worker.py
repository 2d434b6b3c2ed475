"""One rank of ``test_context_parallel``: RANK ALGORITHM RANKS HEADS GROUPS STORE."""

import sys

import torch
import torch_npu  # noqa: F401 - the stand-in turns CUDA's names into the CPU's, as MindSpeed's imports need


def main():
    rank, ranks, heads, groups = (int(sys.argv[index]) for index in (1, 3, 4, 5))
    torch.distributed.init_process_group("gloo", init_method=f"file://{sys.argv[6]}", rank=rank, world_size=ranks)
    import mindspeed.megatron_adaptor  # noqa: F401

    from mindspeed_simpo.batch import UNPACKED
    from mindspeed_simpo.model.megatron.attention import CausalAttention
    from mindspeed_simpo.parallel.context import positions_of

    class Config:
        kv_channels = 8

    generator = torch.Generator().manual_seed(5)
    seq, rows = 8 * ranks, 3
    shapes = [(seq, rows, count, Config.kv_channels) for count in (heads, groups, groups)]
    whole = [torch.randn(shape, generator=generator) for shape in shapes]
    weight = torch.randn(seq, rows, heads * Config.kv_channels, generator=generator)
    mine = positions_of(rank, ranks, seq, torch.device("cpu"))

    results = []
    for algorithm in ("gathered", sys.argv[2]):
        attention = CausalAttention(Config, 1, torch.distributed.group.WORLD, algorithm)
        query, key, value = (tensor[mine].clone().requires_grad_() for tensor in whole)
        output = attention(query, key, value, attention_bias=UNPACKED)
        (output * weight[mine]).sum().backward()
        results.append((output.detach(), query.grad, key.grad, value.grad))
    for expected, found in zip(*results, strict=True):
        assert expected.shape == found.shape
        error = (expected - found).norm() / expected.norm()
        assert error < 1e-5, f"relative error {error}"
    sys.stdout.write("the same to rounding\n")


main()
