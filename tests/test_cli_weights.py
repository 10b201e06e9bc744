"""`sdtf weights`: models on a hub. Needs no backend."""

import hashlib
import re
import subprocess
import sys
from dataclasses import replace

import pytest
from click.testing import CliRunner

from stable_diffusion_tf.checkpoints.catalog import PRESETS
from stable_diffusion_tf.checkpoints.hub import HubFile, cached
from stable_diffusion_tf.checkpoints.hub_folder import HubFolder
from stable_diffusion_tf.cli import main

REPO = "someone/some-model"


@pytest.fixture
def preset(hub, monkeypatch):
    """A preset of two files on the hub, one of them pinned."""
    contents = {"a.h5": b"some weights", "b.h5": b"other weights"}
    hub.repositories[REPO] = contents
    files = {
        "unet": HubFile(REPO, "a.h5", hashlib.sha256(contents["a.h5"]).hexdigest(), license="RAIL"),
        "encoder": HubFile(REPO, "b.h5", license="RAIL"),
    }
    monkeypatch.setitem(PRESETS, "some", replace(PRESETS["emoji"], files=files))
    return files


def sdtf(*arguments):
    return CliRunner().invoke(main, ["weights", *arguments])


def test_list_says_what_is_known_and_here(preset):
    assert re.search(r"^some\n.*\n    pinned, 0 of 2 files here;", sdtf("list").stdout, re.M)
    sdtf("download", "some")
    listed = sdtf("list").stdout
    assert re.search(r"^some\n.*\n    pinned, 2 of 2 files here;", listed, re.M)
    assert re.search(r"^emoji\n.*\n    in the package; Apache-2.0$", listed, re.M)
    assert "stable-diffusion-v1-5/stable-diffusion-v1-5\n" in listed


def test_download_then_where_then_verify(preset):
    for command in ("where", "verify"):
        result = sdtf(command, "some")
        assert result.exit_code == 2
        assert result.stderr == (
            f"Error: Not downloaded: {REPO}/a.h5, {REPO}/b.h5. Run `sdtf weights download some`.\n"
        )

    downloaded = sdtf("download", "some")
    assert downloaded.exit_code == 0, downloaded.stderr
    assert "Their licence: RAIL" in downloaded.stderr
    paths = [str(cached(file)) for file in preset.values()]
    assert downloaded.stdout.split() == sdtf("where", "some").stdout.split() == paths
    verified = sdtf("verify", "some")
    assert verified.exit_code == 0
    assert verified.stdout == f"good: {paths[0]}\ngood (unpinned): {paths[1]}\n"

    cached(preset["unet"]).resolve().write_bytes(b"some weightz")
    verified = sdtf("verify", "some")
    assert verified.exit_code == 2
    assert verified.stdout.startswith(f"DAMAGED: {paths[0]}\ngood")
    assert "1 damaged; delete" in verified.stderr


def test_a_repository_that_is_not_whole_is_neither_found_nor_good(hub, tiny_model):
    paths = [path for path in tiny_model.rglob("*") if path.is_file()]
    files = {path.relative_to(tiny_model).as_posix(): path.read_bytes() for path in paths}
    hub.repositories[REPO] = files
    assert sdtf("download", REPO).exit_code == 0
    for command in ("where", "verify"):
        result = sdtf(command, REPO)
        assert (result.exit_code, len(result.stdout.splitlines())) == (0, len(files))

    unet = "unet/diffusion_pytorch_model.safetensors"
    cached(HubFile(REPO, unet)).resolve().unlink()
    for command in ("where", "verify"):
        result = sdtf(command, REPO)
        assert (result.exit_code, result.stdout) == (2, "")
        assert result.stderr == (
            f"Error: Not downloaded: {REPO}/{unet}. Run `sdtf weights download {REPO}`.\n"
        )


def test_a_repository_that_was_taken_with_a_variant_is_whole(hub, tiny_model):
    paths = [path for path in tiny_model.rglob("*") if path.is_file()]
    files = {path.relative_to(tiny_model).as_posix(): path.read_bytes() for path in paths}
    unet = "unet/diffusion_pytorch_model"
    hub.repositories[REPO] = {**files, f"{unet}.non_ema.safetensors": files[f"{unet}.safetensors"]}
    HubFolder(REPO, "non_ema").download()
    result = sdtf("verify", REPO)
    assert (result.exit_code, result.stderr) == (0, "")
    assert f"{unet}.non_ema.safetensors" in result.stdout


def test_what_goes_wrong_is_said_in_one_line(hub):
    result = sdtf("download", "no/such-model")
    assert result.exit_code == 2
    assert result.stdout == ""
    assert result.stderr.startswith("Error: no/such-model cannot be fetched: there is no such repo")
    assert result.stderr.count("\n") == 1


def test_neither_help_nor_the_package_import_what_is_slow():
    code = (
        "import sys\n"
        "import stable_diffusion_tf\n"
        "from stable_diffusion_tf.cli import main\n"
        "main(['--help'], standalone_mode=False)\n"
        "slow = {'keras', 'tensorflow', 'huggingface_hub', 'h5py'} & set(sys.modules)\n"
        "sys.exit(f'imported: {slow}' if slow else 0)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for command in ("generate", "convert", "weights"):
        assert command in result.stdout
