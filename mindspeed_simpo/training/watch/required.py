"""What options of watching need; imported by ``check`` too, so that it imports no engine."""

from __future__ import annotations

from mindspeed_simpo.config.config import Config
from mindspeed_simpo.data.dataset import has_eval_data
from mindspeed_simpo.errors import ConfigError


def check_held_out(config: Config) -> None:
    """Refuse options that need held-out pairs where there are none.

    Raises:
        ConfigError: naming the options.
    """
    if has_eval_data(config):
        return
    wanted = {"metric_for_best_model": config.metric_for_best_model, "eval_generate": config.eval_generate}
    given = [f"{name}: {value}" for name, value in wanted.items() if value]
    if given:
        raise ConfigError(
            f"{', '.join(given)}: there are no held-out pairs: set eval_data_path, or give split a second weight, "
            "such as 95,5"
        )
