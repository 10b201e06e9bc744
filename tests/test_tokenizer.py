import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from stable_diffusion_tf.tokenizer import Tokenizer, bpe, vocabulary_files

GOLDENS = json.loads((Path(__file__).parent / "data" / "tokenizer.json").read_text("utf-8"))


@pytest.fixture
def tokenizer():
    return Tokenizer()


def test_ids_are_those_of_openai_clip(tokenizer):
    assert len(GOLDENS) == 341
    wrong = [text for text, ids in GOLDENS if tokenizer.encode(text) != ids]
    assert not wrong


def test_rows_have_start_ids_end_and_padding(tokenizer):
    rows = tokenizer.tokenize(["hello world", ""])
    assert rows.shape == (2, 77)
    assert rows.dtype == np.int32
    assert rows[0].tolist() == [49406, 3306, 1002, 49407] + [49407] * 73
    assert rows[1].tolist() == [49406] + [49407] * 76


def test_pad_token_starts_after_the_end_token(tokenizer):
    row = tokenizer.tokenize(["hello world"], max_length=6, pad_token=0)[0]
    assert row.tolist() == [49406, 3306, 1002, 49407, 0, 0]


def test_longest_prompt_fits_exactly(tokenizer):
    row = tokenizer.tokenize(["cat " * 75])[0]
    assert row[0] == 49406
    assert (row[1:76] == tokenizer.encode("cat")[0]).all()
    assert row[76] == 49407


def test_too_long_a_prompt_is_refused_with_the_part_that_would_be_lost(tokenizer):
    with pytest.raises(
        ValueError, match=r"^prompt: 78 tokens and only 75 fit.*by 3.*'wearing red boots'"
    ):
        tokenizer.tokenize(["cat " * 75 + "wearing red boots"])


@pytest.mark.parametrize(
    ("wrong", "message"), [("cat " * 76, "76 tokens"), ("caf\udce9", "not valid text")]
)
def test_of_several_texts_the_wrong_one_is_named(tokenizer, wrong, message):
    with pytest.raises(ValueError, match=rf"^captions\[1\]: {message}"):
        tokenizer.tokenize(["a cat", wrong, "a dog"], name="captions")


@pytest.mark.parametrize("prompt", [None, 7, b"a cat", ["a cat"]])
def test_a_prompt_that_is_not_text_is_refused(tokenizer, prompt):
    with pytest.raises(TypeError, match=f"must be a str, not {type(prompt).__name__}"):
        tokenizer.encode(prompt)


def test_a_bare_string_is_not_taken_for_a_list_of_prompts(tokenizer):
    with pytest.raises(TypeError, match="list of strings"):
        tokenizer.tokenize("a cat")


@pytest.mark.parametrize("text", ["", "a photo of a café, 東京 🚀!", "it's 42"])
def test_decoding_and_encoding_again_gives_the_same_ids(tokenizer, text):
    ids = tokenizer.encode(text)
    assert tokenizer.encode(tokenizer.decode(ids)) == ids


def test_the_vocabulary_is_read_once_with_the_first_tokenizer():
    code = (
        "from stable_diffusion_tf.tokenizer import bpe\n"
        "assert bpe._vocabulary.cache_info().misses == 0\n"
        "bpe.Tokenizer()\n"
        "assert bpe._vocabulary.cache_info().misses == 1\n"
        "bpe.Tokenizer().encode('a')\n"
        "assert bpe._vocabulary.cache_info().misses == 1\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # theirs
def test_rows_are_those_of_transformers(tokenizer, tmp_path):
    from transformers import CLIPTokenizer

    vocabulary = bpe._vocabulary()
    (tmp_path / "vocab.json").write_text(json.dumps(vocabulary.ids))
    merges = ["#version: 0.2", *map(" ".join, vocabulary.ranks)]
    (tmp_path / "merges.txt").write_text("\n".join(merges), encoding="utf-8")
    theirs = CLIPTokenizer(str(tmp_path / "vocab.json"), str(tmp_path / "merges.txt"))
    # Plain ones: theirs need not repair encodings and unescape HTML as OpenAI's and ours do.
    texts = [text for text, _ in GOLDENS if text.isascii() and text.isprintable()]
    texts = [text for text in texts if "&" not in text and len(tokenizer.encode(text)) <= 75]
    assert len(texts) > 150
    rows = theirs(texts, padding="max_length", max_length=77).input_ids
    assert tokenizer.tokenize(texts).tolist() == rows


def test_the_vocabulary_is_written_as_published():
    files = vocabulary_files()
    vocabulary, merges = json.loads(files["vocab.json"]), files["merges.txt"].split("\n")
    assert len(vocabulary) == 49408
    assert (vocabulary["!"], vocabulary["!</w>"], vocabulary["<|endoftext|>"]) == (0, 256, 49407)
    assert merges[:3] == ["#version: 0.2", "i n", "t h"]
    assert merges[-1] == ""
    assert len(merges) == 1 + 48894 + 1
