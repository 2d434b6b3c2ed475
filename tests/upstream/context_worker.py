"""One rank of ``test_context_parallel``: RANK ALGORITHM RANKS HEADS GROUPS FORM STORE."""

import importlib
import sys

import torch


def main():
    rank, ranks, heads, groups = (int(sys.argv[index]) for index in (1, 3, 4, 5))
    importlib.import_module("torch_npu.contrib.transfer_to_npu")
    torch.distributed.init_process_group("nccl", init_method=f"file://{sys.argv[7]}", rank=rank, world_size=ranks)
    import mindspeed.megatron_adaptor  # noqa: F401

    from mindspeed_simpo.batch import UNPACKED, Branch, Documents
    from mindspeed_simpo.model.megatron.context import CONTEXT_PARALLEL_ATTENTION
    from mindspeed_simpo.parallel.context import positions_of

    head_dim = 8
    # not the reciprocal square root of the head's width, which MindSpeed's attention would take by itself
    scores = {"scale": 0.3, "window": None, "softcap": None, "group": torch.distributed.group.WORLD}
    generator = torch.Generator().manual_seed(5)
    seq, rows, documents = 8 * ranks, 3, UNPACKED
    if sys.argv[6] == "packed":
        documents = Documents((7, 5), (Branch(0, 4, 3), Branch(7, 2, 1)))
        rows, documents = 1, documents.with_padding(seq - sum(documents.lengths) % seq)
        seq = sum(documents.lengths)
    shapes = [(seq, rows, count, head_dim) for count in (heads, groups, groups)]
    whole = [torch.randn(shape, generator=generator) for shape in shapes]
    weight = torch.randn(seq, rows, heads * head_dim, generator=generator)
    mine = positions_of(rank, ranks, documents.lengths or (seq,), torch.device("cpu"))

    results = []
    for algorithm in ("gathered", sys.argv[2]):
        query, key, value = (tensor[mine].clone().requires_grad_() for tensor in whole)
        # MindSpeed's ring has no sinks
        sinks = torch.arange(heads).sub(1.0).requires_grad_() if sys.argv[2] == "ulysses_cp_algo" else None
        output = CONTEXT_PARALLEL_ATTENTION[algorithm](query, key, value, documents, sinks=sinks, **scores)
        (output * weight[mine]).sum().backward()
        results.append([output.detach(), query.grad, key.grad, value.grad])
        if sinks is not None:
            # one rank has all heads of some tokens, or all tokens of some heads
            torch.distributed.all_reduce(sinks.grad)
            results[-1].append(sinks.grad)
    for expected, found in zip(*results, strict=True):
        assert expected.shape == found.shape
        error = (expected - found).norm() / expected.norm()
        assert error < 1e-5, f"relative error {error}"
    sys.stdout.write("the same to rounding\n")


main()
