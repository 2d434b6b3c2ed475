"""Runs of a real MindSpeed-LLM on the CPU, and what they printed."""

import atexit
import functools
import importlib.util
import json
import os
import random
import re
import socket
import subprocess
import sys
import warnings
from dataclasses import dataclass, field
from pathlib import Path

import pytest
import torch

from mindspeed_simpo.batch import TokenizedPair
from mindspeed_simpo.data.indexed import write_indexed_pairs
from tests import oracle
from tests.tokenizers import make_tokenizer
from tests.upstream.weights import FAMILIES, MODEL_FLAGS, VOCABULARY, Place, config_of, hf_params, megatron_part

REPOSITORY = Path(__file__).resolve().parents[2]
VARIABLES = ("MINDSPEED_LLM_PATH", "MINDSPEED_PATH", "MEGATRON_LM_PATH")
REQUIRED = ("peft", "accelerate", "einops", "six", "psutil", "sentencepiece", "pybind11", "scipy")
BASE_FLAGS = """
    --tokenizer-type PretrainedFromHF --seq-length 48 --split 100,0,0 --is-pairwise-dataset --no-shuffle
    --is-instruction-dataset --lr 1e-3 --min-lr 1e-3 --lr-decay-style constant --weight-decay 0.0 --clip-grad 0.0
    --adam-beta1 0.9 --adam-beta2 0.95 --log-interval 1 --save-interval 1000 --eval-interval 1000 --eval-iters 0
    --distributed-backend nccl --seed 42 --num-workers 0
"""


def skip_reason():
    """Why a real MindSpeed-LLM cannot be run here, or None."""
    absent = [name for name in VARIABLES if not os.environ.get(name)]
    if absent:
        return f"{', '.join(absent)} not set: no MindSpeed-LLM to run against"
    packages = [name for name in REQUIRED if importlib.util.find_spec(name) is None]
    return f"MindSpeed-LLM needs {', '.join(packages)}: pip install them" if packages else None


needs_upstream = pytest.mark.skipif(skip_reason() is not None, reason=skip_reason() or "")


def environment():
    """The environment of a process that can import MindSpeed-LLM here."""
    llm, mindspeed, megatron = (str(Path(os.environ[name]).resolve()) for name in VARIABLES)
    paths = [llm, megatron, mindspeed, str(REPOSITORY / "tests" / "fakes"), str(REPOSITORY)]
    # the test process's own checks of shapes and warnings are not upstream's
    kept = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", "PYTHONWARNINGS")}
    return kept | {
        "PYTHONPATH": os.pathsep.join(paths),
        # Megatron compiles its index helpers with this interpreter's pybind11
        "PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ.get("PATH", "")]),
        "CUDA_DEVICE_MAX_CONNECTIONS": "1",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "PYTHONUNBUFFERED": "1",
    }


@dataclass
class Run:
    """A finished run."""

    code: int
    text: str
    folder: Path
    ranks: list = field(default_factory=list)

    def metrics(self):
        """{metric: value} of each logged training iteration, from this package's line."""
        lines = re.findall(r"^ \w+ iteration +\d+/ +\d+ \| (.*) \|$", self.text, re.MULTILINE)
        return [
            {name: float(value) for name, value in (item.split(": ") for item in line.split(" | "))} for line in lines
        ]

    def logged(self, name):
        """Values of one field of upstream's own log line, by iteration."""
        return [
            float(value) for value in re.findall(rf"\| {re.escape(name)}: ([-+.\dE]+) \|", self.text, re.IGNORECASE)
        ]


def write_indexed(prefix, columns):
    """``{key: [ids of each document]}`` as Megatron's indexed datasets ``PREFIX_packed_KEY_document``."""
    with warnings.catch_warnings():
        # torch's own submodules call what torch deprecates, when megatron-core imports them
        warnings.simplefilter("ignore")
        from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder
    for key, documents in columns.items():
        builder = IndexedDatasetBuilder(f"{prefix}_packed_{key}_document.bin")
        for ids in documents:
            builder.add_item(torch.IntTensor(ids))
            builder.end_document()
        builder.finalize(f"{prefix}_packed_{key}_document.idx")


