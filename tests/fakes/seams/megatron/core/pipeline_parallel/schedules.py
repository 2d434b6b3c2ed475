"""The schedules' signatures, and the loop without a pipeline."""

import torch


def get_forward_backward_func():
    return forward_backward_no_pipelining


def forward_backward_no_pipelining(
    *, forward_step_func, data_iterator, model, num_microbatches, seq_length, micro_batch_size, forward_only=False
):
    losses = []
    seen.append(micro_batch_size)
    with torch.set_grad_enabled(not forward_only):
        for _ in range(num_microbatches):
            output, loss_func = forward_step_func(data_iterator, model)
            loss, metrics = loss_func(output)
            losses.append(metrics)
            if not forward_only:
                scale = model.config.grad_scale_func or (lambda value: value)
                scale(loss / num_microbatches).backward()
    return losses


def forward_backward_pipelining_without_interleaving(*, micro_batch_size):
    raise NotImplementedError


def forward_backward_pipelining_with_interleaving(*, micro_batch_size):
    raise NotImplementedError


seen = []
