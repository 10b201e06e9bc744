"""The emoji index and its captions; nothing here is fetched or drawn."""

import re
from dataclasses import replace

import numpy as np
import pytest
from emoji_data import VERSIONS, Row, article, captions, mirrored, mirrors, read_index, svg

APPLE = Row(
    "noto", "noto", "@iconify-json/noto", "red-apple", "1f34e", "red apple", ("fruit",), "", "train"
)


def test_index_names_known_packages_and_splits():
    rows = read_index()
    assert {row.package for row in rows} == set(VERSIONS)
    assert {row.split for row in rows} == {"train", "unseen_pair", "unseen_concept"}
    assert len({row.key for row in rows}) == len(rows)


def test_held_out_concepts_are_held_out():
    rows = read_index()
    trained = {row.hexcode for row in rows if row.split == "train"}
    assert not trained & {row.hexcode for row in rows if row.split == "unseen_concept"}
    assert {row.hexcode for row in rows if row.split == "unseen_pair"} <= trained


def test_design_families_share_their_hold_out():
    trained = {(row.design, row.hexcode) for row in read_index() if row.split == "train"}
    held = {(row.design, row.hexcode) for row in read_index() if row.split != "train"}
    assert not trained & held


def test_captions_vary_and_a_tenth_name_no_style():
    rng = np.random.default_rng(0)
    drawn = [captions(APPLE, rng) for _ in range(1000)]
    assert set(drawn) == {
        "red apple",
        "red apple, noto style",
        "a red apple, noto style",
        "noto emoji of red apple",
        "red apple, fruit, noto style",
    }
    assert 70 <= drawn.count("red apple") <= 130


def test_no_picture_is_mirrored_whose_captions_name_a_side():
    rows = read_index()
    images = np.arange(2 * len(rows), dtype=np.uint32).reshape(-1, 1, 2, 1)
    moved = (mirrored(rows, images) != images).any(axis=(1, 2, 3))
    rng = np.random.default_rng(0)
    for row, flipped in zip(rows, moved, strict=True):
        sided = re.search(r"\b(left|right|clockwise|facing)", captions(row, rng), re.IGNORECASE)
        assert not (flipped and sided), row.label
    assert moved.mean() > 0.5


@pytest.mark.parametrize(
    ("label", "free"),
    [
        ("red apple", True),
        ("bright moon", True),
        ("facepalm", True),
        ("left-facing fist", False),
        ("person running: facing right", False),
        ("Leftwards hand", False),
        ("counterclockwise arrows button", False),
        ("eight-thirty", False),
        ("two o’clock", False),
        ("waxing gibbous moon", False),
        ("1st place medal", False),
    ],
)
def test_what_may_be_mirrored(label, free):
    row = replace(APPLE, label=label)
    assert mirrors(row) is free
    assert not mirrors(replace(row, tags=("fruit", "left")))
    assert not mirrors(replace(row, group="symbols"))


@pytest.mark.parametrize(
    "phrase",
    [
        "an umbrella",
        "a unicorn",
        "an hourglass done",
        "a house",
        "an SOS button",
        "an OK hand",
        "a euro banknote",
        "a one-piece swimsuit",
        "a NEW button",
    ],
)
def test_article(phrase):
    expected, noun = phrase.split(" ", 1)
    assert article(noun) == expected


@pytest.mark.parametrize(
    ("icon", "view_box"),
    [
        ({"body": ""}, "0.0 0.0 32 32"),
        ({"body": "", "height": 24}, "0.0 -4.0 32 32"),
        ({"body": "", "width": 40}, "0.0 -4.0 40 40"),
    ],
)
def test_view_box_is_padded_to_a_square(icon, view_box):
    icon_set = {"icons": {"a": icon}, "width": 32, "height": 32}
    assert f'viewBox="{view_box}"' in svg(icon_set, "a")
