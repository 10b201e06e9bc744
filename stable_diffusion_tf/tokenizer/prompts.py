"""Prompts of any length, with emphasis, in the syntax that AUTOMATIC1111's web UI established.

(x)         x counts 1.1 times as much; brackets multiply, ((x)) is 1.21 times
[x]         x counts 1.1 times less
(x:1.3)     x counts 1.3 times as much; any decimal number
\\( \\) \\[ \\]  the character itself; so is \\\\ a backslash
BREAK       what follows is read apart: its chunk is filled up, and another begun

A bracket that nothing closes holds to the end; one that closes nothing is a character like any
other. The text encoder has room for 75 tokens between start and end, so a prompt is read in chunks
of 75 (cut wherever they end), and the UNet attends to the states of all of them.
"""

import logging
import re
from collections.abc import Sequence
from itertools import chain, groupby
from operator import itemgetter
from typing import NamedTuple

import numpy as np

from stable_diffusion_tf.tokenizer.bpe import END, START, Tokenizer, named

EMPHASIS = 1.1
LARGEST = 100.0  # weight: more, or a deeper nest of brackets, is a slip

_SYNTAX = re.compile(
    r"""\\ (?P<escaped> [\\()\[\]] )
    | : \s* (?P<factor> [+-]? (?: [0-9]+ (?: \. [0-9]* )? | \.[0-9]+ ) ) \s* \)
    | [()\[\]]
    | (?P<break> \bBREAK\b )
    | (?: (?! \bBREAK\b ) [^\\()\[\]:] )+ | .""",
    re.VERBOSE | re.DOTALL,
)
_FILES = re.compile(r"<(?:lora|lyco|hypernet):[^<>]*>", re.IGNORECASE)
_FACTORS = {"(": EMPHASIS, "[": 1 / EMPHASIS}
_OPENING = {")": "(", "]": "["}

Part = list[tuple[str, float]]

log = logging.getLogger(__name__)


class Chunk(NamedTuple):
    """What the text encoder reads at once."""

    ids: tuple[int, ...]  # 77: start, up to 75 tokens, end, padding
    weights: tuple[float, ...]  # of each id; 1 but for tokens with emphasis


def parse(prompt: str) -> list[Part]:
    """Returns the parts of a prompt between BREAKs, each a list of (text, weight).

    Any text is a prompt. Neighbours in a part differ in weight.
    """
    symbols = list(_SYNTAX.finditer(prompt))
    factors, closing = _pairs(symbols)
    parts: list[Part] = [[]]
    weights = {bracket: [1.0] for bracket in _FACTORS}  # of each level that is open
    for i, symbol in enumerate(symbols):
        if i in factors:
            levels = weights[symbol[0]]
            levels.append(levels[-1] * factors[i])
        elif i in closing:
            weights[closing[i]].pop()
        elif symbol["break"]:
            parts.append([])
        else:
            weight = weights["("][-1] * weights["["][-1]
            parts[-1].append((symbol["escaped"] or symbol[0], weight))
    return [
        [("".join(text for text, _ in run), weight) for weight, run in groupby(part, itemgetter(1))]
        for part in parts
    ]


def _pairs(symbols: Sequence[re.Match]) -> tuple[dict[int, float], dict[int, str]]:
    """The factor of each bracket that opens, and which kind each one that closes has closed."""
    factors: dict[int, float] = {}
    closing: dict[int, str] = {}
    opened: dict[str, list[int]] = {bracket: [] for bracket in _FACTORS}
    for i, symbol in enumerate(symbols):
        bracket = "(" if symbol["factor"] else _OPENING.get(symbol[0])
        if symbol[0] in opened:
            opened[symbol[0]].append(i)
            factors[i] = _FACTORS[symbol[0]]
        elif bracket and opened[bracket]:
            start = opened[bracket].pop()
            closing[i] = bracket
            if symbol["factor"]:
                factors[start] = float(symbol["factor"])
    return factors, closing


def chunks(
    tokenizer: Tokenizer,
    prompts: Sequence[str],
    max_length: int = 77,
    pad_token: int = END,
    *,
    emphasis: bool = True,
    name: str = "prompt",
) -> list[list[Chunk]]:
    """Returns what the text encoder reads of each prompt, one chunk or more.

    Args:
        max_length: ids of a chunk, start and end among them.
        pad_token: fills each chunk after its end token: 49407 for SD 1.x, 0 for SD 2.x.
        emphasis: whether the syntax above has its meaning; without, all is text.
        name: what errors call the prompts: `name`, or `name[i]` of several.

    Raises:
        ValueError: a prompt has a lone surrogate, a weight beyond 100, or asks for a file of
            weights as that web UI's do, <lora:…>.
    """
    room = max_length - 2

    def chunk(tokens: list[tuple[int, float]]) -> Chunk:
        ids, weights = zip(*[(START, 1.0), *tokens, (END, 1.0)], strict=True)
        padding = room - len(tokens)
        return Chunk(ids + padding * (pad_token,), weights + padding * (1.0,))

    found = []
    for culprit, prompt in named(prompts, name):
        parts = [[(prompt, 1.0)]]
        if emphasis:
            _check_files(culprit, prompt)
            parts = parse(prompt)
        _check_weights(culprit, parts)
        *ended, last = (
            [(token, weight) for text, weight in part for token in tokenizer.encode(text)]
            for part in parts
        )
        if last or not ended:  # a BREAK that nothing follows begins no chunk
            ended.append(last)
        found.append(
            [
                chunk(tokens[i : i + room])
                for tokens in ended
                for i in range(0, max(len(tokens), 1), room)
            ]
        )
    return found


def _check_files(culprit: str, prompt: str) -> None:
    if found := _FILES.search(prompt):
        raise ValueError(
            f"{culprit}: {found[0]!r} asks for a file of weights, which cannot be read here; leave "
            "it out"
        )


def _check_weights(culprit: str, parts: Sequence[Part]) -> None:
    for text, weight in chain.from_iterable(parts):
        if not abs(weight) <= LARGEST:  # inf * 0 is neither
            raise ValueError(
                f"{culprit}: {text!r} has the weight {weight:g}; weights go from -{LARGEST:g} to "
                f"{LARGEST:g}. Brackets that mean themselves are written \\( \\) \\[ \\]"
            )


def filled_up(conditions: Sequence[list], empty: Chunk) -> list[list]:
    """Gives all lists of chunks as many as the longest has, with `empty` ones, and says so."""
    count = max(map(len, conditions))
    if count > 1:
        log.warning(
            "prompts are read in chunks of %d tokens, here %d; shorter prompts and negative "
            "prompts are filled up with empty ones",
            len(empty.ids) - 2,
            count,
        )
    return [[*condition, *[empty] * (count - len(condition))] for condition in conditions]


def emphasised(states: np.ndarray, weights: Sequence[float]) -> np.ndarray:
    """Returns a chunk's states (77, width), each times its weight, with the mean that they had.

    Without the latter, emphasis on one word would also make all the others louder or softer. Where
    an encoder's mean is almost 0 its ratio can be anything, -15 too, and says nothing of loudness:
    one that is not near the ratio of the mean magnitudes gives way to that.
    """
    weighted = states * np.float32(weights)[:, None]
    if not weighted.any():
        return weighted
    before, after = (np.mean(x, dtype=np.float64) for x in (states, weighted))
    mean = before / after if after else np.inf
    before, after = (np.mean(np.abs(x), dtype=np.float64) for x in (states, weighted))
    magnitude = before / after
    near = magnitude / 2 <= mean <= magnitude * 2
    return weighted * np.float32(mean if near else magnitude)
