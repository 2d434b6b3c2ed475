"""The auxiliary loss of routers: its gradient against autograd, and the sequences that tokens belong to."""

import pytest
import torch

from mindspeed_simpo.batch import TokenizedPair
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.config.layout import Layout
from mindspeed_simpo.config.validation import make_layout
from mindspeed_simpo.data.batching import Batching
from mindspeed_simpo.errors import ConfigError
from mindspeed_simpo.model.balance import Balance
from mindspeed_simpo.model.hf_config import read_description
from mindspeed_simpo.training.schedule.rows import Rows
from tests.hf import make_checkpoint

PAIRS = [TokenizedPair([1, 2, 3], [4, 5], [6], ""), None, TokenizedPair([7], [8], [9, 10, 11, 12], "")]
LENGTHS = {(1, 2, 3, 4, 5): 5, (1, 2, 3, 6): 4, (7, 8): 2, (7, 9, 10, 11, 12): 5}


@pytest.mark.parametrize("form", ["padded", "packed", "prefix_shared"])
def test_each_token_belongs_to_its_sequences(form):
    [batch] = Batching(form, 3, max_tokens=100, multiple_of=4).micro_batches(PAIRS, range(3))
    rows = Rows.of(batch)
    members = rows.shard_of(0, 1, sequence_weight=1.0).members
    found = {}
    for number, length in enumerate(members.lengths.tolist()):
        belongs = (members.of_token == number).any(0)
        tokens = tuple(rows.tokens[belongs].tolist())
        assert len(tokens) == length
        if length:  # a filler pair's rows have none
            found[tokens] = length
    assert found == LENGTHS
    assert rows.shard_of(0, 1).members is None


def test_the_gradient_is_that_of_the_formula():
    scores = torch.rand(7, 4, dtype=torch.float64, requires_grad=True)
    chosen = scores.detach().topk(2).indices
    of_token = torch.tensor([[0, 0, 0, 0, 1, 1, -1], [2, 2, -1, -1, -1, -1, -1]])
    lengths = torch.tensor([4, 2, 2])
    weights = torch.ones(7, 2, dtype=torch.float64, requires_grad=True)
    upstream = torch.randn(7, 2, dtype=torch.float64)
    result = Balance(of_token, lengths, 0.3, ()).add_gradient(weights, scores, chosen)
    assert torch.equal(result, weights)
    found = torch.autograd.grad(result, (weights, scores), upstream)
    probabilities = scores / scores.sum(-1, keepdim=True)
    choices = torch.zeros(7, 4, dtype=torch.float64).scatter(1, chosen, 1.0)
    loss = 0.0
    for number in range(3):
        inside = (of_token == number).any(0)
        shares = choices[inside].mean(0) * 4 / 2
        loss = loss + 0.3 * (shares * probabilities[inside].mean(0)).sum()
    torch.testing.assert_close(found[0], upstream)
    torch.testing.assert_close(found[1], torch.autograd.grad(loss, scores)[0])


def test_a_model_without_experts_has_nothing_to_balance(tmp_path):
    folder = make_checkpoint(tmp_path, "qwen2")
    config = Config(model_name_or_path=str(folder), data_path="-", moe_aux_loss_coeff=0.1)
    with pytest.raises(ConfigError, match=r"moe_aux_loss_coeff 0.1: .* has no experts; remove the key"):
        make_layout(config, 1, read_description(str(folder)), "cpu")
    assert isinstance(make_layout(config, 1), Layout)
