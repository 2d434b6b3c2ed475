"""What the tests of sampling share: small prompts, settings and a scorer."""

import json

from transformers import AutoTokenizer

from mindspeed_simpo.config.file import validate
from mindspeed_simpo.data.prompts import Prompt
from mindspeed_simpo.data.turns import Message
from mindspeed_simpo.studies.sampling.prompts import Rendering, read_prompts
from mindspeed_simpo.studies.sampling.record import Candidates, Draw, SamplingPrompt
from mindspeed_simpo.studies.sampling.settings import SamplingSettings

USER = {"role": "user", "content": "Why?"}
SYSTEM = {"role": "system", "content": "Be brief."}
YES, NO = {"role": "assistant", "content": "Yes."}, {"role": "assistant", "content": "No."}


def configured(folder, **values):
    return validate({"model_name_or_path": str(folder), "data_path": "d", "seq_length": 96} | values, where="test")


def settings_of(rows, tmp_path, **values):
    path = tmp_path / "prompts.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    values = {"prompts": str(path), "output": str(tmp_path / "pairs.jsonl"), "scorer": "true"} | values
    return SamplingSettings.of(values)


def prompts_of(folder, tmp_path, rows, config=None, **values):
    config = config or configured(folder)
    rendering = Rendering(config, AutoTokenizer.from_pretrained(folder))
    return read_prompts(config, settings_of(rows, tmp_path, **values), rendering), rendering


def draw_of(folder, n=3, **values):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ends = frozenset(tokenizer.convert_tokens_to_ids(["<|im_end|>", "<|endoftext|>"]))
    return Draw(tokenizer, n, values.get("temperature", 0.8), values.get("top_p", 1.0), 7, ends)


def candidates(*texts, question="Why?"):
    prompt = Prompt((Message("user", question),))
    return Candidates(SamplingPrompt(0, "p.jsonl:1", prompt, "", [1], 5), texts)


LENGTHS = """import sys,json
for line in sys.stdin: print(json.dumps({'scores': [len(answer) for answer in json.loads(line)['answers']]}))"""
