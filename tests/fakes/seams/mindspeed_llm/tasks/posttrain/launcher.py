from megatron.training import get_args, set_args
from mindspeed.features_manager.features_manager import MindSpeedFeaturesManager

from mindspeed_llm.tasks.megatron_adaptor_v2 import parse
from mindspeed_llm.tasks.posttrain.dpo import DPOTrainer
from mindspeed_llm.tasks.posttrain.sft import SFTTrainer


def get_trainer(stage):
    return {"sft": SFTTrainer, "dpo": DPOTrainer}[stage]()


class AutoTrainer:
    def __init__(self):
        args = parse()
        set_args(args)
        MindSpeedFeaturesManager.validate_features_args(args)
        self.trainer = get_trainer(get_args().stage)

    def train(self):
        self.trainer.train()
