from mindspeed_llm.tasks.posttrain.base.base_trainer import BaseTrainer


class SFTTrainer(BaseTrainer):
    @staticmethod
    def get_batch(data_iterator):
        batch = next(data_iterator)
        return batch["input_ids"], batch["labels"], batch["labels"] != -100, None, None

    def forward_step(self, data_iterator, model):
        raise AssertionError("sft's forward step")
