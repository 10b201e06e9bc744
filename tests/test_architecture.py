"""Who may import whom: each part of the package only from the rows above its own."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = "stable_diffusion_tf"
ROOT = Path(__file__).parent.parent / PACKAGE
BACKENDS = {"tensorflow", "jax", "torch", "openvino"}

ROWS = [
    {"files", "screen"},
    {"config", "images", "settings", "compile", "tokenizer", "preview", "samplers", "tiling"},
    {"arguments", "models", "diffusion"},
    {"checkpoints", "networks", "tasks"},
    {"pipeline"},
    {"training"},
    {"cli"},
    {"__main__"},
]
ROW = {part: row for row, parts in enumerate(ROWS) for part in parts}

# Beyond their rows: these know less than they could.
ALONE = {"config", "settings", "compile", "tokenizer", "preview", "samplers", "tiling"}
ALLOWED = {
    "arguments": {"images"},
    "models": {"config", "compile"},
    "diffusion": {"config", "compile"},
    "checkpoints": {"files", "screen", "config", "compile", "tokenizer", "models"},
    "networks": {"config", "images", "preview", "tiling", "diffusion"},
    "tasks": {"config", "images", "diffusion"},
}


def imports(source: str, module: str, is_package: bool) -> Iterator[str]:
    """Absolute names of all that `source`, the module named `module`, imports, wherever it does.

    `from a import b` gives `a.b`: whether b is a module does not matter to the rules.
    """
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                parents = module.split(".")
                kept = len(parents) - node.level + is_package
                base = ".".join([*parents[:kept], *filter(None, [base])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def violations(source: str, module: str, is_package: bool = False) -> list[str]:
    """What the module imports against the rules, as sentences."""
    part = module.split(".")[1]
    found = []
    for name in imports(source, module, is_package):
        top, *rest = name.split(".")
        if top in BACKENDS and part != "compile":
            found.append(f"{module} imports {name}: only compile knows backends")
        if top != PACKAGE or rest[:1] == [part]:
            continue
        if not rest or rest[0] not in ROW:
            found.append(f"{module} imports {name}, which is in no row")
        elif part in ALONE or rest[0] not in ALLOWED.get(part, ROW) or ROW[rest[0]] >= ROW[part]:
            found.append(f"{module} imports {name}")
    return found


def modules() -> Iterator[tuple[str, Path]]:
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).with_suffix("").parts
        if parts != ("__init__",):
            yield ".".join([PACKAGE, *parts]).removesuffix(".__init__"), path


@pytest.mark.parametrize(("module", "path"), list(modules()), ids=str)
def test_imports_only_from_rows_above(module: str, path: Path):
    assert module.split(".")[1] in ROW, f"{module} is in no row: give it one"
    assert violations(path.read_text(), module, path.stem == "__init__") == []


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("models.unet", "from ..diffusion import schedule"),
        ("models.unet", "from ..samplers.ddim import ddim"),
        ("models", "from ..pipeline import StableDiffusion"),
        ("samplers.ddim", "from ..config import ScheduleConfig"),
        ("samplers.ddim", "import stable_diffusion_tf.diffusion.schedule"),
        ("samplers.ddim", "def f():\n    from stable_diffusion_tf import images"),
        ("diffusion.schedule", "from ..models.unet import UNet"),
        ("checkpoints.load", "from ..diffusion.schedule import steps"),
        ("networks", "from .samplers import SAMPLERS"),
        ("config", "from . import images"),
        ("arguments", "from .config import ModelConfig"),
        ("training.loop", "from .. import cli"),
        ("training.loop", "import tensorflow as tf"),
        ("models.layers", "def f():\n    from jax import numpy"),
        ("pipeline", "import torch.nn"),
        ("pipeline", "from .nowhere import something"),
        ("pipeline", "import stable_diffusion_tf"),
    ],
)
def test_the_check_finds_what_is_forbidden(module: str, source: str):
    found = violations(source, f"{PACKAGE}.{module}", is_package=module == "models")
    assert len(found) == 1


@pytest.mark.parametrize(
    ("module", "source"),
    [
        ("models.unet", "from ..config import UNetConfig\nfrom .layers import conv"),
        ("models.unet", "import keras\nfrom keras import layers, ops"),
        ("images", "from .files import atomic_path"),
        ("compile", "import tensorflow as tf\nimport jax"),
        ("training.loop", "from ..pipeline import StableDiffusion"),
        ("cli", "from stable_diffusion_tf.images import save_png"),
    ],
)
def test_the_check_passes_what_is_allowed(module: str, source: str):
    assert violations(source, f"{PACKAGE}.{module}") == []


def test_importing_the_package_imports_no_backend():
    code = (
        f"import sys, {PACKAGE}\n"
        "loaded = {'keras', 'tensorflow', 'jax', 'torch'} & set(sys.modules)\n"
        "sys.exit(f'imported: {sorted(loaded)}' if loaded else 0)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT.parent, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
