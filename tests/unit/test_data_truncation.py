"""What truncation cuts, what it never cuts, and what it reports."""

from __future__ import annotations

import time

import pytest

from mindspeed_simpo.data.problems import ExampleError
from tests.tokenizers import FAMILIES
from tests.unit.data_helpers import END, PLAIN, encode, tokenizer

LONG = {
    "prompt": [
        {"role": "user", "content": "Plant beans beside the corn. " * 12},
        {"role": "assistant", "content": "They climb. " * 6},
        {"role": "user", "content": "Sort the list in place and compare neighbours. " * 12},
    ],
    "chosen": "Swap them while the left one is larger. " * 5,
    "rejected": "The tide comes in. " * 3,
}
HEADERS = {
    "qwen2": "<|im_start|>assistant\n",
    "qwen3": "<|im_start|>assistant\n<think>\n\n</think>\n\n",
    "llama": "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": " [/INST]",
    "gemma2": "<start_of_turn>model\n",
    "gemma3_text": "<start_of_turn>model\n",
    "phi3": "<|assistant|>\n",
    "glm4": "<|assistant|>\n",
}


@pytest.mark.parametrize("truncation", ["error", "drop"])
def test_a_long_pair_is_reported_with_its_lengths(truncation):
    full = encode(LONG, tokenizer())
    prompt, chosen, rejected = len(full.prompt_ids), len(full.chosen_ids), len(full.rejected_ids)
    fits = {"prompt_limit": 10, "truncation": truncation}
    assert encode(LONG, tokenizer(), seq_length=prompt + chosen, **fits) == full
    words = f"{prompt + chosen} tokens .prompt {prompt} tokens, chosen {chosen}, rejected {rejected}., seq_length is"
    with pytest.raises(ExampleError, match=words) as caught:
        encode(LONG, tokenizer(), seq_length=prompt + chosen - 1, **fits)
    assert caught.value.kind == "too_long"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("truncation", ["keep_end", "keep_start"])
def test_the_prompt_is_cut_as_far_as_needed(family, truncation):
    tok = tokenizer(family)
    full = encode(LONG, tok)
    seq_length = len(full.prompt_ids) + len(full.chosen_ids) - 40
    pair = encode(LONG, tok, seq_length=seq_length, prompt_limit=60, truncation=truncation)
    assert (pair.prompt_cut, pair.chosen_cut, pair.rejected_cut) == (40, 0, 0)
    assert len(pair.prompt_ids) + len(pair.chosen_ids) == seq_length
    assert (pair.chosen_ids, pair.rejected_ids) == (full.chosen_ids, full.rejected_ids)
    assert tok.decode(pair.prompt_ids).endswith(HEADERS[family])
    bos = int(tok.bos_token_id is not None)
    assert pair.prompt_ids[:bos] == full.prompt_ids[:bos]
    if truncation == "keep_end":
        assert pair.prompt_ids[bos:] == full.prompt_ids[bos + 40 :]
    else:
        kept = len(pair.prompt_ids) - len(tok(END[family] + HEADERS[family], add_special_tokens=False)["input_ids"]) - 1
        assert pair.prompt_ids[:kept] == full.prompt_ids[:kept]
        assert pair.prompt_ids != full.prompt_ids[: len(pair.prompt_ids)]


@pytest.mark.parametrize("truncation", ["keep_end", "keep_start"])
def test_the_prompt_is_cut_no_further_than_its_limit(truncation):
    full = encode(LONG, tokenizer())
    limit, room = 100, 30
    pair = encode(LONG, tokenizer(), seq_length=limit + room, prompt_limit=limit, truncation=truncation)
    assert len(pair.prompt_ids) == limit
    assert pair.chosen_ids == full.chosen_ids[:room]
    assert pair.rejected_ids == full.rejected_ids[:room]
    assert pair.chosen_cut == len(full.chosen_ids) - room


@pytest.mark.parametrize("truncation", ["keep_end", "keep_start"])
def test_a_short_prompt_is_not_cut_at_all(truncation):
    row = {**LONG, "prompt": "Sort it."}
    full = encode(row, tokenizer())
    pair = encode(row, tokenizer(), seq_length=len(full.prompt_ids) + 10, prompt_limit=500, truncation=truncation)
    assert pair.prompt_ids == full.prompt_ids
    assert pair.chosen_ids == full.chosen_ids[:10]


@pytest.mark.parametrize("truncation", ["keep_end", "keep_start"])
@pytest.mark.parametrize("family", FAMILIES)
def test_the_header_stays_however_small_the_limit(family, truncation):
    tok = tokenizer(family)
    pair = encode(LONG, tok, seq_length=40, prompt_limit=1, truncation=truncation)
    assert tok.decode(pair.prompt_ids).endswith(HEADERS[family])
    assert len(pair.prompt_ids) + len(pair.chosen_ids) == 40
    assert len(pair.chosen_ids) >= 1


@pytest.mark.parametrize("truncation", ["keep_end", "keep_start"])
def test_a_header_without_room_for_a_response_is_reported(truncation):
    with pytest.raises(ExampleError, match="the assistant header alone has") as caught:
        encode(LONG, tokenizer("llama"), seq_length=8, prompt_limit=4, truncation=truncation)
    assert caught.value.kind == "too_long"


def test_responses_that_truncation_makes_equal_are_identical():
    start = "The heart pumps blood through the lungs. " * 4
    row = {"prompt": "Why?", "chosen": start + "Yes.", "rejected": start + "No."}
    length = len(encode(row, tokenizer()).prompt_ids)
    with pytest.raises(ExampleError, match="the same in the 20 tokens that truncation leaves") as caught:
        encode(row, tokenizer(), seq_length=length + 20, prompt_limit=length, truncation="keep_end")
    assert caught.value.kind == "identical"


def test_a_text_of_megabytes_is_not_tokenised():
    begin = time.monotonic()
    for truncation in ("error", "keep_end"):
        with pytest.raises(ExampleError, match="a turn has 50000000 characters; more than 4000000 are not") as caught:
            encode({**PLAIN, "chosen": "x" * 50_000_000}, tokenizer(), truncation=truncation)
        assert caught.value.kind == "too_long"
    assert time.monotonic() - begin < 5
