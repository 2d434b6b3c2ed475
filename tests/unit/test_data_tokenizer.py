"""Loading tokenizers: every way in which a folder or a template file can be wrong."""

from __future__ import annotations

import json

import pytest

from mindspeed_simpo.data.tokenizer import load_tokenizer, tokenizer_digest
from mindspeed_simpo.errors import ModelError
from tests.tokenizers import make_tokenizer

TEMPLATE = "{% for m in messages %}<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"


@pytest.fixture
def folder(tmp_path):
    make_tokenizer("qwen2").save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def without_template(folder):
    (folder / "chat_template.jinja").unlink(missing_ok=True)
    config = json.loads((folder / "tokenizer_config.json").read_text())
    config.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def test_a_folder_gives_its_own_template(folder):
    tokenizer = load_tokenizer(str(folder), None)
    assert tokenizer.chat_template == make_tokenizer("qwen2").chat_template
    assert tokenizer("corn")["input_ids"] == make_tokenizer("qwen2")("corn")["input_ids"]


def test_a_template_file_takes_its_place(folder, tmp_path):
    without_template(folder)
    with pytest.raises(ModelError, match="has no chat template; name a Jinja file with `chat_template`"):
        load_tokenizer(str(folder), None)
    (tmp_path / "t.jinja").write_text(TEMPLATE)
    assert load_tokenizer(str(folder), str(tmp_path / "t.jinja")).chat_template == TEMPLATE


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (None, "chat_template: cannot read .*t.jinja .looked for .*No such file"),
        (b"", "t.jinja is empty"),
        (b"\xff\xfe", "t.jinja is not UTF-8"),
        (b"a\n{% for m in messages %}", "t.jinja: the chat template is not valid Jinja, line 2"),
        (b"{{ messages | nofilter }}", "t.jinja: the chat template .*No filter named 'nofilter'"),
        (b"{{ raise_exception('not for you') }}", "cannot render one user turn: .*not for you"),
        (b"{{ messages[7].content.x }}", "cannot render one user turn"),
    ],
)
def test_a_bad_template_file_is_named(folder, tmp_path, content, words):
    if content is not None:
        (tmp_path / "t.jinja").write_bytes(content)
    with pytest.raises(ModelError, match=words):
        load_tokenizer(str(folder), str(tmp_path / "t.jinja"))


@pytest.mark.parametrize("damage", ["empty", "no tokenizer", "truncated", "not json", "file"])
def test_a_folder_without_a_usable_tokenizer_is_named(folder, damage):
    if damage in ("empty", "no tokenizer"):
        for file in folder.iterdir():
            file.unlink()
    if damage == "no tokenizer":
        (folder / "config.json").write_text('{"model_type": "qwen2"}')
    if damage == "truncated":
        text = (folder / "tokenizer.json").read_text()
        (folder / "tokenizer.json").write_text(text[: len(text) // 2])
    if damage == "not json":
        (folder / "tokenizer_config.json").write_text("{")
    path = folder / "tokenizer.json" if damage == "file" else folder
    with pytest.raises(ModelError, match=r"model.*(no usable tokenizer|found a file)"):
        load_tokenizer(str(path), None)


@pytest.mark.parametrize("name", ["no/such/folder", "./model", "/nowhere/model", "model", "a\0b"])
def test_a_mistyped_folder_says_what_was_looked_for(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"no such folder \(looked for .*; a hub id would be `owner/name`"):
        load_tokenizer(name, None)


def test_an_unknown_hub_id_says_both(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ModelError, match=r"no such folder .*, and no model of the Hugging Face hub"):
        load_tokenizer("no-owner/no-name", None)


def test_the_digest_follows_what_decides_token_ids(folder):
    tokenizer = load_tokenizer(str(folder), None)
    digest = tokenizer_digest(tokenizer)
    tokenizer(["a", "b b"], padding=True, truncation=True, max_length=2)
    assert tokenizer_digest(tokenizer) == digest == tokenizer_digest(load_tokenizer(str(folder), None))
    tokenizer.chat_template += " "
    assert tokenizer_digest(tokenizer) != digest
    assert len({tokenizer_digest(make_tokenizer("qwen2", size)) for size in (300, 301, 302)}) == 3
