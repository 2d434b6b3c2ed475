"""Tokens as text with their log-probabilities, and the HTML that colours them."""

from __future__ import annotations

import html
import math
import re
from collections.abc import Callable, Iterator, Sequence
from itertools import groupby

from mindspeed_simpo.studies.analysis.scores import Piece

LEVELS = (0.5, 0.1, 0.01, 1e-3, 1e-4)
"""Probabilities at which the colour of a token changes; the first level has no colour."""

STYLE = """
.tokens { white-space: pre-wrap; margin: .25rem 0 1rem; line-height: 1.75; }
.tokens i, .scale i { font-style: normal; border-radius: 2px; padding: .1em 0; }
.scale i { padding: .1em .5em; margin-right: .35em; white-space: nowrap; display: inline-block; }
.tokens u { text-decoration: none; color: var(--soft); }
.l1 { background: #e6a84a38; } .l2 { background: #e69b3070; } .l3 { background: #e68a1ea8; }
.l4 { background: #dd6f0ed9; } .l5 { background: #b8430a; color: #fff; }
@media (prefers-color-scheme: dark) {
  .l1 { background: #e6a84a22; } .l2 { background: #e69b3044; } .l3 { background: #e68a1e66; }
  .l4 { background: #dd6f0e99; } .l5 { background: #c2410c; }
}
.tokens .n::before { content: "\\21b5"; opacity: .6; }
.pair { border: 1px solid var(--line); border-radius: 6px; padding: 0 .75rem; margin: .5rem 0; }
.pair h4 { font-size: .85rem; margin: .5rem 0 .1rem; color: var(--soft); font-weight: 600; }
.pair pre { font: inherit; font-size: .95rem; margin: 0 0 .5rem; max-height: 18rem; overflow-y: auto; }
"""

_REPLACEMENT = "\ufffd"
"""What a decoder puts in the place of bytes that are no character, or no whole one yet."""
_REPEATED = re.compile(r"(<[^<>\s]{1,40}>)\1{7,}")


def pieces_of(
    decode: Callable[[Sequence[int]], str], ids: Sequence[int], logprobs: Sequence[float | None]
) -> list[Piece]:
    """The tokens of an answer as pieces of text: one token each, several where one alone is no whole character.

    Args:
        decode: Text of some token ids, special tokens included.
        ids: The answer's tokens.
        logprobs: Log-probability of each token, nats; None for tokens that are not scored.
    """
    pieces, start, shown = [], 0, 0
    for stop in range(1, len(ids) + 1):
        # a token's text may depend on the one before, as a leading space does
        before = decode(ids[start:shown])
        text = decode(ids[start:stop])
        if text.endswith(_REPLACEMENT) and stop < len(ids) and not _stands(text, decode(ids[start : stop + 1])):
            continue
        new = text[len(before) :] if text.startswith(before) else decode(ids[shown:stop])
        scored = tuple(value for value in logprobs[shown:stop] if value is not None)
        pieces.append(Piece(new, scored))
        start, shown = shown, stop
    return pieces


def _stands(text: str, longer: str) -> bool:
    """Whether the replacement at the end of a text is there to stay when the next token follows."""
    return longer.startswith(text) and len(longer) > len(text)


def without_repeats(text: str) -> str:
    """The text with a run of eight or more equal tokens, such as the places of an image, as one token and a number."""
    return _REPEATED.sub(lambda run: f"{run[1]} ×{len(run[0]) // len(run[1])}", text)


def coloured(pieces: Sequence[Piece]) -> str:
    """HTML of an answer; each scored token is coloured by its log-probability, which its tooltip says."""
    return f'<p class="tokens" dir="auto">{"".join(_spans(pieces))}</p>'


def scale() -> str:
    """HTML that explains the colours."""
    bounds = [f"p ≥ {LEVELS[0]:g}", *(f"p ≥ {level:g}" for level in LEVELS[1:]), f"p < {LEVELS[-1]:g}"]
    words = "".join(f'<i class="l{level}">{html.escape(text)}</i>' for level, text in enumerate(bounds))
    return f'<p class="scale">Probability of a token: {words}</p>'


def level_of(logprob: float) -> int:
    """Number of the token's colour, from 0 (likely) to ``len(LEVELS)``."""
    return sum(logprob < math.log(level) for level in LEVELS)


def _spans(pieces: Sequence[Piece]) -> Iterator[str]:
    for unscored, run in groupby(pieces, key=lambda piece: not piece.logprobs):
        if unscored:
            yield f"<u>{html.escape(without_repeats(''.join(piece.text for piece in run)))}</u>"
            continue
        for piece in run:
            newline = " n" if piece.text and not piece.text.strip(" \n") and "\n" in piece.text else ""
            values = " ".join(f"{value:.2f}" for value in piece.logprobs)
            # the least likely of the tokens that are one character
            level = level_of(min(piece.logprobs))
            yield f'<i class="l{level}{newline}" title="{values}">{html.escape(piece.text)}</i>'
