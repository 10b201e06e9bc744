import pytest
import synth
from tiny import FILES, TINY, write_folder


@pytest.fixture(scope="session")
def tiny_weights():
    """{part: {name: array}}, one for the whole run: change copies only."""
    return {part: synth.weights(f"tiny_{part}") for part in FILES}


@pytest.fixture
def tiny_folder(tmp_path, tiny_weights):
    return write_folder(tmp_path / "tiny", TINY, tiny_weights)
