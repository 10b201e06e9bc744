"""CLIP's byte-pair encoding (Radford et al. 2021, arXiv:2103.00020, section 2.4).

The clean-up, the splitting into words and the vocabulary are OpenAI's, so ids are theirs to the
last one. The merges beside this file are theirs too, unchanged (MIT licence).
"""

import gzip
import html
import json
from collections.abc import Iterable, Iterator, Sequence
from functools import cache, lru_cache
from importlib import resources
from itertools import pairwise
from typing import NamedTuple

import ftfy
import numpy as np
import regex

START = 49406
END = 49407

_WORD = regex.compile(
    r"<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|\p{L}+|\p{N}|[^\s\p{L}\p{N}]+",
    regex.IGNORECASE,
)
_END_OF_WORD = "</w>"
_SPECIAL = {"<|startoftext|>": START, "<|endoftext|>": END}


class Tokenizer:
    """Turns prompts into token ids, and ids back into text.

    The vocabulary is read when the first one is made, so that no call is slow; all share it.
    """

    def __init__(self):
        _vocabulary()

    def encode(self, text: str) -> list[int]:
        """Returns the ids of `text`, any number of them, without start, end and padding.

        Raises:
            TypeError: `text` is not a string.
        """
        if not isinstance(text, str):
            raise TypeError(f"a prompt must be a str, not {type(text).__name__}: {text!r}")
        return [token for word in _WORD.findall(_clean(text)) for token in _encode_word(word)]

    def tokenize(
        self,
        texts: Sequence[str],
        max_length: int = 77,
        pad_token: int = END,
        name: str = "prompt",
    ) -> np.ndarray:
        """Returns the encoder's input, (len(texts), max_length) int32: start, ids, end, padding.

        Args:
            texts: prompts of at most `max_length - 2` tokens each (75 for CLIP).
            pad_token: fills each row after its end token: 49407 for SD 1.x, 0 for SD 2.x.
            name: what errors call the texts: `name`, or `name[i]` of several.

        Raises:
            TypeError: `texts` is a bare string, or a prompt is not a string.
            ValueError: a prompt has a lone surrogate, as of a byte that was not UTF-8; or it is too
                long, with its length and the part that would be lost.
        """
        if isinstance(texts, str):
            raise TypeError(f"prompts must be a list of strings, not one string: {texts!r}")
        rows = np.full((len(texts), max_length), pad_token, dtype=np.int32)
        room = max_length - 2
        for row, (culprit, text) in zip(rows, named(texts, name), strict=True):
            ids = self.encode(text)
            if len(ids) > room:
                raise ValueError(
                    f"{culprit}: {len(ids)} tokens and only {room} fit; shorten it by "
                    f"{len(ids) - room}. This part would be lost: {self.decode(ids[room:])!r}"
                )
            row[: len(ids) + 2] = [START, *ids, END]
        return rows

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of `ids`: lower case, words apart by single spaces."""
        symbols = "".join(_vocabulary().symbols[i] for i in ids)
        bytes_of = {symbol: byte for byte, symbol in _byte_symbols().items()}
        words = symbols.split(_END_OF_WORD)
        text = b" ".join(bytes(bytes_of[symbol] for symbol in word) for word in words)
        return text.decode("utf-8", errors="replace").strip()


def vocabulary_files() -> dict[str, str]:
    """The vocabulary as transformers' CLIPTokenizer reads it: {file name: text}."""
    vocabulary = _vocabulary()
    merges = [" ".join(pair) for pair in vocabulary.ranks]
    return {
        "vocab.json": json.dumps(vocabulary.ids, ensure_ascii=False),
        "merges.txt": "\n".join(["#version: 0.2", *merges, ""]),
    }


def named(texts: Sequence[str], name: str) -> Iterator[tuple[str, str]]:
    """Pairs each text with what errors call it: `name`, or `name[i]` of several.

    Raises:
        ValueError: a text has a lone surrogate. `encode` would hide it, but nothing can store it.
    """
    for i, text in enumerate(texts):
        culprit = name if len(texts) == 1 else f"{name}[{i}]"
        if isinstance(text, str) and regex.search(r"\p{Cs}", text):
            raise ValueError(
                f"{culprit}: not valid text, {text!r} has a lone surrogate; write it in UTF-8"
            )
        yield culprit, text


class _Vocabulary(NamedTuple):
    symbols: list[str]  # by id
    ids: dict[str, int]
    ranks: dict[tuple[str, str], int]  # of each merge: the lower, the earlier it applies


@cache
def _byte_symbols() -> dict[int, str]:
    """Maps each byte to a printable character: itself, or one above U+0100 if it has none."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    symbols = {byte: chr(byte) for byte in printable}
    return symbols | {byte: chr(0x100 + i) for i, byte in enumerate(others)}


@cache
def _vocabulary() -> _Vocabulary:
    """Reads the vocabulary: 256 bytes, the same ending a word, the merges, two specials."""
    characters = list(_byte_symbols().values())
    file = resources.files(__package__) / "bpe_simple_vocab_16e6.txt.gz"
    lines = gzip.decompress(file.read_bytes()).decode("utf-8").split("\n")
    # The first line is a version; CLIP uses as many merges as fill its 49,408 ids.
    merges = [tuple(line.split()) for line in lines[1 : START - 2 * len(characters) + 1]]
    symbols = [
        *characters,
        *(character + _END_OF_WORD for character in characters),
        *(left + right for left, right in merges),
        *_SPECIAL,
    ]
    return _Vocabulary(
        symbols,
        {symbol: i for i, symbol in enumerate(symbols)},
        {pair: rank for rank, pair in enumerate(merges)},
    )


def _clean(text: str) -> str:
    """Repairs mis-decoded text, unescapes HTML (even if escaped twice), evens spaces, lowers."""
    text = html.unescape(html.unescape(ftfy.fix_text(text)))
    return " ".join(text.split()).lower()


@lru_cache(maxsize=2**16)
def _encode_word(word: str) -> tuple[int, ...]:
    """Merges the neighbouring pair of lowest rank, everywhere at once, until none has a rank."""
    if word in _SPECIAL:
        return (_SPECIAL[word],)
    vocabulary, of_byte = _vocabulary(), _byte_symbols()
    symbols = [of_byte[byte] for byte in word.encode("utf-8")]
    symbols[-1] += _END_OF_WORD
    while len(symbols) > 1:
        best = min(pairwise(symbols), key=lambda pair: vocabulary.ranks.get(pair, float("inf")))
        if best not in vocabulary.ranks:
            break
        symbols = _merge(symbols, best)
    return tuple(vocabulary.ids[symbol] for symbol in symbols)


def _merge(symbols: list[str], pair: tuple[str, str]) -> list[str]:
    """Joins every occurrence of `pair`, from the left."""
    merged: list[str] = []
    after_left = False  # whether the last symbol of `merged` is still free to be a left half
    for symbol in symbols:
        if after_left and (merged[-1], symbol) == pair:
            merged[-1] += symbol
            after_left = False
        else:
            merged.append(symbol)
            after_left = True
    return merged
