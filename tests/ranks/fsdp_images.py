"""What ``backend: fsdp`` and transformers compute of pairs with images."""

from __future__ import annotations

import hashlib
from functools import partial

import torch
from peft import PeftModel
from transformers import AutoModelForImageTextToText

from mindspeed_simpo.data.processor import load_processor
from tests.hf_adapters import quiet_peft
from tests.images import encoded
from tests.oracle_objectives import Options
from tests.ranks.fsdp_models import _steps, loss_and_gradients
from tests.ranks.launcher import run_ranks


def by_transformers(folder, pairs, options: Options, adapter=None):
    """Loss and gradients of the model of transformers in fp64, one row at a time, by its own full forward."""
    processor = load_processor(str(folder))._processor
    model = AutoModelForImageTextToText.from_pretrained(
        folder, dtype=torch.float64, attn_implementation="eager", experts_implementation="eager"
    )
    if adapter is not None:
        with quiet_peft():
            model = PeftModel.from_pretrained(model, adapter, is_trainable=True).to(torch.float64)
    scored = []
    for pieces, pictures, *responses in pairs:
        prompt, inputs = _prompt(processor, pieces, pictures)
        scored.append([partial(_sum, model, processor, prompt, inputs, response) for response in responses])
    return loss_and_gradients(model, scored, options)


def _prompt(processor, pieces, pictures):
    """Token ids with the tokens of each image in its place, and the inputs of the images."""
    ids = list(pieces[0])
    for picture, piece in zip(pictures, pieces[1:], strict=True):
        given = processor(text=[processor.image_token], images=[[picture]], add_special_tokens=False)
        ids += [*given["input_ids"][0], *piece]
    return ids, dict(processor.image_processor(pictures, return_tensors="pt")) if pictures else {}


def _sum(model, processor, prompt, inputs, response):
    ids = [prompt + response]
    if inputs and hasattr(model.base_model if not hasattr(model, "peft_config") else model.model.model, "rope_deltas"):
        types = processor.create_mm_token_type_ids(ids)
        inputs = {**inputs, "mm_token_type_ids": torch.tensor(types)}
    logits = model(input_ids=torch.tensor(ids), use_cache=False, **inputs).logits[0]
    predicted = torch.log_softmax(logits[len(prompt) - 1 : -1], dim=-1)
    return predicted.gather(1, torch.tensor(response)[:, None]).sum(), len(response)


def fsdp_steps(folder, batches, ranks=1, **options):
    """Train on global batches of pairs with images; see :func:`tests.ranks.fsdp_models.fsdp_steps`."""
    packed = [[(pieces, [encoded(each) for each in pictures], *rest) for pieces, pictures, *rest in batch]
              for batch in batches]  # fmt: skip
    results = run_ranks(_image_steps, ranks, str(folder), packed, options)
    for key in ("losses", "norms"):
        assert all(result[key] == results[0][key] for result in results), f"ranks disagree on the {key}"
    for key in ("grads", "params"):
        results[0][key] = {name: torch.from_numpy(array) for name, array in results[0][key].items()}
    return results[0]


def _image_steps(folder, batches, options):
    from functools import partial

    return _steps(folder, batches, options, partial(_deal, folder))


def _image_inputs(folder):
    from functools import partial
    from pathlib import Path

    from mindspeed_simpo.data.pixels import ImageInputs
    from mindspeed_simpo.model.fsdp.build import empty_model
    from mindspeed_simpo.model.fsdp.images import rope_positions

    base = empty_model(Path(folder)).base_model
    positions = partial(rope_positions, base) if hasattr(base, "get_rope_index") else None
    return ImageInputs(load_processor(folder), positions)


def _deal(folder, pairs, first, config, groups):
    """Pairs in turn to the ranks, as micro-batches."""
    from mindspeed_simpo.batch import TokenizedPair
    from mindspeed_simpo.data.batching import Batching
    from mindspeed_simpo.data.images import StoredImage

    inputs = _image_inputs(folder)
    tokenized = []
    for pieces, files, chosen, rejected in pairs:
        images = tuple(StoredImage(None, file, hashlib.sha256(file).digest()) for file in files)
        prompt, _ = _prompt(inputs.processor._processor, pieces, [image.open() for image in images])
        tokenized.append(TokenizedPair(prompt, chosen, rejected, source="pair", images=images))
    batching = Batching.of(config)
    dealt = [range(rank, len(pairs), groups.data.size()) for rank in range(groups.data.size())]
    own = dealt[groups.data.rank()]
    number = batching.number_of_micro_batches([batching.size_of_pair(pair) for pair in tokenized], dealt)
    return batching.micro_batches([tokenized[i] for i in own], [first + i for i in own], number, inputs)


def check_model(folder):
    """The self-test of a model with images."""
    from tests.ranks.parity import build, make_config, start

    config = make_config(folder, backend="fsdp", seq_length=256)
    groups, device = start(config)
    backend, _, _ = build(config, groups, device, 1)
    backend.check_images(*_image_inputs(folder).sample())


def count_features(folder, pairs):
    """Number of images of each call of the vision tower in one step, by pair schedule."""
    from mindspeed_simpo.training.session import build_schedule
    from tests.ranks.parity import build, make_config, start

    pairs = [(pieces, [encoded(each) for each in pictures], *rest) for pieces, pictures, *rest in pairs]
    found, groups = {}, None
    for name in ("concat", "two_pass"):
        config = make_config(
            folder, backend="fsdp", seq_length=256, pair_schedule=name, global_batch_size=len(pairs), micro_batch_size=2
        )
        if groups is None:
            groups, device = start(config)
        backend, models, _ = build(config, groups, device, 1)
        calls = found[name] = []
        tower = models[0].causal.base_model.visual
        tower.register_forward_pre_hook(
            lambda _module, _given, named, calls=calls: calls.append(len(named["grid_thw"])), with_kwargs=True
        )
        schedule = build_schedule(config, backend, groups, device, lambda: None, models, None)
        schedule.forward_backward(_deal(folder, pairs, 0, backend.config, groups), len(pairs), 0)
    return found
