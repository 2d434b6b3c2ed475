from mindspeed_llm.tasks.posttrain.sft.sft_trainer import SFTTrainer

__all__ = ["SFTTrainer"]
