import argparse

from mindspeed.features_manager.features_manager import MindSpeedFeaturesManager

import mindspeed_llm.features_manager  # noqa: F401


def parse():
    parser = argparse.ArgumentParser(allow_abbrev=False)
    MindSpeedFeaturesManager.register_features_args(parser)
    return parser.parse_known_args()[0]


MindSpeedFeaturesManager.apply_features_patches(parse())
