"""What several unit tests use."""

import pytest
import torch
from transformers import AutoModelForCausalLM


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
