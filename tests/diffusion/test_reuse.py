"""Which calls run the whole network, and whose features the others are given."""

import pytest

from stable_diffusion_tf.diffusion.reuse import reusing


@pytest.mark.parametrize(
    ("every", "expected"),
    [
        (1, [0, 1, 2, 3, 4, 5, 6]),
        (2, [0, (1, 0), 2, (3, 2), 4, (5, 4), 6]),
        (3, [0, (1, 0), (2, 0), 3, (4, 3), (5, 3), 6]),
        (100, [0, *((call, 0) for call in range(1, 7))]),
    ],
)
def test_every_nth_call_is_whole_and_the_others_reuse_its_features(every, expected):
    denoise = reusing(lambda call: (call, call), lambda call, deep: (call, deep), every)
    assert [denoise(call) for call in range(7)] == expected


def test_denoisers_share_nothing():
    one, other = (reusing(lambda x: (x, x), lambda x, deep: (x, deep), 2) for _ in range(2))
    assert [one(1), other(2), one(3), other(4)] == [1, 2, (3, 1), (4, 2)]
