"""A model of one matrix, in fp64, with the parts of GPTModel that matter, and its batches."""

import types

import torch

VOCABULARY, HIDDEN = 16, 6


class ColumnParallelLinear(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(2)
        weight = torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64)
        self.weight = torch.nn.Parameter(weight)
        self.bias = None

    def forward(self, hidden, weight=None):
        return hidden @ (self.weight if weight is None else weight).T, None


class GPTModel(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.embedding = torch.nn.Parameter(torch.randn(VOCABULARY, HIDDEN, generator=generator, dtype=torch.float64))
        self.output_layer = ColumnParallelLinear()
        self.config = types.SimpleNamespace(grad_scale_func=lambda loss: loss * 8)
        self.backwards = 0
        self.embedding.register_hook(self._count)

    def _count(self, _gradient):
        self.backwards += 1

    def forward(self, tokens, position_ids, attention_mask):
        hidden = self.embedding[tokens].cumsum(dim=1).tanh()
        logits, _ = self.output_layer(hidden.transpose(0, 1))
        return logits.transpose(0, 1).contiguous()


def batches(args):
    """Endless micro-batches: labels are -100 over prompt and padding, as upstream's collator leaves them."""
    generator = torch.Generator().manual_seed(3)
    while True:
        rows = 2 * args.micro_batch_size
        tokens = torch.randint(VOCABULARY, (rows, 8), generator=generator)
        labels = tokens.clone()
        for row in range(rows):
            labels[row, : 1 + row % 3] = -100
            labels[row, 7 - row % 2 :] = -100
        yield {"input_ids": tokens, "labels": labels, "attention_mask": torch.ones_like(tokens)}
