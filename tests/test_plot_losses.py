"""scripts/plot_losses.py: the figures behind the curve, and that it falls where the loss does."""

import numpy as np
import pytest
from click.testing import CliRunner
from PIL import Image
from plot_losses import main, smoothed, ticks


def test_smoothing_keeps_a_line_and_does_not_bend_its_ends():
    assert smoothed(np.full(20, 3.0), span=9) == pytest.approx(3)
    assert smoothed(np.arange(20.0), span=3)[1:-1] == pytest.approx(np.arange(1, 19))
    assert len(smoothed(np.array([1.0, 3.0]), span=9)) == 2


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 4300, [0, 1000, 2000, 3000, 4000, 5000]),
        (0.235, 0.437, [0.2, 0.25, 0.3, 0.35, 0.4, 0.45]),
        (0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1]),
    ],
)
def test_ticks_are_round_and_hold_all(low, high, expected):
    assert ticks(low, high) == pytest.approx(expected)


def test_a_log_of_one_loss_is_no_curve(tmp_path):
    (tmp_path / "loss.csv").write_text("step,loss\n50,0.5\n")
    refused = CliRunner().invoke(main, [str(tmp_path / "loss.csv")])
    assert refused.exit_code == 1 and "has 1 losses, too few for a curve" in refused.output


def test_the_curve_falls_with_the_loss(tmp_path):
    log = tmp_path / "loss.csv"
    log.write_text("step,loss\n" + "".join(f"{50 * i},{1 - i / 40}\n" for i in range(1, 41)))
    result = CliRunner().invoke(main, [str(log), "--output", str(tmp_path)], catch_exceptions=False)
    assert result.exit_code == 0
    with Image.open(tmp_path / "losses.png") as picture:
        pixels = np.asarray(picture).astype(int)
    blue = pixels[..., 2] - pixels[..., 0] > 100
    heights = [np.flatnonzero(column).mean() for column in blue.T if column.any()]
    assert len(heights) > 400
    assert (np.diff(heights) > -1).all() and heights[-1] - heights[0] > 200
