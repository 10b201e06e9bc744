"""What the documents show, runs."""

import re
from pathlib import Path

import numpy as np

from stable_diffusion_tf import StableDiffusion
from stable_diffusion_tf.samplers import SAMPLERS

DOCS = Path(__file__).parents[1] / "docs"


def test_training_in_python(tmp_path, tiny_model, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "training.md").read_text(), re.DOTALL)
    shown = {'load("emoji")': f"load({str(tiny_model)!r})", "128, 128": "32, 32", "=10": "=2"}
    for old, new in shown.items():
        assert old in code
        code = code.replace(old, new)
    exec(code, names := {})
    settings = {"num_steps": 1, "seed": 0, "output": "latents", "progress": False}
    found, expected = (
        sd.generate("night", **settings)
        for sd in (
            StableDiffusion.from_pretrained("my-emoji"),
            StableDiffusion.from_models(names["models"]),
        )
    )
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_samplers_by_other_names():
    *_, table = (DOCS / "migrating.md").read_text().split("|---|---|---|\n")
    rows = [[cell.strip(" `") for cell in row.split("|")[1:-1]] for row in table.splitlines()]
    assert [(ours, diffusers.replace("`", ""), a1111) for ours, diffusers, a1111 in rows] == [
        (ours, row.diffusers, row.a1111) for ours, row in SAMPLERS.items()
    ]
