"""The layouts of small models whose steps ``scripts/validate_plan.py`` measures, and their predictions."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.resolution import resolve
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.model.hf_config import read_description
from mindspeed_simpo.studies.plan.devices import DeviceKind
from mindspeed_simpo.studies.plan.report import describe
from mindspeed_simpo.studies.plan.run_lengths import RunLengths, assumed_lengths
from mindspeed_simpo.studies.plan.simulation import Candidate, Simulator
from tests.hf import make_checkpoint

SEQ, PAIRS, VOCABULARY = 512, 8, 2000
RUN: dict[str, Any] = {"seq_length": SEQ, "global_batch_size": PAIRS, "device": "cpu", "train_iters": 4}
MODELS: dict[str, dict[str, Any]] = {
    "qwen3": {"hidden": 256, "layers": 4, "heads": 4, "kv_heads": 2, "intermediate": 1024, "vocab_size": VOCABULARY},
    "qwen3_moe": {"hidden": 192, "layers": 4, "heads": 4, "kv_heads": 2, "intermediate": 256, "vocab_size": VOCABULARY},
}
FULL = {"recompute_granularity": "full", "recompute_method": "uniform", "recompute_num_layers": 1}
PADDED = {"batching": "padded", "micro_batch_size": 2}
PACKED = {"batching": "packed", "max_tokens_per_micro_batch": 1024}
SHARED = {"batching": "prefix_shared", "max_tokens_per_micro_batch": 1024}
FORMS: tuple[dict[str, Any], ...] = (
    PADDED,
    {**PADDED, "micro_batch_size": 1},
    PACKED,
    {**PACKED, "max_tokens_per_micro_batch": 2048},
    {**PACKED, "pair_schedule": "two_pass"},
    SHARED,
    {**SHARED, **FULL},
    {**SHARED, "recompute_granularity": "selective"},
)
TP, PP = "tensor_model_parallel_size", "pipeline_model_parallel_size"
DEGREES: dict[int, tuple[dict[str, Any], ...]] = {
    1: ({},),
    2: (
        {TP: 2},
        {TP: 2, "sequence_parallel": True},
        {PP: 2},
        {PP: 2, "num_layers_per_virtual_pipeline_stage": 1},
        {"context_parallel_size": 2},
        {"use_distributed_optimizer": True},
        {"use_distributed_optimizer": True, "expert_model_parallel_size": 2},
    ),
    4: (
        {TP: 2, PP: 2, "sequence_parallel": True},
        {TP: 2, "sequence_parallel": True, "use_distributed_optimizer": True},
        {PP: 2, "use_distributed_optimizer": True},
    ),
}


def cases(ranks: list[int], every: int) -> list[tuple[int, dict[str, Any]]]:
    """Number of ranks and keys of the layouts; every N-th one of all."""
    return [(number, {**degrees, **form}) for number in ranks for degrees in DEGREES[number] for form in FORMS][::every]


class Predictor:
    """Predicts the steps and the memory of one model.

    Args:
        family: One of :data:`MODELS`.
        parent: Folder in which the model is made.
        kind: Rates of the device.
    """

    def __init__(self, family: str, parent: Path, kind: DeviceKind) -> None:
        self.folder = str(make_checkpoint(parent / family, family, **MODELS[family]))  # type: ignore[arg-type]
        self.model = read_description(self.folder)
        windows = tuple({layer.attention.window for layer in self.model.first_of_kind})
        self.lengths = assumed_lengths(120, 100, 90, SEQ, RUN["train_iters"] * PAIRS)
        self.simulator = Simulator(self.model, kind, RunLengths(self.lengths, windows, "drawn"))

    def values(self, keys: dict[str, Any]) -> dict[str, Any]:
        """The keys of a run with the ``keys`` of a layout."""
        return {"model_name_or_path": self.folder, "data_path": "unused", "init_from": "config", **RUN, **keys}

    def candidate(self, ranks: int, keys: dict[str, Any]) -> Candidate | None:
        """The layout; None where the model does not allow it, such as experts of a model that has none."""
        config = resolve(Config(**self.values(keys)), self.model, "cpu")
        try:
            return Candidate(config, make_layout(config, ranks, self.model, "cpu"))
        except ConfigError:
            return None

    def prediction(self, candidate: Candidate, of_ranks: list[dict[str, float]]) -> dict[str, Any]:
        """What is predicted, beside what was measured on each rank."""
        memory = {each.pipeline_rank: each for each in self.simulator.memory(candidate, whole_run=True)}
        errors = []
        for measured in of_ranks:
            estimate = memory[int(measured["pipeline_rank"])]
            errors.append((estimate.total - estimate.optimizer) / measured["bytes"] - 1)
        simulated, seconds = self.simulator.step(candidate), max(each["seconds"] for each in of_ranks)
        return {
            "layout": describe(candidate),
            "measured_seconds": seconds,
            "predicted_seconds": simulated.total,
            "error": simulated.total / seconds - 1,
            "memory_error": max(errors, key=abs),
            "parts_seconds": simulated.parts,
        }
