"""A checkpoint of one layout loads at any other, with equal parameters and optimizer state and equal later losses."""

import pytest
import torch

from tests import hf
from tests.ranks.parity import engine_steps, worst_error

TRAINING = {"lr": 1e-3, "lr_decay_style": "constant", "weight_decay": 0.1, "adam_eps": 1e-4}
LAYOUTS = {
    "one": {},
    "tp2_pp2": {"tensor_model_parallel_size": 2, "pipeline_model_parallel_size": 2},
    "cp2_dp2_sharded": {"context_parallel_size": 2, "data_parallel_size": 2, "use_distributed_optimizer": True},
    "vpp2": {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
    "pp3": {"pipeline_model_parallel_size": 3},
    "sp2": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    # two ranks share each key-value head, and three query heads
    "tp4": {"tensor_model_parallel_size": 4, "use_distributed_optimizer": True},
}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    shape = {"layers": 4, "vocab_size": 301, "heads": 6, "kv_heads": 2, "head_dim": 16}
    folder = hf.make_checkpoint(tmp_path_factory.mktemp("hf"), "qwen3", tied=True, **shape)
    pairs = hf.make_token_pairs(16, vocab_size=301)
    return folder, [pairs[:8], pairs[8:]], engine_steps(folder, [pairs[:8], pairs[8:]] * 2, **TRAINING)


@pytest.mark.parametrize(
    ("written", "read"),
    [
        ("tp2_pp2", "cp2_dp2_sharded"),
        ("tp2_pp2", "one"),
        ("cp2_dp2_sharded", "sp2"),
        ("vpp2", "pp3"),
        ("one", "vpp2"),
        ("tp2_pp2", "tp4"),
        ("tp4", "cp2_dp2_sharded"),
    ],
)
def test_the_curve_goes_on_at_another_layout(run, tmp_path, written, read):
    folder, batches, whole = run
    first = engine_steps(folder, batches, save=tmp_path, **TRAINING, **LAYOUTS[written])
    second = engine_steps(folder, batches, load=tmp_path / "iter_0000002", **TRAINING, **LAYOUTS[read])
    losses = first["losses"] + second["losses"]
    assert losses == pytest.approx(whole["losses"], rel=1e-6)
    assert second["grad_norms"] == pytest.approx(whole["grad_norms"][2:], rel=1e-5)
    error, name = worst_error(second["params"], {name: value.double() for name, value in whole["params"].items()})
    assert error < 1e-5, name


EXPERT_LAYOUTS = {
    "one": {},
    "ep4": {"data_parallel_size": 4, "expert_model_parallel_size": 4, "use_distributed_optimizer": True},
    "etp2_pp2": {
        "tensor_model_parallel_size": 2,
        "pipeline_model_parallel_size": 2,
        "expert_tensor_parallel_size": 2,
    },
    "ep2_dp2_sharded": {"data_parallel_size": 4, "expert_model_parallel_size": 2, "use_distributed_optimizer": True},
    "ep2_dp2": {"data_parallel_size": 4, "expert_model_parallel_size": 2},
}


@pytest.mark.parametrize(
    ("written", "read", "family"),
    [
        ("ep4", "etp2_pp2", "qwen3_moe"),
        ("etp2_pp2", "ep2_dp2_sharded", "deepseek_v3"),
        ("ep2_dp2", "one", "glm4_moe"),
        ("etp2_pp2", "ep2_dp2_sharded", "gpt_oss"),
    ],
)
def test_experts_go_on_at_another_layout(tmp_path, written, read, family):
    shape = {"layers": 4, "vocab_size": 301, "heads": 6, "kv_heads": 2, "head_dim": 16}
    folder, pairs = hf.make_checkpoint(tmp_path / "hf", family, **shape), hf.make_token_pairs(16, vocab_size=301)
    batches = [pairs[:8], pairs[8:]]
    whole = engine_steps(folder, batches * 2, **TRAINING)
    first = engine_steps(folder, batches, save=tmp_path, **TRAINING, **EXPERT_LAYOUTS[written])
    second = engine_steps(folder, batches, load=tmp_path / "iter_0000002", **TRAINING, **EXPERT_LAYOUTS[read])
    assert first["losses"] + second["losses"] == pytest.approx(whole["losses"], rel=1e-6)
    assert second["grad_norms"] == pytest.approx(whole["grad_norms"][2:], rel=1e-5)
    error, name = worst_error(second["params"], {name: value.double() for name, value in whole["params"].items()})
    assert error < 1e-5, name


class GroupStepAdam(torch.optim.Optimizer):
    """Adam that counts its updates in the parameter group, as those of MindSpeed, apex and TransformerEngine do."""

    def __init__(self, params, lr=1e-3, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, **_):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            group["step"] = torch.as_tensor(group.get("step", 0), dtype=torch.int64) + 1
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                state = self.state[parameter]
                if not state:
                    state |= {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
                torch.optim._functional.adamw(
                    *([parameter], [parameter.grad], [state["exp_avg"]], [state["exp_avg_sq"]], []),
                    [group["step"].float() - 1],  # the function counts one more
                    amsgrad=False,
                    beta1=group["betas"][0],
                    beta2=group["betas"][1],
                    lr=group["lr"],
                    weight_decay=group["weight_decay"],
                    eps=group["eps"],
                    maximize=False,
                )


def _use_group_step_adam():
    """What MindSpeed, apex and TransformerEngine change: the names by which megatron-core knows Adam."""
    import megatron.core.optimizer
    from megatron.core.optimizer import distrib_optimizer

    for module in (megatron.core.optimizer, distrib_optimizer):
        module.Adam = GroupStepAdam
        module.USING_PYTORCH_OPTIMIZER = False


@pytest.mark.parametrize("prepare", [None, _use_group_step_adam], ids=["torch's Adam", "step in the group"])
@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("sharded", [False, True])
def test_reading_back_changes_no_bit(run, tmp_path, bf16, sharded, prepare):
    folder, batches, _ = run
    options = {"bf16": bf16, "use_distributed_optimizer": sharded, "data_parallel_size": 2, **TRAINING}
    options["prepare"] = prepare
    whole = engine_steps(folder, batches * 2, **options)
    engine_steps(folder, batches, save=tmp_path, **options)
    second = engine_steps(folder, batches, load=tmp_path / "iter_0000002", **options)
    assert second["adam"] == ("torch.optim.adamw" if prepare is None else __name__)
    assert second["losses"] == whole["losses"][2:]
    assert second["grad_norms"] == whole["grad_norms"][2:]
    assert all(torch.equal(second["params"][name], value) for name, value in whole["params"].items())


@pytest.mark.parametrize("sharded", [False, True])
def test_a_checkpoint_crosses_between_kinds_of_adam(run, tmp_path, sharded):
    folder, batches, whole = run
    options = {"use_distributed_optimizer": sharded, "data_parallel_size": 2, **TRAINING}
    engine_steps(folder, batches, save=tmp_path / "a", **options)
    files = {"load": tmp_path / "a" / "iter_0000002", "save": tmp_path / "b"}
    crossed = engine_steps(folder, batches[:1], **files, prepare=_use_group_step_adam, **options)
    back = engine_steps(folder, batches[1:], load=tmp_path / "b" / "iter_0000003", **options)
    assert (crossed["adam"], back["adam"]) == (__name__, "torch.optim.adamw")
    assert crossed["losses"] + back["losses"] == pytest.approx(whole["losses"][2:], rel=1e-6)
    error, name = worst_error(back["params"], {name: value.double() for name, value in whole["params"].items()})
    assert error < 1e-5, name
