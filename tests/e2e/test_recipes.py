"""Every recipe passes `check` for eight devices of 64 GB, with its model's real shape and stand-ins for the rest."""

import json
import re

import pytest
import yaml
from transformers import AutoConfig

from mindspeed_simpo.config.recipes import configuration_path, recipes
from mindspeed_simpo.errors import ConfigError
from tests.e2e.cli import Ranks
from tests.hf import make_pairs
from tests.tokenizers import ENGLISH, make_tokenizer

SEVEN_B = {"hidden_size": 4096, "num_attention_heads": 32, "num_hidden_layers": 32, "num_key_value_heads": 8}
LLAMA_3 = ("llama", SEVEN_B | {"intermediate_size": 14336, "vocab_size": 128256, "max_position_embeddings": 8192})
MISTRAL = ("mistral", SEVEN_B | {"intermediate_size": 14336, "vocab_size": 32000, "max_position_embeddings": 32768})
MODELS = {
    "meta-llama/Meta-Llama-3-8B-Instruct": LLAMA_3,
    "princeton-nlp/Llama-3-Base-8B-SFT": LLAMA_3,
    "alignment-handbook/zephyr-7b-sft-full": MISTRAL,
    "mistralai/Mistral-7B-v0.1": MISTRAL,
    "mistralai/Mistral-7B-Instruct-v0.2": MISTRAL,
    "google/gemma-2-9b-it": (
        "gemma2",
        {"hidden_size": 3584, "intermediate_size": 14336, "num_hidden_layers": 42, "vocab_size": 256000}
        | {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 256, "max_position_embeddings": 8192},
    ),
    "deepseek-ai/deepseek-math-7b-instruct": (
        "llama",
        {"hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 30, "vocab_size": 102400}
        | {"num_attention_heads": 32, "num_key_value_heads": 32, "max_position_embeddings": 4096},
    ),
}
PAPER = {  # beta, gamma / beta, learning rate, longest sequence, longest prompt
    "mistral_7b_base": (2.0, 0.8, 3e-7, 1024, 512),
    "mistral_7b_instruct": (2.5, 0.1, 5e-7, 2048, 1800),
    "llama3_8b_base": (2.0, 0.5, 6e-7, 2048, 1800),
    "llama3_8b_instruct": (2.5, 0.55, 1e-6, 2048, 1800),
    "llama3_8b_instruct_v2": (10.0, 0.3, 1e-6, 2048, 1800),
    "gemma2_9b_it": (10.0, 0.5, 8e-7, 2048, 1800),
}
"""Source: the table of hyper-parameters and training_configs/ of github.com/princeton-nlp/SimPO at 1b3e8f3."""


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Pairs without system turns; the prompt of one is longer than any recipe allows."""
    path = make_pairs(tmp_path_factory.mktemp("pairs") / "pairs.jsonl", 40, system=False)
    prompt, answer = ENGLISH * 8, ENGLISH[:400]
    long = {"prompt": prompt, "chosen": answer, "rejected": answer[: len(answer) // 2]}
    path.write_text(json.dumps(long) + "\n" + path.read_text(encoding="utf-8"), encoding="utf-8")
    return path


def stand_in(folder, family, shape, *, base_model):
    """A folder with the configuration of the family at its real size, a small tokenizer and no weights."""
    tokenizer = make_tokenizer(family)
    if base_model:
        tokenizer.chat_template = None
    config = AutoConfig.for_model(
        family, **shape, bos_token_id=tokenizer.bos_token_id, eos_token_id=tokenizer.eos_token_id, dtype="bfloat16"
    )
    config.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


@pytest.mark.parametrize("recipe", recipes(), ids=lambda recipe: recipe.name)
def test_checked_on_eight_devices(recipe, tmp_path, pairs):
    values = yaml.safe_load(recipe.path.read_text(encoding="utf-8"))
    family, shape = MODELS[values["model_name_or_path"]]
    stand_in(tmp_path / "model", family, shape, base_model="chat_template" in values)
    words = ["check", recipe.name, "--model-name-or-path", tmp_path / "model", "--init-from", "config"]
    words += ["--data-path", pairs, "--nproc-per-node", 8]
    words += [] if "device" in values else ["--device", "npu"]
    words += ["--eval-data-path", pairs] if "eval_data_path" in values else []
    done = Ranks(tmp_path / "run", words, 1, {"HOME": str(tmp_path), "COLUMNS": "200"}).wait()
    assert done.code == 0, done.stdout + done.stderr
    text = " ".join(done.stdout.split())
    assert "ready to train" in text
    assert re.search(r"prompts truncated │ 1 ", text)
    assert "x data 2" in text, "eight devices"
    totals = [float(total) for total in re.findall(r"│ total │ ([\d.]+)", text)]
    assert totals
    assert max(totals) < 0.9 * 64e9 / 2**30
    expected = ("held-out pairs are training prompts too", "do not fill one global batch", "init_from: config")
    warnings = [line for line in done.stdout.splitlines() if line.startswith("warning: ")]
    assert [line for line in warnings if not any(text in line for text in expected)] == []


@pytest.mark.parametrize("name", PAPER)
def test_settings_of_the_paper(name):
    values = yaml.safe_load(configuration_path(name).read_text(encoding="utf-8"))
    keys = ("simpo_beta", "gamma_beta_ratio", "lr", "seq_length", "max_prompt_length")
    assert tuple(values[key] for key in keys) == PAPER[name]
    shared = {"global_batch_size": 128, "num_train_epochs": 1, "lr_decay_style": "cosine", "lr_warmup_fraction": 0.1}
    shared |= {"adam_beta2": 0.999, "truncation": "keep_end", "stage": "simpo"}
    assert {key: values[key] for key in shared} == shared


def test_recipes_are_listed_and_found_by_name(tmp_path, monkeypatch):
    found = recipes()
    assert {*PAPER, "base_model", "instruct_with_sft_term", "math_low_lr"} <= {recipe.name for recipe in found}
    done = Ranks(tmp_path / "list", ["recipes"], 1, {"HOME": str(tmp_path)}).wait()
    listed = " ".join(done.stdout.replace("│", " ").split())
    for recipe in found:
        assert recipe.name in listed
        assert recipe.expect, f"{recipe.path}: a line `# Expect: ...`"
        assert f"train {recipe.name} --nproc-per-node 8" in recipe.path.read_text(encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    assert configuration_path("gemma2_9b_it.yaml") == configuration_path("gemma2_9b_it")
    (tmp_path / "gemma2_9b_it.yaml").write_text("")
    assert configuration_path("gemma2_9b_it.yaml").resolve() == tmp_path / "gemma2_9b_it.yaml", "a file comes first"
    with pytest.raises(ConfigError, match=r"neither a file nor a recipe.*did you mean llama3_8b_instruct\?"):
        configuration_path("lama3_8b_instruct")


def test_the_form_of_the_supervised_model_has_an_empty_system_turn():
    tokenizer = make_tokenizer("mistral")
    tokenizer.chat_template = configuration_path("mistral_7b_base").with_name("zephyr.jinja").read_text()
    turns = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    rendered = tokenizer.apply_chat_template(turns, tokenize=False)
    assert rendered == "<s><|system|>\n</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello</s>\n"
    prompt = tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    assert rendered.startswith(prompt)
    assert prompt.endswith("<|assistant|>\n")
    system = [{"role": "system", "content": "Be brief."}, *turns[:1]]
    assert tokenizer.apply_chat_template(system, tokenize=False).startswith("<s><|system|>\nBe brief.</s>\n<|user|>\n")
