"""The syntax of prompts, and their chunks; what becomes of them is tested with the pipeline."""

import math

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from stable_diffusion_tf.tokenizer import Tokenizer, chunks, emphasised
from stable_diffusion_tf.tokenizer.prompts import parse

START, END = 49406, 49407
CAT, DOG = 2368, 1929


@pytest.mark.parametrize(
    ("prompt", "parts"),
    [
        ("", [[]]),
        ("a cat", [[("a cat", 1)]]),
        ("a (red) cat", [[("a ", 1), ("red", 1.1), (" cat", 1)]]),
        ("a [red] cat", [[("a ", 1), ("red", 1 / 1.1), (" cat", 1)]]),
        ("a (red:1.3) cat", [[("a ", 1), ("red", 1.3), (" cat", 1)]]),
        ("(a (red) [cat])", [[("a ", 1.1), ("red", 1.21), (" ", 1.1), ("cat", 1)]]),
        ("((red:2) cat:0.5)", [[("red", 1), (" cat", 0.5)]]),
        ("(((red)))", [[("red", 1.331)]]),
        ("(red)(cat)", [[("redcat", 1.1)]]),
        # Numbers of all kinds, and what is none
        ("(a: 2 )(b:+3)(c:-.5)(d:0.)", [[("a", 2), ("b", 3), ("c", -0.5), ("d", 0)]]),
        ("(a:1.2.3)", [[("a:1.2.3", 1.1)]]),
        ("(a:b:2)", [[("a:b", 2)]]),
        ("(at 16:9)", [[("at 16", 9)]]),
        ("[a:1.3]", [[("a:1.3", 1 / 1.1)]]),
        # Escapes; a backslash before anything else is one
        (r"a \(red\) \[cat\]", [[("a (red) [cat]", 1)]]),
        (r"(\(red\):2)", [[("(red)", 2)]]),
        (r"AC\DC \\ \\(b)", [[("AC\\DC \\ \\", 1), ("b", 1.1)]]),
        # Brackets without their other half
        ("a (red [cat", [[("a ", 1), ("red ", 1.1), ("cat", 1)]]),
        ("a) red] :2) 16:9", [[("a) red] :2) 16:9", 1)]]),
        ("(a [red) cat] x", [[("a ", 1.1), ("red", 1), (" cat", 1 / 1.1), (" x", 1)]]),
        ("()[]((:2))", [[]]),
        # BREAK, a word, in brackets as well
        ("a BREAK b", [[("a ", 1)], [(" b", 1)]]),
        ("(a BREAK b:2) BREAK", [[("a ", 2)], [(" b", 2), (" ", 1)], []]),
        ("BREAKFAST break _BREAK", [[("BREAKFAST break _BREAK", 1)]]),
    ],
)
def test_syntax(prompt, parts):
    assert [[text for text, _ in part] for part in parse(prompt)] == [
        [text for text, _ in part] for part in parts
    ]
    for found, expected in zip(parse(prompt), parts, strict=True):
        np.testing.assert_allclose([w for _, w in found], [w for _, w in expected], rtol=1e-12)


ODD = st.text(st.sampled_from("()[]\\:. 1-+\nabBREAK")) | st.lists(
    st.sampled_from(["(", ")", "[", "]", ":1.3)", "\\", "BREAK", "a cat", " ", ":", "\0", "🚀"])
    | st.text(max_size=3)
).map("".join)


@settings(max_examples=2000)
@given(ODD)
@example("(" * 1000)
@example("(a" * 1000 + ")" * 1000)
def test_every_text_is_a_prompt(prompt):
    parts = parse(prompt)
    assert all(text and weight > -math.inf for part in parts for text, weight in part)
    kept = "".join(text for part in parts for text, _ in part)
    letters = [c for c in prompt.replace("BREAK", "") if c not in "()[]\\:.+- 0123456789"]
    assert [c for c in kept.replace("BREAK", "") if c in letters] == letters  # no text is lost


@settings(max_examples=500)
@given(st.text(st.characters(blacklist_characters="()[]\\:", blacklist_categories=["Cs"])))
def test_text_without_brackets_is_itself(text):
    if "BREAK" not in text:
        assert parse(text) == [[(text, 1.0)] if text else []]


@settings(max_examples=200)
@given(ODD)
def test_chunks_hold_all_tokens_of_the_parts(prompt):
    """And a chunk is one whatever the prompt, or one clear error names it."""
    tokenizer = Tokenizer()
    try:
        (found,) = chunks(tokenizer, [prompt])
    except ValueError as error:
        assert str(error).startswith("prompt: ") and "weight" in str(error)
        return
    assert all(len(c.ids) == len(c.weights) == 77 and c.ids[0] == START for c in found)
    tokens = [i for c in found for i in c.ids[1 : c.ids.index(END)]]
    expected = [i for part in parse(prompt) for text, _ in part for i in tokenizer.encode(text)]
    assert tokens == expected


