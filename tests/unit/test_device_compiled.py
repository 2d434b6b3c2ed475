"""Formulas that are compiled to one kernel compute what they compute operator by operator, here on the CPU."""

import functools
import logging
import shutil

import pytest
import torch

from mindspeed_simpo.device import compiled, elementwise, operators
from mindspeed_simpo.loss.chunks import chunk_grads, chunk_terms

# the compiler of torch 2.13 calls what torch 2.13 deprecates
pytestmark = pytest.mark.filterwarnings(r"ignore:`torch\.jit:DeprecationWarning")


@pytest.fixture
def on_cpu(monkeypatch):
    monkeypatch.setattr(compiled, "DEVICE_TYPES", {"cpu"})
    monkeypatch.setattr(compiled, "_failed", set())
    # pytest would keep thousands of records
    monkeypatch.setattr(logging.getLogger("torch.__trace"), "disabled", True)
    torch._dynamo.reset()
    compiled._compiled.cache_clear()
    yield
    compiled._compiled.cache_clear()


@pytest.fixture
def traced(on_cpu, monkeypatch):  # noqa: ARG001
    """The formulas are traced and rewritten without mutations, as for the compiler, and then computed."""
    trace = functools.partial(torch.compile, dynamic=True, fullgraph=True, backend="aot_eager_decomp_partition")
    monkeypatch.setattr(compiled, "_compiled", functools.cache(trace))


def random(*size, dtype, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(size, generator=generator).to(dtype).requires_grad_()


def results(tokens, dtype):
    """Values and gradients of every operator."""
    hidden, weight = random(tokens, 2, 6, dtype=dtype), random(6, dtype=dtype, seed=1)
    halves, heads = random(tokens, 2, 12, dtype=dtype, seed=2), random(tokens, 2, 3, 8, dtype=dtype, seed=3)
    tables = [function(random(tokens, 1, 1, 4, dtype=dtype).detach()) for function in (torch.cos, torch.sin)]
    outputs = [
        (operators.rms_norm(hidden, weight, 1e-6, 1.0), (hidden, weight)),
        (operators.swiglu(halves), (halves,)),
        (operators.geglu(halves), (halves,)),
        (operators.clamped_swiglu(halves, 1.7, 0.7), (halves,)),
        *((operators.rotate(heads, *tables, interleaved=pairs), (heads,)) for pairs in (False, True)),
    ]
    found = []
    for output, inputs in outputs:
        upstream = torch.linspace(-1, 1, output.numel()).view(output.shape).to(dtype)
        found += [output, *torch.autograd.grad(output, inputs, upstream)]
    return found


def assert_equal(found, wanted):
    for ours, theirs in zip(found, wanted, strict=True):
        assert ours.dtype == theirs.dtype
        bound = 1e-6 if ours.dtype == torch.float32 else 2**-7
        torch.testing.assert_close(ours, theirs, rtol=bound, atol=bound)


@pytest.mark.usefixtures("traced")
def test_values_and_gradients_are_the_same(monkeypatch):
    found = {tokens: results(tokens, torch.float32) for tokens in (5, 0)}
    assert not compiled._failed
    monkeypatch.setattr(compiled, "DEVICE_TYPES", set())
    for tokens, ours in found.items():
        assert_equal(ours, results(tokens, torch.float32))


def chunk(tokens, dtype, softcap, existing):
    """Arguments of the two formulas of a chunk of logits."""
    products = 3 * random(tokens, 19, dtype=dtype).detach()
    column, mask = torch.arange(tokens)[:, None] % 7, torch.arange(tokens) % 3 > 0
    terms = chunk_terms(products.clone(), column, softcap, existing)
    return (products, column, mask, terms[0], 1 / terms[1], torch.linspace(-1, 1, tokens), softcap, existing)


@pytest.mark.usefixtures("traced")
def test_chunks_of_logits_are_the_same():
    for dtype, softcap, existing in ((torch.float32, None, None), (torch.bfloat16, 2.0, 17)):
        products, column, *others = chunk(6, dtype, softcap, existing)
        found, wanted = (
            (
                run(chunk_terms, products.clone(), column, softcap, existing),
                run(chunk_grads, products.clone(), column, *others),
            )
            for run in (compiled.as_one_kernel, lambda formula, *arguments: formula(*arguments))
        )
        assert_equal(found, wanted)
    assert not compiled._failed


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a C++ compiler")
@pytest.mark.usefixtures("on_cpu")
def test_the_compiler_rounds_as_the_operators_and_keeps_its_kernel_for_other_numbers_of_tokens():
    counted = torch._dynamo.utils.counters["stats"]
    counted.clear()
    for tokens in (5, 9, 12):
        hidden, weight = random(tokens, 2, 64, dtype=torch.bfloat16), random(64, dtype=torch.bfloat16)
        wanted = elementwise.rms_norm(hidden.detach(), weight.detach(), 1e-6, 0.0, False)
        found = compiled.as_one_kernel(elementwise.rms_norm, hidden, weight, 1e-6, 0.0, False)
        assert torch.equal(found[0], wanted[0])
        torch.testing.assert_close(found[1], wanted[1])
    assert not compiled._failed
    assert counted["unique_graphs"] == 1


@pytest.mark.usefixtures("on_cpu")
def test_a_formula_that_cannot_be_compiled_runs_and_this_is_said_once(monkeypatch, caplog):
    def no_compiler(*_):
        raise RuntimeError("found no compiler")

    failing = functools.partial(torch.compile, dynamic=True, backend=no_compiler)
    monkeypatch.setattr(compiled, "_compiled", functools.cache(failing))
    with caplog.at_level(logging.WARNING, logger="mindspeed_simpo"):
        found = results(5, torch.float32)
    [said] = [record.message for record in caplog.records if record.name.startswith("mindspeed_simpo")]
    assert "found no compiler" in said
    monkeypatch.setattr(compiled, "DEVICE_TYPES", set())
    assert_equal(found, results(5, torch.float32))
