import torch

from mindspeed_llm.tasks.posttrain.base.base_trainer import BaseTrainer


class DPOTrainer(BaseTrainer):
    """The policy's rows, then the reference model's, in one output; upstream's loss would divide by cp."""

    @staticmethod
    def get_batch(data_iterator):
        batch = next(data_iterator)
        return torch.cat([batch["input_ids"]] * 2), torch.cat([batch["labels"]] * 2)

    def loss_func(self, input_tensor, output_tensor):
        raise AssertionError("dpo's own loss")

    def forward_step(self, data_iterator, model):
        from functools import partial

        tokens, labels = self.get_batch(data_iterator)
        policy, reference = tokens.chunk(2)
        with torch.no_grad():
            frozen = 0.5 * model(reference, None, None)
        return torch.cat([model(policy, None, None), frozen]), partial(self.loss_func, labels)
