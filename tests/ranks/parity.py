"""Training steps of the engine at any layout, under Hugging Face names, for comparison with the oracle."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch

from tests.ranks.launcher import run_ranks


def worst_error(result, expected):
    """Largest relative L2 distance over tensors, each measured by its own norm, and the name of that tensor.

    A distance that is not a number is the largest.
    """
    assert result.keys() == expected.keys()
    errors = {name: float((result[name].double() - tensor).norm() / tensor.norm()) for name, tensor in expected.items()}
    worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name]))
    return errors[worst], worst


@dataclass(frozen=True)
class Run:
    """One training run; several share their ranks."""

    options: dict[str, Any] = field(default_factory=dict)
    """Configuration keys, over those of the layout."""
    references: list[list[float]] | None = None
    """Sums under the reference model, ``[pairs of all batches, 2]``."""
    running: tuple[float, float] | None = None
    """Statistics of the global batches before, for an objective that tracks a value."""
    save: str | None = None
    """Folder of checkpoints to write the last step to."""
    load: str | None = None
    """Checkpoint to start from."""


def engine_steps(folder, batches, references=None, running=None, save=None, load=None, **layout):
    """Train on global batches once; see :func:`engine_runs`."""
    run = Run(references=references, running=running, save=save and str(save), load=load and str(load))
    return engine_runs(folder, batches, [run], **layout)[0]


def engine_runs(folder, batches, runs, prepare: Callable[[], None] | None = None, timeout_s=120.0, **layout):
    """Train on global batches of token pairs at one layout, for each run from the folder's weights on.

    Args:
        folder: Hugging Face checkpoint.
        batches: Global batches; each a list of ``(prompt, chosen, rejected)`` token ids, or None for a filler pair.
        runs: What to train, one after the other, in the same ranks.
        prepare: Called on every rank before anything is built; a function of a module.
        timeout_s: Seconds for all runs together.
        **layout: Configuration keys, and ``data_parallel_size``.

    With adapters, ``grads`` and ``params`` are those of the adapters, and the test fails where a weight changes.

    Returns:
        For each run ``losses`` and ``grad_norms`` by step, ``grads`` of the first step, and after the last ``params``
        and ``running``, the statistics of what the objective tracks or None.
    """
    ranks = layout.pop("data_parallel_size", 1)
    for key in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "context_parallel_size"):
        ranks *= layout.get(key, 1)
    layout.setdefault("micro_batch_size", 2)
    by_rank = run_ranks(_rank, ranks, str(folder), batches, runs, prepare, layout, timeout_s=timeout_s)
    for results in zip(*by_rank, strict=True):
        for key in ("losses", "running"):
            assert all(result[key] == results[0][key] for result in results), f"ranks disagree on the {key}"
        for key in ("grads", "params"):
            results[0][key] = {name: torch.from_numpy(array) for name, array in results[0][key].items()}
    return by_rank[0]


def _rank(folder, batches, runs, prepare, layout_options):
    if prepare is not None:
        prepare()
    layout_options = {"global_batch_size": len(batches[0]), **layout_options}
    configs = [make_config(folder, **layout_options, **run.options) for run in runs]
    groups, device = start(configs[0])
    return [train(batches, run, config, groups, device) for run, config in zip(runs, configs, strict=True)]


def make_config(folder, **options):
    """A configuration with the plain values of every option whose values are claimed one by one."""
    from mindspeed_simpo.config import supported
    from mindspeed_simpo.config.config import Config

    required = {"model_name_or_path": str(folder), "data_path": "unused", "lr_warmup_fraction": 0}
    return Config(**{**required, **supported.PLAIN, **options})


def start(config):
    """Process groups and device of this rank."""
    import torch.distributed as dist

    from mindspeed_simpo.config.validation import make_layout
    from mindspeed_simpo.device import open_device
    from mindspeed_simpo.parallel import initialize, seed_model_ranks

    device = open_device("cpu")
    groups = initialize(make_layout(config, dist.get_world_size()), device)
    seed_model_ranks(1)
    return groups, device


def build(config, groups, device, num_steps):
    """Backend with the folder's weights, wrapped models, and stepper."""
    from mindspeed_simpo.training.backends import open_backend

    backend = open_backend(config, groups, device)
    backend.build(starting_weights=True)
    wrapped = backend.for_training()
    return backend, wrapped, backend.stepper(wrapped, num_steps)


