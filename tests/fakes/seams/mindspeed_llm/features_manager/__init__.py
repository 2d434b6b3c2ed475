from mindspeed.features_manager.feature import MindSpeedFeature
from mindspeed.features_manager.features_manager import MindSpeedFeaturesManager


class MegatronBasicFeature(MindSpeedFeature):
    def register_args(self, parser):
        parser.add_argument("--stage", default=None, choices=["sft", "dpo"])
        for flag, default in (
            ("--micro-batch-size", 2),
            ("--global-batch-size", 4),
            ("--train-iters", 1),
            ("--log-interval", 1),
            ("--tensor-model-parallel-size", 1),
            ("--pipeline-model-parallel-size", 1),
            ("--context-parallel-size", 1),
            ("--expert-model-parallel-size", 1),
            ("--padded-vocab-size", 16),
            ("--pad-to-multiple-of", 8),
            ("--num-experts", None),
            ("--mtp-num-layers", None),
        ):
            parser.add_argument(flag, type=int, default=default)
        for flag in (
            "--sequence-parallel",
            "--overlap-grad-reduce",
            "--use-legacy-models",
            "--no-pad-to-seq-lengths",
            "--variable-seq-lengths",
        ):
            parser.add_argument(flag, action="store_true")
        parser.add_argument("--transformer-impl", default="local")
        parser.add_argument("--moe-router-load-balancing-type", default="aux_loss")
        parser.add_argument("--moe-token-dispatcher-type", default="allgather")
        parser.add_argument("--moe-aux-loss-coeff", type=float, default=0.0)
        parser.add_argument("--attention-dropout", type=float, default=0.1)
        parser.add_argument("--hidden-dropout", type=float, default=0.1)


class DPOFeature(MindSpeedFeature):
    def register_args(self, parser):
        parser.add_argument("--dpo-loss-type", default="sigmoid", choices=["sigmoid", "hinge", "ipo"])
        parser.add_argument("--is-pairwise-dataset", action="store_true")
        parser.add_argument("--dpo-beta", default=0.1, type=float)
        parser.add_argument("--dpo-label-smoothing", default=0.0, type=float)
        parser.add_argument("--pref-ftx", default=0.0, type=float)


class MindSporePatchFeature(MindSpeedFeature):
    def register_args(self, parser):
        # parses in the middle of registration, with the choices that are there by then
        parser.add_argument("--ai-framework", default="pytorch")
        parser.parse_known_args()


MindSpeedFeaturesManager.FEATURES_LIST[:] = [
    MegatronBasicFeature("megatron_basic"),
    DPOFeature("dpo"),
    MindSporePatchFeature("mindspore"),
]
