from mindspeed_llm.tasks.posttrain.dpo.dpo_trainer import DPOTrainer

__all__ = ["DPOTrainer"]
