from dataclasses import replace

import pytest
import synth
from click.testing import CliRunner
from hypothesis import settings
from tiny import FILES, TINY, write_folder

from stable_diffusion_tf.checkpoints import h5_files, h5_structure
from stable_diffusion_tf.cli import main

# The same examples on every machine and in every run, however slow.
settings.register_profile("repeatable", deadline=None, derandomize=True, database=None)
settings.load_profile("repeatable")


@pytest.fixture(scope="session")
def tiny_weights():
    """{part: {name: array}}, one for the whole run: change copies only."""
    return {part: synth.weights(f"tiny_{part}") for part in FILES}


@pytest.fixture
def tiny_folder(tmp_path, tiny_weights):
    """A folder of one's own, to change."""
    return write_folder(tmp_path / "tiny", TINY, tiny_weights)


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory, tiny_weights):
    """The same folder, one for the whole run: to open only."""
    return write_folder(tmp_path_factory.mktemp("models") / "tiny", TINY, tiny_weights)


@pytest.fixture(scope="session")
def tiny_inpainting(tmp_path_factory, tiny_weights):
    """The same whose UNet sees the mask and the masked picture."""
    name, shape = "conv_in.weight", (32, 9, 3, 3)
    unet = {**tiny_weights["unet"], name: synth.weight(name, shape)}
    config = replace(TINY, unet=replace(TINY.unet, in_channels=9))
    folder = tmp_path_factory.mktemp("models") / "inpainting"
    return write_folder(folder, config, {**tiny_weights, "unet": unet})


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """A model hub with nothing on it yet, an empty cache, and no patience."""
    import fake_hub

    with fake_hub.FakeHub() as hub:
        fake_hub.connect(hub, tmp_path, monkeypatch)
        yield hub


@pytest.fixture
def sdtf(tmp_path, tiny_model, monkeypatch):
    """Runs `sdtf generate` in an empty folder, with a tiny model."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments, weights=tiny_model):
        chosen = [] if weights is None else ["--weights", str(weights)]
        return CliRunner().invoke(main, ["generate", *chosen, *arguments])

    return run


@pytest.fixture
def h5_at_once(monkeypatch):
    """Reads h5 files' structure in this process, which is faster; the files are not damaged."""

    def read_structure(path):
        try:
            return {"weights": h5_structure.structure(str(path))}
        except Exception as error:
            raise ValueError(str(error)) from None

    monkeypatch.setattr(h5_files, "read_structure", read_structure)
