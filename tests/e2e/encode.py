"""Pairs to token ids by transformers alone, and the order that a seed gives them."""

import json

from transformers import AutoTokenizer

from mindspeed_simpo.batch import FILLER_PAIR, TokenizedPair
from mindspeed_simpo.data.batching import Batching
from mindspeed_simpo.data.loader import PairLoader
from tests.hf import Pairs


def encode_file(folder, path):
    """``(prompt, chosen, rejected)`` token ids of each row of a JSONL file of message lists."""
    rows = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    answers = ("chosen", "rejected")
    return encode_rows(folder, [(row["prompt"], *(row[side][0]["content"] for side in answers)) for row in rows])


EMPTY_THOUGHT = "<think>\n\n</think>\n\n"


def encode_rows(folder, rows):
    """The same for ``(messages, chosen text, rejected text)``."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    pairs = []
    for messages, *answers in rows:
        prompt = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        responses = []
        for answer in answers:
            whole = [*messages, {"role": "assistant", "content": answer}]
            text = tokenizer.apply_chat_template(whole, tokenize=False)
            assert text.startswith(prompt)
            response = text[len(prompt) :]
            if response.startswith(EMPTY_THOUGHT):  # Qwen3's: given with the prompt, not generated
                prompt, response = prompt + EMPTY_THOUGHT, response.removeprefix(EMPTY_THOUGHT)
            end = response.rindex(tokenizer.eos_token) + len(tokenizer.eos_token)
            responses.append(tokenizer(response[:end], add_special_tokens=False)["input_ids"])
        pairs.append((tokenizer(prompt, add_special_tokens=False)["input_ids"], *responses))
    return pairs


def order_of(program, num_pairs, steps=None):
    """Row numbers of each global batch of a training run; ``steps`` is its number of steps, by default train_iters."""
    config = program.config
    loader = PairLoader(
        Pairs([TokenizedPair([0], [0], [0], source="")] * num_pairs),
        seed=config["seed"],
        global_batch_size=config["global_batch_size"],
        batching=Batching("padded", config["global_batch_size"], max_tokens=0),
        data_parallel_rank=0,
        data_parallel_size=1,
    )
    starts = [loader.consumed_pairs(step) for step in range(steps or config["train_iters"])]
    batches = [loader.train_step(start)[0].pair_ids.tolist() for start in starts]
    return [[pair_id for pair_id in batch if pair_id != FILLER_PAIR] for batch in batches]
