"""Log-probabilities of single tokens: those of transformers, and their sums those of the pairs, on every layout."""

import functools

import pytest
import torch
from transformers import AutoModelForCausalLM

from tests.hf import make_checkpoint, make_token_pairs
from tests.ranks.launcher import run_ranks

pytestmark = pytest.mark.newest_core

VOCAB = 517
PACKED = {"batching": "packed", "max_tokens_per_micro_batch": 80}
FORMS = {"padded": {"batching": "padded"}, "packed": PACKED, "shared": {**PACKED, "batching": "prefix_shared"}}
LAYOUTS = {
    "tensor": {"tensor_model_parallel_size": 2, "sequence_parallel": True},
    "context": {"context_parallel_size": 2},
    "pipeline": {"pipeline_model_parallel_size": 2, "num_layers_per_virtual_pipeline_stage": 1},
    "data": {},
    "fsdp": {"backend": "fsdp", "context_parallel_size": 2},
}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_checkpoint(tmp_path_factory.mktemp("model"), "qwen2", tied=True, vocab_size=VOCAB, layers=4, std=0.15)


@functools.cache
def pairs():
    return make_token_pairs(6, VOCAB)


@pytest.fixture(scope="module")
def expected(model):
    """Of each pair the log-probabilities of the tokens of both answers, by transformers in double precision."""
    policy = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float64)
    found = []
    for prompt, *answers in pairs():
        found.append([])
        for answer in answers:
            with torch.no_grad():
                logits = policy(input_ids=torch.tensor([prompt + answer])).logits[0, len(prompt) - 1 : -1]
            found[-1].append(logits.log_softmax(-1).gather(1, torch.tensor(answer)[:, None])[:, 0].tolist())
    return found


def _tokens_and_sums(folder, token_pairs, layout):
    """For each form of batches ``{pair: [tokens of chosen, of rejected, sum of chosen, of rejected]}``."""
    from scripts.engine import build_engine
    from tests.ranks.parity import _micro_batches, make_config, start

    found, started = [], None
    for form in FORMS.values():
        config = make_config(folder, global_batch_size=8, micro_batch_size=2, **form, **layout)
        groups, device = started = started or start(config)
        _, schedule = build_engine(config, device, groups)
        # fillers, as in the last global batch
        batches = _micro_batches([*token_pairs, None, None], 0, config, groups)
        tokens, sums = schedule.token_logprobs(batches), schedule.forward(batches)
        found.append({})
        for batch, sequences, scored in zip(batches if groups.contributes_loss else [], tokens, sums, strict=False):
            numbers = scored.inputs.chosen_logprob.tolist(), scored.inputs.rejected_logprob.tolist()
            for place, pair in enumerate(batch.pair_ids.tolist()):
                own = [sequences[place].tolist(), sequences[batch.num_pairs + place].tolist()]
                if pair >= 0 and own[0]:
                    found[-1][pair] = [*own, numbers[0][place], numbers[1][place]]
    return found


@pytest.mark.parametrize("layout", LAYOUTS)
def test_tokens_are_those_of_transformers(model, expected, layout):
    by_rank = run_ranks(_tokens_and_sums, 2, str(model), pairs(), LAYOUTS[layout])
    for form, *of_ranks in zip(FORMS, *by_rank, strict=True):
        merged = {pair: values for part in of_ranks for pair, values in part.items()}
        assert sorted(merged) == list(range(len(expected))), form
        for pair, answers in enumerate(expected):
            for tokens, total, wanted in zip(merged[pair][:2], merged[pair][2:], answers, strict=True):
                assert tokens == pytest.approx(wanted, rel=2e-5, abs=2e-5), form
                assert sum(tokens) == pytest.approx(total, rel=1e-6), form
