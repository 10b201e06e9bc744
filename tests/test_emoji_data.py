"""The emoji index and its captions; nothing here is fetched or drawn."""

import numpy as np
import pytest
from emoji_data import VERSIONS, Row, article, captions, mirrored, read_index, svg

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


def test_captions_vary_a_tenth_name_no_style_and_a_tenth_nothing_else():
    rng = np.random.default_rng(0)
    drawn = [captions(APPLE, rng) for _ in range(1000)]
    assert set(drawn) == {
        "red apple",
        "noto style",
        "red apple, noto style",
        "a red apple, noto style",
        "noto emoji of red apple",
        "red apple, fruit, noto style",
    }
    assert 70 <= drawn.count("red apple") <= 130
    assert 70 <= drawn.count("noto style") <= 130


def test_mirrored_artworks_are_left_for_right_and_all_their_captions_say_so():
    images = np.arange(2 * 1 * 3 * 1).reshape(2, 1, 3, 1)
    rows, turned = mirrored([APPLE, APPLE], images)
    np.testing.assert_array_equal(turned[:, 0, :, 0], [[2, 1, 0], [5, 4, 3]])
    rng = np.random.default_rng(0)
    assert all(captions(row, rng).endswith(", mirrored") for row in 20 * rows)


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
