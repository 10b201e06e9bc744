"""scripts/benchmark.py: that it runs, what it makes of times, and what it says of the absent."""

import json
import os
from types import SimpleNamespace

import benchmark
import numpy as np
import pytest
from benchmark import Job, compare, main, rows, table
from click.testing import CliRunner


def job(contestant, **changes):
    task = {"stage": "step", "dtype": "float32", "batch": 2}
    model = {"size": "tiny", "image_size": 64, "steps": 2}
    return Job(contestant, **{**task, **model, **changes})


def built(contestant, **changes):
    build, _ = benchmark.CONTESTANTS[contestant]
    return build(job(contestant, **changes))


TIMES = {"ours": [3.0, 1.0, 2.0], "slow": [6.0, 4.0, 4.0], "frail": [1.0], "stillborn": []}
TURNS = []


class FakeWorker:
    """One whose runs take what is written in TIMES, and which dies when there is no more."""

    def __init__(self, job, log):
        self.job, self.seconds = job, []
        self.first, self.device, self.peak = 9.0, "cpu", 100.0

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


def test_what_it_gives_a_second_counts_the_batch(compared):
    assert [row["per_second"] for row in rows(compared[0])] == [2 / 2, 2 / 4]


def test_who_could_not_run_is_named(compared):
    assert [(one["contestant"], one["why"]) for one in compared[1]] == [
        ("stillborn", "is not installed"),
        ("frail", "died"),
    ]


def test_the_table_is_aligned(compared):
    lines = table([*rows(compared[0])]).splitlines()
    assert len({len(line) for line in lines}) == 1
    assert "ours / it" in lines[0]
    assert " ".join(lines[2].split()) == "step float32 2 slow cpu 4 4 6 0.5 0.50 100"


def run(*args):
    result = CliRunner().invoke(main, [*args])
    assert result.exit_code == 0, result.output
    return result.output


def test_it_runs(tmp_path):
    path = tmp_path / "figures.json"
    output = run(
        *("--size", "tiny", "--stage", "step", "--dtype", "bfloat16", "--batch", "2"),
        *("--rounds", "1", "--contestant", "ours", "--contestant", "keras-cv"),
        *("--json", str(path)),
    )
    assert "not run: keras-cv, step, bfloat16, batch 2: has networks of one size, sd-1" in output
    report = json.loads(path.read_text())
    (row,) = report["rows"]
    assert (row["contestant"], row["ratio"], len(row["seconds"])) == ("ours", 1, 1)
    assert row["per_second"] == 2 / row["median"]
    assert row["device"] and report["processor"] and report["keras_backend"]
    assert row["peak_mib"] is None or row["peak_mib"] > 50


def test_each_batch_is_a_comparison_but_text_has_one_prompt(monkeypatch):
    compared = []

    def compare(jobs, rounds):
        compared.extend((job.stage, job.batch) for job in jobs)
        return [], []

    monkeypatch.setattr(benchmark, "compare", compare)
    run(
        *("--stage", "text", "--stage", "step", "--dtype", "bfloat16"),
        *("--batch", "1", "--batch", "8", "--contestant", "ours"),
    )
    assert compared == [("text", 1), ("step", 1), ("step", 8)]


def test_without_tensorflow_who_needs_it_is_named(tmp_path, monkeypatch):
    absent = tmp_path / "tensorflow.py"
    absent.write_text("raise ImportError('TensorFlow is not here')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path), prepend=os.pathsep)
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    names = "ours", "ours-openvino", "keras-cv"
    output = run(
        *("--size", "tiny", "--stage", "text", "--dtype", "float32", "--rounds", "1"),
        *(word for name in names for word in ("--contestant", name)),
    )
    assert [line.split()[3] for line in output.splitlines()[1:2]] == ["ours"]
    not_run = [line for line in output.splitlines() if line.startswith("not run")]
    assert "set KERAS_BACKEND to tensorflow" in not_run[0]
    assert "keras-cv, text, float32, batch 1: needs TensorFlow" in not_run[1]


GPU_BYTES = 3 * benchmark.MIB


def test_jaxs_gpu_is_named_and_its_memory_read(monkeypatch):
    gpu = SimpleNamespace(
        platform="gpu",
        device_kind="NVIDIA H100",
        memory_stats=lambda: {"peak_bytes_in_use": GPU_BYTES},
    )
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setattr("jax.devices", lambda: [gpu])
    device = benchmark.keras_device()
    assert (device.name, device.peak_memory()) == ("NVIDIA H100", 3)


def test_tensorflows_gpu_is_named_and_its_memory_read(monkeypatch):
    monkeypatch.setenv("KERAS_BACKEND", "tensorflow")
    config = "tensorflow.config"
    monkeypatch.setattr(f"{config}.list_physical_devices", lambda kind: [kind])
    monkeypatch.setattr(
        f"{config}.experimental.get_device_details", lambda gpu: {"device_name": "NVIDIA H100"}
    )
    monkeypatch.setattr(f"{config}.experimental.get_memory_info", lambda name: {"peak": GPU_BYTES})
    device = benchmark.keras_device()
    assert (device.name, device.peak_memory()) == ("NVIDIA H100", 3)


@pytest.mark.parity
def test_torchs_gpu_is_named_and_its_memory_read(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_name", lambda: "NVIDIA H100")
    monkeypatch.setattr("torch.cuda.max_memory_allocated", lambda: GPU_BYTES)
    device = benchmark.torch_device()
    assert (device.name, device.peak_memory()) == ("NVIDIA H100", 3)


SHAPES = {
    "text": (1, 77, 32),
    "step": (2, 8, 8, 4),
    "decode": (2, 64, 64, 3),
    "picture": (2, 64, 64, 3),
}


@pytest.mark.parametrize("stage", benchmark.STAGES)
def test_ours_has_every_stage(stage):
    assert built("ours", stage=stage)().shape == SHAPES[stage]


def theirs(contestant, **changes):
    """What a peer computes, with the same weights each time."""
    import torch

    torch.manual_seed(0)
    result = built(contestant, **changes)()
    return result.images if changes["stage"] == "picture" else result.float().numpy()


PEER_SHAPES = {
    "text": (1, 77, 32),
    "step": (4, 4, 8, 8),  # with the prompt and without; channels first
    "decode": (2, 3, 64, 64),
    "picture": (2, 64, 64, 3),
}


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("dtype", benchmark.DTYPES)
@pytest.mark.parametrize("stage", benchmark.STAGES)
def test_peers_run(stage, dtype):
    assert theirs("diffusers", stage=stage, dtype=dtype).shape == PEER_SHAPES[stage]
    if stage != "picture":
        built("openvino", stage=stage, dtype=dtype)()


@pytest.mark.parity
@pytest.mark.filterwarnings("ignore")  # theirs
@pytest.mark.parametrize("stage", ["step", "picture"])
def test_compiled_peers_compute_the_same(stage):
    eager, compiled = (theirs(name, stage=stage) for name in ("diffusers", "diffusers-compiled"))
    np.testing.assert_allclose(compiled, eager, atol=1e-4)


@pytest.mark.parity
def test_without_a_compiler_it_is_said_in_one_line(tmp_path, monkeypatch):
    monkeypatch.setenv("CXX", str(tmp_path / "absent"))
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    output = run(
        *("--size", "tiny", "--stage", "decode", "--dtype", "float32"),
        *("--contestant", "diffusers-compiled"),
    )
    (line,) = output.splitlines()
    assert line.startswith("not run: diffusers-compiled, decode, float32, batch 1: ")
    assert "No working C++ compiler" in line
