"""What the documents show, runs."""

import re
from pathlib import Path

import numpy as np

from stable_diffusion_tf import StableDiffusion

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