def train(batches, run, config, groups, device):
    """Of one rank: what :func:`engine_runs` returns of one run, with arrays in the place of tensors."""
    from pathlib import Path

    from mindspeed_simpo.loss.reference import ReferenceTable
    from mindspeed_simpo.loss.running import RunningState, RunningTracker
    from mindspeed_simpo.model.megatron.weights import gather_hf_tensors, unwrap
    from mindspeed_simpo.model.naming import Chunk
    from mindspeed_simpo.training import checkpoint
    from mindspeed_simpo.training.metrics import MetricSums
    from mindspeed_simpo.training.session import build_schedule

    backend, wrapped, stepper = build(config, groups, device, len(batches))
    spec = backend.description
    adapters = unwrap(wrapped[0]).adapters
    trained = Chunk.slots if adapters is None else adapters.slots_of
    frozen = [] if adapters is None else _frozen(wrapped)
    before = [parameter.detach().clone() for parameter in frozen]
    references = None if run.references is None else torch.tensor(run.references, dtype=torch.float64)
    table = None if references is None else ReferenceTable(references)
    running = RunningTracker(config.objective, groups, device)
    schedule = build_schedule(config, backend, groups, device, running.current, wrapped, table)
    metric_sums = MetricSums(config.objective, groups, device)
    if run.running is not None:
        running.load(RunningState(mean=run.running[0], deviation=run.running[1]))
    first_step = 0
    if run.load:
        checkpoint.load(Path(run.load), wrapped, stepper, groups, device)
        loaded = checkpoint.read_state(Path(run.load))
        first_step = loaded.step
        running.load(loaded.running)
    [first, *_] = getattr(stepper.optimizer, "chained_optimizers", [stepper.optimizer])
    result = {"losses": [], "grad_norms": [], "adam": type(first.optimizer).__module__}
    for step, pairs in enumerate(batches):
        stepper.zero_grad()
        # the sums under the reference model are those of the batches of this run alone
        before_batch = (step if run.references is not None else first_step + step) * len(pairs)
        micro_batches = _micro_batches(pairs, before_batch, config, groups)
        scored = schedule.forward_backward(micro_batches, sum(pair is not None for pair in pairs), first_step + step)
        sums = metric_sums.reduce(metric_sums.local(scored))
        if step == 0:
            _complete_sharded_gradients(wrapped, config)
            gathered = gather_hf_tensors(wrapped, spec, groups, _gradient, trained)
            result["grads"] = {name: tensor.cpu().clone().numpy() for name, tensor in gathered if _is_trained(name)}
        squared_norm = stepper.squared_norm()
        stepper.update(squared_norm)
        running.update(scored)
        result["losses"].append(metric_sums.totals(sums).means["loss"])
        result["grad_norms"].append(squared_norm.item() ** 0.5)
    if run.save:
        state = checkpoint.TrainingState(
            step=first_step + len(batches),
            consumed_pairs=0,
            data_fingerprint="",
            running=running.state(),
            config=config.model_dump(),
        )
        checkpoint.CheckpointWriter(Path(run.save), groups, device).save(state, wrapped, stepper)
    state = running.state()
    result["running"] = state and (state.mean, state.deviation)
    assert all(torch.equal(parameter, old) for parameter, old in zip(frozen, before, strict=True))
    gathered = gather_hf_tensors(wrapped, spec, groups, slots_of=trained)
    result["params"] = {name: tensor.float().cpu().clone().numpy() for name, tensor in gathered}
    return result


def _gradient(parameter):
    return parameter.main_grad if parameter.requires_grad else torch.zeros_like(parameter)


def _is_trained(name):
    return not name.endswith("e_score_correction_bias")


def _frozen(models):
    """The weights of the model, of which nothing but the adapters is trained."""
    from mindspeed_simpo.model.megatron.weights import unwrap

    frozen = [model.get_parameter(slot.parameter) for model in map(unwrap, models) for slot in model.slots]
    assert not any(parameter.requires_grad or hasattr(parameter, "main_grad") for parameter in frozen)
    return frozen


def _complete_sharded_gradients(models, config):
    """Under the distributed optimizer each rank has reduced only its part of the gradient; put the parts together."""
    import torch.distributed as dist
    from megatron.core import parallel_state

    if not config.use_distributed_optimizer:
        return
    dense = parallel_state.get_data_parallel_group(with_context_parallel=True)
    experts = parallel_state.get_expert_data_parallel_group()
    for model in models:
        buffers = [(buffer, dense) for buffer in model.buffers]
        for buffer, group in [*buffers, *((buffer, experts) for buffer in model.expert_parallel_buffers)]:
            for bucket in buffer.buckets:
                parts = list(bucket.grad_data.chunk(group.size()))
                dist.all_gather(parts, parts[group.rank()].clone(), group=group)


def _micro_batches(pairs, first_row, config, groups):
    """As a loader without shuffling would deal them, but with every pair on the rank of its number."""
    from mindspeed_simpo.batch import TokenizedPair
    from mindspeed_simpo.data.batching import Batching

    batching = Batching.of(config)
    tokenized = [pair and TokenizedPair(*map(list, pair), source=f"pair {i}") for i, pair in enumerate(pairs)]
    dealt = [range(rank, len(pairs), groups.data.size()) for rank in range(groups.data.size())]
    own = dealt[groups.data.rank()]
    number = batching.number_of_micro_batches([batching.size_of_pair(pair) for pair in tokenized], dealt)
    return batching.micro_batches([tokenized[i] for i in own], [first_row + i for i in own], number)