def make_pairs(number, seed=0, longest=40):
    """Pairs with ids 0 and those at the edges of vocabulary shards, and one-token responses."""
    draw = random.Random(seed)
    edges = [0, VOCABULARY // 2 - 1, VOCABULARY // 2, VOCABULARY - 1, VOCABULARY // 4]
    pairs = []
    for index in range(number):
        lengths = draw.randint(1, longest // 2), draw.randint(1, longest // 2), draw.randint(1, longest // 2)
        prompt, chosen, rejected = ([draw.randrange(VOCABULARY) for _ in range(length)] for length in lengths)
        chosen = [edges[index % len(edges)], *chosen] if index % 4 else [edges[index % len(edges)]]
        rejected = [edges[(index + 2) % len(edges)], *rejected]
        pairs.append((prompt, chosen, rejected))
    return pairs


def write_data(folder, pairs):
    """Data files and a tokenizer; the flags that name them."""
    folder.mkdir(parents=True, exist_ok=True)
    write_indexed_pairs(folder / "pairs", [TokenizedPair(*pair, f"pair {i}") for i, pair in enumerate(pairs)])
    make_tokenizer("llama").save_pretrained(folder / "tokenizer")
    return ["--data-path", str(folder / "pairs"), "--tokenizer-name-or-path", str(folder / "tokenizer")]


def free_port():
    """A port of this host that nobody listens on, and that no connection is given by chance before the ranks use it."""
    while True:
        with socket.socket() as free:
            try:
                free.bind(("127.0.0.1", random.SystemRandom().randrange(1100, 15000)))
            except OSError:
                continue
            return free.getsockname()[1]


def launch(folder, flags, ranks=1, entry=None, timeout_s=600, extra_environment=None):
    """Run the worker, or ``entry`` under torchrun as a user would, with these flags, in MindSpeed-LLM's root."""
    folder.mkdir(parents=True, exist_ok=True)
    if entry is None:
        code, text = _fork(folder, flags, ranks, timeout_s)
    else:
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
        process = subprocess.run(
            [*command, "--master-port", str(free_port()), *entry, *flags],
            cwd=os.environ["MINDSPEED_LLM_PATH"],
            env=environment() | (extra_environment or {}),
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=timeout_s,
            check=False,
        )
        code, text = process.returncode, process.stdout
        (folder / "log.txt").write_text(text)
    outputs = sorted(folder.glob("[0-9].pt"))
    return Run(code, text, folder, [torch.load(path, weights_only=False) for path in outputs])


def _fork(folder, flags, ranks, timeout_s):
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    shared |= {"WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    job = {
        "argv": [str(REPOSITORY / "tests" / "upstream" / "worker.py"), str(folder), *flags],
        "environments": [shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(ranks)],
        "log": str(folder / "log.txt"),
        "timeout_s": timeout_s,
    }
    nursery = _nursery()
    nursery.stdin.write(json.dumps(job) + "\n")
    nursery.stdin.flush()
    code = int(nursery.stdout.readline())
    return code, (folder / "log.txt").read_text()


@functools.cache
def _nursery():
    process = subprocess.Popen(
        [sys.executable, str(REPOSITORY / "tests" / "upstream" / "nursery.py")],
        cwd=os.environ["MINDSPEED_LLM_PATH"],
        env=environment(),
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    atexit.register(process.communicate)
    return process


def train(
    folder, pairs, flags="", ranks=1, global_batch=4, iterations=1, stage="simpo", forms=(), family="llama", **options
):
    """One training run of the small model; fails with upstream's own output.

    Each iteration after the first takes the configuration keys of the next of ``forms``.
    """
    data = write_data(folder / "data", pairs)
    (folder / "forms.json").write_text(json.dumps(forms))
    (folder / "family.txt").write_text(family)
    sizes = f"--global-batch-size {global_batch} --train-iters {iterations}"
    if "--micro-batch-size" not in flags.split():
        sizes += " --micro-batch-size 2"
    arguments = f"{MODEL_FLAGS} {FAMILIES[family].flags} {BASE_FLAGS} {sizes} --stage {stage} {flags}".split() + data
    run = launch(folder, arguments, ranks, **options)
    assert run.code == 0, run.text[-6000:]
    return run


def dense(params, reference, pairs, family="llama", **options):
    """The oracle's mean metrics and {Hugging Face name: gradient}, for these pairs and weights."""
    return oracle._backward(params, reference, config_of(family), pairs, oracle.Options(**options), oracle.Running())[
        :2
    ]


def expected(pairs, family="llama", **options):
    """:func:`dense` with the known weights."""
    params = {name: value.double().requires_grad_() for name, value in hf_params(family=family).items()}
    reference = {name: value.double() for name, value in hf_params(1, family).items()}
    return dense(params, reference, pairs, family, **options)


def upstream_file(name):
    """A file of MindSpeed-LLM, or a skip where this version has none."""
    path = Path(os.environ["MINDSPEED_LLM_PATH"]) / name
    if not path.exists():
        pytest.skip(f"this MindSpeed-LLM has no {name}")
    return path


def no_pad_flag():
    """The flag that pads a batch to its longest row only: renamed after 2.2.0."""
    source = (Path(os.environ["MINDSPEED_LLM_PATH"]) / "mindspeed_llm/legacy/data/data_samplers.py").read_text()
    return "--no-pad-to-seq-lengths" if "no_pad_to_seq_lengths" in source else "--variable-seq-lengths"


def gradient_errors(run, gradients, step=None, family="llama"):
    """Relative L2 error of each parameter's gradient, the worst over ranks; every gradient must have been compared.

    ``step`` counts from 0 in a run of several forms; None is the last one.
    """
    errors = {}
    for rank in run.ranks:
        for name, (layer, gradient, _) in rank["parameters"].items():
            gradient = gradient if step is None else rank["steps"][step][name]
            part = megatron_part(gradients, name, layer, Place(*rank["place"]), family)
            error = ((gradient.double() - part).norm() / part.norm()).item()
            errors[name] = max(errors.get(name, 0.0), error)
    if family == "llama":
        assert len(errors) == 3 + 6 * config_of()["num_hidden_layers"], sorted(errors)
    return errors
