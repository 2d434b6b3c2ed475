"""The part of vLLM that samples offline: its arguments are checked by name, and a real model generates."""

from dataclasses import dataclass
from types import SimpleNamespace

import torch
from transformers import AutoModelForCausalLM


@dataclass
class SamplingParams:
    n: int = 1
    temperature: float = 1.0
    top_p: float = 1.0
    seed: int | None = None
    stop_token_ids: list[int] | None = None
    max_tokens: int = 16
    detokenize: bool = True


class LLM:
    made = None

    def __init__(self, model, **options):
        LLM.made = options
        self._model = AutoModelForCausalLM.from_pretrained(model)

    def generate(self, prompts, sampling_params, *, use_tqdm=True):
        assert not use_tqdm
        assert len(prompts) == len(sampling_params)
        return [self._output(each, params) for each, params in zip(prompts, sampling_params, strict=True)]

    def _output(self, prompt, params):
        [(name, ids)] = prompt.items()
        assert name == "prompt_token_ids"
        assert not params.detokenize
        torch.manual_seed(params.seed)
        out = self._model.generate(
            torch.tensor([ids]),
            attention_mask=torch.ones(1, len(ids), dtype=torch.long),
            do_sample=True,
            temperature=params.temperature,
            top_p=params.top_p,
            top_k=0,
            num_return_sequences=params.n,
            max_new_tokens=params.max_tokens,
            eos_token_id=params.stop_token_ids,
        )
        return SimpleNamespace(outputs=[self._completion(row[len(ids) :], params) for row in out.tolist()])

    def _completion(self, ids, params):
        end = next((place for place, token in enumerate(ids) if token in params.stop_token_ids), None)
        kept = ids if end is None else ids[: end + 1]
        return SimpleNamespace(token_ids=kept, finish_reason="length" if end is None else "stop")
