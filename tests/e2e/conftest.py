"""One small model and its pairs for all end-to-end tests."""

import signal

import pytest

from tests.e2e.cli import Program
from tests.hf import make_checkpoint, make_pairs

# a shell that runs the tests in the background has them, and the programs that they start, ignore Ctrl-C
signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("e2e")


@pytest.fixture(scope="session")
def model(folder):
    # a vocabulary that two ranks do not divide, tied
    return make_checkpoint(folder / "qwen2", "qwen2", tied=True, vocab_size=515, hidden=32, std=0.2)


@pytest.fixture(scope="session")
def train_pairs(folder):
    return make_pairs(folder / "train.jsonl", 24)


@pytest.fixture(scope="session")
def eval_pairs(folder):
    return make_pairs(folder / "eval.jsonl", 7, seed=1)


@pytest.fixture
def program(tmp_path, model, train_pairs):
    """The program in an empty folder, configured for a short training in fp32."""
    return Program(
        tmp_path,
        model_name_or_path=str(model),
        data_path=str(train_pairs),
        output_dir=str(tmp_path / "out"),
        seq_length=1024,
        micro_batch_size=2,
        global_batch_size=8,
        train_iters=3,
        lr=1e-3,
        seed=7,
    )
