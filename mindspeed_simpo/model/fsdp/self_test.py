"""What a model can be trained on, found out before training: packed rows, shared prompts, its attention patterns."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from mindspeed_simpo.batch import UNPACKED, Branch, Documents
from mindspeed_simpo.batch_images import BatchImages, identities_of
from mindspeed_simpo.errors import ModelError
from mindspeed_simpo.model.fsdp.attention import Seen, recording
from mindspeed_simpo.model.fsdp.images import check_class
from mindspeed_simpo.model.fsdp.policy import ImageTokens, Policy

_PROMPT, _CHOSEN, _REJECTED = 11, 9, 6
_TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 5e-2}


@dataclass(frozen=True)
class Abilities:
    """The forms of batches that a model can be trained with."""

    packed: bool
    prefix_shared: bool
    softcaps: bool
    """Whether attention scores are capped."""
    reason: str | None = None
    """Why not all; None where all are possible."""


def find_abilities(policy: Policy, vocab_size: int, seq_length: int, layers: int) -> Abilities:
    """Compare the hidden states of a pair in padded, packed and prefix-shared rows; a collective of the world.

    Args:
        policy: The model with its weights.
        vocab_size: Number of ids.
        seq_length: Longest sequence, tokens.
        layers: Number of decoder layers.

    Raises:
        ModelError: where the model wants an attention pattern that is neither causal nor a sliding window.
    """
    # FSDP2 puts its name before that of the class
    kind, training = type(policy.causal).__name__.removeprefix("FSDP"), policy.training
    policy.eval()
    try:
        with recording(Seen()) as seen:
            expected = _states(policy, vocab_size, "padded", seen)
        for mask in seen.masks:
            _check_pattern(mask, seq_length, kind)
        missing = layers - len(seen.modules)
        if missing > 0:
            without = f"{missing} of the {layers} layers of {kind} have no attention that rows could be packed for"
            return Abilities(packed=False, prefix_shared=False, softcaps=seen.softcaps, reason=without)
        packed, shared = (
            _equal(_states(policy, vocab_size, form, Seen()), expected) for form in ("packed", "prefix_shared")
        )
    finally:
        policy.train(training)
    failed = [form for form, holds in (("packed", packed), ("prefix_shared", shared)) if not holds]
    reason = f"{kind} has other hidden states in {' and '.join(failed)} rows than in padded ones" if failed else None
    return Abilities(packed=packed, prefix_shared=shared, softcaps=seen.softcaps, reason=reason)


def check_images(policy: Policy, encoded: Mapping[str, Tensor], images: BatchImages) -> None:
    """Compare the hidden states of a text with images with those of transformers alone; a collective of the world.

    Models whose image tokens attend to later ones, or that take in more than features and positions, differ here.

    Args:
        policy: The model with its weights.
        encoded: What the model's processor gives for the text.
        images: The images of the text, which is the prompt of pair 0.

    Raises:
        ModelError: where they differ.
    """
    check_class(policy.causal)
    training, device = policy.training, next(policy.parameters()).device
    tokens = encoded["input_ids"]
    identities = identities_of(0, 0, tokens.shape[1])[None]
    positions = torch.arange(tokens.shape[1]) if images.positions is None else images.positions.at(identities)
    image_tokens = ImageTokens(images, images.index_of(identities).to(device))
    policy.eval()
    try:
        expected = policy.own_hidden_states({name: value.to(device) for name, value in encoded.items()})
        found = policy.hidden_states(tokens.to(device), positions.to(device), UNPACKED, Seen(), image_tokens)
    finally:
        policy.train(training)
    if not _equal([found], [expected]):
        raise ModelError(
            f"{type(policy.causal).__name__.removeprefix('FSDP')} has other hidden states at the tokens of images than "
            "those of causal attention over features in their places: backend: fsdp trains it on text only"
        )


def _states(policy: Policy, vocab_size: int, form: str, seen: Seen) -> list[Tensor]:
    """Hidden states of both sequences of a pair."""
    device = next(policy.parameters()).device
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(vocab_size, (_PROMPT + _CHOSEN + _REJECTED,), generator=generator)
    prompt, chosen, rejected = torch.split(ids, [_PROMPT, _CHOSEN, _REJECTED])
    sequences = [torch.cat([prompt, chosen]), torch.cat([prompt, rejected])]
    lengths = [len(sequence) for sequence in sequences]
    if form == "padded":
        tokens = torch.nn.utils.rnn.pad_sequence(sequences, batch_first=True)
        positions, documents = torch.arange(lengths[0]), UNPACKED
    elif form == "packed":
        tokens = torch.cat(sequences)[None]
        positions, documents = torch.cat([torch.arange(length) for length in lengths]), Documents(tuple(lengths))
    else:
        tokens = torch.cat([sequences[0], rejected])[None]
        positions = torch.cat([torch.arange(lengths[0]), torch.arange(_PROMPT, lengths[1])])
        documents = Documents((lengths[0],), (Branch(0, _PROMPT, _REJECTED),))
    states = policy.hidden_states(tokens.to(device), positions.to(device), documents, seen)
    if form == "padded":
        return [states[row, :length] for row, length in enumerate(lengths)]
    if form == "packed":
        return list(torch.split(states[0], lengths))
    return [states[0, : lengths[0]], torch.cat([states[0, :_PROMPT], states[0, lengths[0] :]])]


def _equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    tolerance = _TOLERANCE[expected[0].dtype]
    return all(
        bool((ours - theirs).norm() <= tolerance * theirs.norm()) for ours, theirs in zip(found, expected, strict=True)
    )


def _check_pattern(mask: Callable[..., Tensor], seq_length: int, kind: str) -> None:
    """Check that a query sees all keys up to its own, or as many last ones as the query before it."""
    keys = torch.arange(seq_length)
    zero = torch.tensor(0)
    for query in {seq_length - 1, seq_length // 2}:
        own, before = (mask(zero, zero, torch.tensor(at), keys).expand(seq_length) for at in (query, query - 1))
        first, first_before = (int(seen.int().argmax()) for seen in (own, before))
        if not own.any():
            return  # no layer can use a mask that hides every key
        contiguous = bool((own == ((keys >= first) & (keys <= query))).all())
        if not contiguous or (first and first != first_before + 1):
            raise ModelError(
                f"{kind} has an attention pattern that is neither causal nor a sliding window at {seq_length} tokens, "
                "which backend: fsdp does not compute"
            )
