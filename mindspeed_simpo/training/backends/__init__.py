"""The two backends of training, behind one interface: how a model is built, run, updated and exported."""

from __future__ import annotations

from importlib import metadata

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.device import Device
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.parallel import Groups
from mindspeed_simpo.training.backends.interface import Backend

__all__ = ["Backend", "open_backend"]

_FIRST_WITH_SHARDED_LOADING = (5, 24)


def open_backend(config: Config, groups: Groups, device: Device) -> Backend:
    """The backend of the key ``backend``, which alone is imported, with the description of the model.

    Args:
        config: A validated configuration.
        groups: Process groups of this rank.
        device: The device of this rank.

    Raises:
        SimpoError: where the model cannot be read, or the layout does not fit it.
    """
    if config.backend == "fsdp":
        _check_transformers()
        from mindspeed_simpo.training.backends.fsdp import FsdpBackend

        return FsdpBackend(config, groups, device)
    from mindspeed_simpo.training.backends.megatron import MegatronBackend

    return MegatronBackend(config, groups, device)


def _check_transformers() -> None:
    found = metadata.version("transformers")
    if tuple(map(int, found.split(".")[:2])) < _FIRST_WITH_SHARDED_LOADING:
        first = ".".join(map(str, _FIRST_WITH_SHARDED_LOADING))
        raise ConfigError(
            f"backend: fsdp needs transformers {first} or newer, which loads weights shard by shard; found {found}"
        )
