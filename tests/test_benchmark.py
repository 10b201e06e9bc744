"""scripts/benchmark.py: that it runs, what it makes of times, and what it says of the absent."""

import json

import benchmark
import pytest
from benchmark import Job, compare, main, rows, table
from click.testing import CliRunner


def job(contestant, **changes):
    fields = {"stage": "step", "dtype": "float32", "size": "tiny", "image_size": 64, "steps": 2}
    return Job(contestant, **{**fields, **changes})


TIMES = {"ours": [3.0, 1.0, 2.0], "slow": [6.0, 4.0, 4.0], "frail": [1.0], "stillborn": []}
TURNS = []


class FakeWorker:
    """One whose runs take what is written in TIMES, and which dies when there is no more."""

    def __init__(self, job, log):
        self.job, self.seconds, self.first, self.peak = job, [], 9.0, 100.0

    def warm_up(self):
        if not TIMES[self.job.contestant]:
            raise benchmark.CannotRun("is not installed")

    def run(self):
        TURNS.append(self.job.contestant)
        left = TIMES[self.job.contestant][len(self.seconds) :]
        if not left:
            raise benchmark.CannotRun("died")
        self.seconds.append(left[0])

    def stop(self):
        pass


@pytest.fixture
def compared(monkeypatch):
    monkeypatch.setattr(benchmark, "Worker", FakeWorker)
    TURNS.clear()
    return compare([job(name) for name in TIMES], rounds=3)


def test_contestants_take_turns(compared):
    assert [*("ours", "slow", "frail") * 2, *("ours", "slow")] == TURNS


def test_a_ratio_is_the_median_of_the_rounds(compared):
    figures = {row["contestant"]: row for row in rows(compared[0])}
    assert list(figures) == ["ours", "slow"]
    assert figures["ours"]["ratio"] == 1
    assert figures["slow"]["median"] == 4
    assert figures["slow"]["ratio"] == 0.5  # of 1/2, 1/4 and 1/2: not of the medians


def test_who_could_not_run_is_named(compared):
    assert [(one["contestant"], one["why"]) for one in compared[1]] == [
        ("stillborn", "is not installed"),
        ("frail", "died"),
    ]


def test_the_table_is_aligned(compared):
    lines = table([*rows(compared[0])]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "ours / it" in lines[0]
    assert " ".join(lines[2].split()) == "step float32 slow 4 4 6 0.50 100"


def run(*args):
    result = CliRunner().invoke(main, [*args])
    assert result.exit_code == 0, result.output
    return result.output


def test_it_runs(tmp_path):
    path = tmp_path / "figures.json"
    output = run(
        *("--size", "tiny", "--stage", "step", "--dtype", "bfloat16", "--rounds", "1"),
        *("--contestant", "ours", "--contestant", "keras-cv", "--json", str(path)),
    )
    assert "not run: keras-cv, step, bfloat16: has networks of one size, sd-1" in output
    report = json.loads(path.read_text())
    (row,) = report["rows"]
    assert (row["contestant"], row["ratio"], len(row["seconds"])) == ("ours", 1, 1)
    assert row["peak_mib"] is None or row["peak_mib"] > 50


@pytest.mark.parametrize("stage", ["text", "decode", "picture"])
def test_ours_has_every_stage(stage):
    benchmark.CONTESTANTS["ours"][0](job("ours", stage=stage))()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("dtype", benchmark.DTYPES)
@pytest.mark.parametrize("stage", benchmark.STAGES)
def test_peers_run(stage, dtype):
    for name in ("diffusers", "openvino")[: 1 if stage == "picture" else 2]:
        benchmark.CONTESTANTS[name][0](job(name, stage=stage, dtype=dtype))()
