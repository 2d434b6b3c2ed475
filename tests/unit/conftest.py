"""What several unit tests use."""

import importlib
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

FAKES = Path(__file__).parent.parent / "fakes"


@pytest.fixture
def in_fp64(monkeypatch):
    """Load a folder as transformers' own model that computes everything in fp64.

    Its fp32 islands ask for torch.float32 by name (norms, softmax, frequencies and angles of the rotation); tensors
    of the default type are the scale of Gemma's embeddings and the base of the dynamic rotation. All become fp64.
    """
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)

    def load(folder):
        model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
        # the gradient of a padding row is the others' kind here: what an embedding row got as input counts
        model.get_input_embeddings().padding_idx = None
        return model

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float64)
    yield load
    torch.set_default_dtype(default)


@pytest.fixture
def torch_npu(monkeypatch):
    """The stand-in for torch_npu."""
    monkeypatch.syspath_prepend(str(FAKES))
    for name in [name for name in sys.modules if name.split(".")[0] == "torch_npu"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "torch.npu", None)
    monkeypatch.setattr(torch, "npu", None, raising=False)
    return importlib.import_module("torch_npu")
