"""The tokenizer of an exported model is that of its source, file by file, except for a template of the user's own."""

import json

import pytest
from transformers import AutoTokenizer

from mindspeed_simpo.model.tokenizer_files import write_tokenizer
from tests.tokenizers import make_tokenizer

OWN = "{% for m in messages %}{{ m.role }}: {{ m.content }}<|im_end|>{% endfor %}"


@pytest.fixture
def source(tmp_path):
    """A folder as transformers 4 writes it, with the template in tokenizer_config.json, and with other files."""
    folder = tmp_path / "source"
    tokenizer = make_tokenizer("qwen2")
    tokenizer.save_pretrained(folder, save_jinja_files=False)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "Qwen2Tokenizer"
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "merges.txt").write_text("#version: 0.2\n")
    for name in ("config.json", "model.safetensors", "tokenizer_code.py"):
        (folder / name).write_text("{}")
    return folder


def test_files_are_copied_and_nothing_else(source, tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    write_tokenizer(source, output, make_tokenizer("llama"), None)
    written = {path.name: path.read_bytes() for path in output.iterdir()}
    assert written.keys() == {"tokenizer.json", "tokenizer_config.json", "merges.txt"}
    assert written == {name: (source / name).read_bytes() for name in written}


@pytest.mark.parametrize("as_file", [False, True])
def test_a_template_of_the_users_own_replaces_that_of_the_source(source, tmp_path, as_file):
    if as_file:
        (source / "chat_template.jinja").write_text("{{ 'other' }}")
    output = tmp_path / "out"
    output.mkdir()
    write_tokenizer(source, output, make_tokenizer("llama"), OWN)
    config = json.loads((output / "tokenizer_config.json").read_text())
    assert config["chat_template"] == OWN
    assert config["tokenizer_class"] == "Qwen2Tokenizer"
    assert (output / "tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()
    config["tokenizer_class"] = "PreTrainedTokenizerFast"
    (output / "tokenizer_config.json").write_text(json.dumps(config))
    assert AutoTokenizer.from_pretrained(output).chat_template == OWN


def test_a_source_without_these_files(tmp_path):
    output = tmp_path / "out"
    output.mkdir()
    write_tokenizer(tmp_path, output, make_tokenizer("qwen2"), None)
    assert AutoTokenizer.from_pretrained(output).get_vocab() == make_tokenizer("qwen2").get_vocab()
