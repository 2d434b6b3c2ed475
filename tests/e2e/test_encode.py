"""``mindspeed-simpo encode``: files that MindSpeed-LLM trains on, and that this package reads back."""

import json

import pytest

from mindspeed_simpo.cli import main as cli
from mindspeed_simpo.config.config import Config
from mindspeed_simpo.data.dataset import prepare_pairs
from mindspeed_simpo.data.indexed import IndexedPairs
from mindspeed_simpo.data.tokenizer import load_tokenizer
from tests.tokenizers import ENGLISH, make_tokenizer


@pytest.fixture
def config_file(tmp_path):
    make_tokenizer("qwen2").save_pretrained(tmp_path / "model")
    questions = ENGLISH.splitlines()[1:11]
    rows = [{"prompt": question, "chosen": f"Yes, {i}.", "rejected": "No."} for i, question in enumerate(questions)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    paths = {"model_name_or_path": "model", "data_path": "rows.jsonl", "data_cache_dir": "cache"}
    lines = [f"{name}: {tmp_path / value}" for name, value in paths.items()]
    (tmp_path / "config.yaml").write_text("\n".join([*lines, "seq_length: 256"]))
    return tmp_path / "config.yaml"


@pytest.mark.parametrize(("part", "first", "count"), [("train", 0, 8), ("eval", 8, 2)])
def test_the_pairs_of_a_run(config_file, tmp_path, capsys, part, first, count):
    words = ["encode", str(config_file), "--output-prefix", str(tmp_path / "out" / "p"), "--split", "80,20"]
    assert cli.execute([*words, "--part", part]) == 0
    assert capsys.readouterr().out == f"{count} pairs: --data-path {tmp_path}/out/p\n"
    folder = str(tmp_path / "model")
    config = Config(model_name_or_path=folder, data_path=str(tmp_path / "rows.jsonl"), seq_length=256)
    pairs = prepare_pairs(config, load_tokenizer(folder, None), "train", progress=False)
    written = IndexedPairs(tmp_path / "out" / "p")
    assert [(p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in written] == [
        (p.prompt_ids, p.chosen_ids, p.rejected_ids) for p in (pairs[first + i] for i in range(count))
    ]


def test_an_unknown_part_is_told(config_file, tmp_path, capsys):
    words = ["encode", str(config_file), "--output-prefix", str(tmp_path / "p"), "--part", "test"]
    assert cli.execute(words) == 2
    assert "--part: expected train or eval, found 'test'" in capsys.readouterr().err