def ids(prompt, **settings):
    """Of each chunk: the ids up to the end token."""
    (found,) = chunks(Tokenizer(), [prompt], **settings)
    return [list(c.ids[: c.ids.index(END) + 1]) for c in found]


def test_a_plain_prompt_that_fits_is_one_chunk_as_ever():
    for prompt in ("", "hello world", "cat " * 75, "a photo of a café, 東京 🚀!"):
        ((chunk,),) = chunks(Tokenizer(), [prompt], pad_token=0)
        assert chunk.ids == tuple(Tokenizer().tokenize([prompt], pad_token=0)[0])
        assert chunk.weights == (1.0,) * 77


@pytest.mark.parametrize(
    ("prompt", "counts"),
    [
        ("cat " * 76, [75, 1]),
        ("cat " * 150, [75, 75]),
        ("cat " * 30 + "BREAK" + " cat" * 80, [30, 75, 5]),
        ("cat " * 75 + "BREAK cat", [75, 1]),
        ("cat BREAK", [1]),
        ("BREAK cat", [0, 1]),
        ("cat BREAK BREAK cat", [1, 0, 1]),
    ],
)
def test_long_prompts_are_read_in_chunks(prompt, counts):
    assert ids(prompt) == [[START, *[CAT] * count, END] for count in counts]


def test_tokens_have_their_texts_weight():
    ((chunk,),) = chunks(Tokenizer(), ["cat (dog cat:1.5)"], max_length=8, pad_token=0)
    assert chunk.ids == (START, CAT, DOG, CAT, END, 0, 0, 0)
    assert chunk.weights == (1, 1, 1.5, 1.5, 1, 1, 1, 1)


def test_without_emphasis_all_is_text():
    prompt = "(cat:1.3) BREAK [dog]"
    ((chunk,),) = chunks(Tokenizer(), [prompt], emphasis=False)
    assert chunk.ids == tuple(Tokenizer().tokenize([prompt])[0])
    assert chunk.weights == (1.0,) * 77


@pytest.mark.parametrize(
    ("prompts", "message"),
    [
        (["(cat:101)"], r"^negative: 'cat' has the weight 101; .* from -100 to 100.* \\\("),
        (["a", "(" * 60 + "cat"], r"^negative\[1\]: 'cat' has the weight 304.482;"),
        (["(a:" + "9" * 400 + ")"], "the weight inf;"),
        (["caf\udce9"], "^negative: not valid text"),
        (["a", "a <lora:foo:1> cat"], r"^negative\[1\]: '<lora:foo:1>' asks for a file of weights"),
    ],
)
def test_what_cannot_be_read_is_refused(prompts, message):
    with pytest.raises(ValueError, match=message):
        chunks(Tokenizer(), prompts, name="negative")


def test_emphasis_multiplies_states_and_restores_their_mean():
    states = np.float32([[1, 2], [3, 6]])
    # (1 + 2 + 6 + 12) / 4 = 21 / 4, and it was 12 / 4
    np.testing.assert_allclose(emphasised(states, (1.0, 2.0)), [[4 / 7, 8 / 7], [24 / 7, 48 / 7]])
    np.testing.assert_array_equal(emphasised(states, (1.0, 1.0)), states)
    assert emphasised(states, (1.0, 2.0)).dtype == np.float32
    np.testing.assert_array_equal(emphasised(0 * states, (1.0, 2.0)), 0 * states)


@pytest.mark.parametrize(
    ("emphatic", "factor"),
    [
        (-0.5, 2.5 / 2),  # the ratio of the means, 5.5 / 6 that of the magnitudes
        (-0.8, 2.2 / 1.4),  # that of the means, 1.8 times that of the magnitudes
        (-1.1, 6.1 / 7.2),  # 1.9 / 0.8 would be 2.8 times that
        (-6.0, 3.0 / 9.0),  # 0.52 times
        (-5.0, 10.0 / 15.0),  # 2 / 7 would be 0.43 times
        (-1.4, 6.4 / 7.8),  # 1.6 / 0.2 would be 8
        (-1.6, 6.6 / 8.2),  # 1.4 / -0.2 would be -7
        (-1.5, 6.5 / 8.0),  # 1.5 / 0
        (-3.0, 8 / 11),  # 0 / -3
    ],
)
def test_a_mean_of_almost_nothing_does_not_scale(emphatic, factor):
    states = np.float32([[4, -1], [emphatic, 0]])
    expected = factor * np.float64([[4, -1], [2 * emphatic, 0]])
    np.testing.assert_allclose(emphasised(states, (1.0, 2.0)), expected, rtol=1e-6)


def test_a_long_number_takes_no_longer_than_its_length():
    prompt = ":" + "1" * 200_000  # minutes, where digits could be divided in every way
    assert parse(prompt) == [[(prompt, 1)]]
