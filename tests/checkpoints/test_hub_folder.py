"""Models on a hub: presets, repositories and single files, fetched part by part."""

import json
from dataclasses import replace

import pytest
from tiny import FILES, TINY

from stable_diffusion_tf.checkpoints import catalog
from stable_diffusion_tf.checkpoints.catalog import (
    PRESETS,
    download,
    open_checkpoint,
    stored_files,
)
from stable_diffusion_tf.checkpoints.diffusers import FILES as PARTS
from stable_diffusion_tf.checkpoints.hub import DownloadError, HubFile, cached
from stable_diffusion_tf.checkpoints.hub_folder import HubFolder
from stable_diffusion_tf.checkpoints.readers import CheckpointError

REPO = "someone/tiny"


@pytest.fixture
def tiny_repo(hub, tiny_model):
    """The tiny model on the hub, with a file beside it that nobody needs."""
    paths = [path for path in tiny_model.rglob("*") if path.is_file()]
    files = {path.relative_to(tiny_model).as_posix(): path.read_bytes() for path in paths}
    hub.repositories[REPO] = {**files, "safety_checker/model.safetensors": b"not needed"}
    return hub.repositories[REPO]


def test_a_repository_is_fetched_part_by_part(hub, tiny_repo):
    checkpoint = open_checkpoint(REPO)
    assert checkpoint.config == TINY
    assert all(name.endswith(".json") for name in hub.downloads())

    before = len(hub.downloads())
    for part in ("unet", "encoder", "decoder"):
        path = HubFolder(REPO).fetch(part)
        assert path.read_bytes() == tiny_repo[path.relative_to(path.parents[1]).as_posix()]
    assert hub.downloads()[before:] == [FILES["unet"], FILES["vae"]]

    assert [path.name for path in download(REPO)] == [name.split("/")[1] for name in FILES.values()]
    assert sorted(hub.downloads()) == sorted({*tiny_repo} - {"safety_checker/model.safetensors"})
    assert {file.name for file in stored_files(REPO)} == {*hub.downloads()}


def test_a_repository_s_name_is_its_model_s_unless_it_says_another(hub, tiny_repo):
    index = json.loads(tiny_repo["model_index.json"])
    del index["_stable_diffusion_tf"]
    tiny_repo["model_index.json"] = json.dumps(index).encode()
    assert open_checkpoint(REPO).config.name == REPO


def test_a_variant_of_a_repository_is_fetched(hub, tiny_repo):
    with pytest.raises(FileNotFoundError, match=r"it lacks text_encoder/model\.fp16\.safetensors"):
        open_checkpoint(REPO, variant="fp16")
    half = {name: name.replace(".safetensors", ".fp16.safetensors") for name in FILES.values()}
    tiny_repo[half[FILES["unet"]]] = tiny_repo[FILES["unet"]]
    assert open_checkpoint(REPO, variant="fp16").config == TINY
    folder = HubFolder(REPO, "fp16")
    assert folder.fetch("unet").name == "diffusion_pytorch_model.fp16.safetensors"
    assert folder.fetch("decoder").name == "diffusion_pytorch_model.safetensors"
    tiny_repo |= {half[name]: tiny_repo[name] for name in half}
    folder = HubFolder(REPO, "fp16")
    assert folder.fetch("decoder").name == "diffusion_pytorch_model.fp16.safetensors"


def test_a_licence_cannot_steer_the_terminal(hub, tiny_repo, capsys):
    hub.license = "x\x1b[2J\x07"
    HubFolder(REPO).fetch("unet")
    assert r"Their licence: x\x1b[2J\x07. Read" in capsys.readouterr().err


def test_shards_are_fetched_with_their_index(hub, tiny_repo):
    tensors = ["a.safetensors", "b.safetensors"]
    tiny_repo |= {f"unet/{name}": name.encode() for name in tensors}
    index = FILES["unet"] + ".index.json"
    tiny_repo[index] = json.dumps({"weight_map": dict(zip("xy", tensors, strict=True))}).encode()
    del tiny_repo[FILES["unet"]]
    folder = HubFolder(REPO)
    before = len(hub.downloads())
    folder.fetch("unet")
    assert hub.downloads()[before:] == [index, "unet/a.safetensors", "unet/b.safetensors"]


def test_what_a_model_lacks_in_the_cache_is_known_without_a_network(hub, tiny_repo):
    def lacking():
        return {file.name for file in stored_files(REPO) if cached(file) is None}

    index, shard = FILES["unet"] + ".index.json", "unet/a.safetensors"
    tiny_repo[index] = json.dumps({"weight_map": {"x": "a.safetensors"}}).encode()
    tiny_repo[shard] = tiny_repo.pop(FILES["unet"])
    open_checkpoint(REPO)
    asked = len(hub.requests)
    assert lacking() == {*FILES.values()}
    assert len(hub.requests) == asked

    download(REPO)
    assert lacking() == set()
    for name in (shard, "vae/config.json"):  # the link remains
        cached(HubFile(REPO, name)).resolve().unlink()
        assert lacking() == {name}
        download(REPO)
    cached(HubFile(REPO, index)).resolve().unlink()
    assert lacking() == {index}


def test_without_a_network_what_was_fetched_opens(hub, tiny_repo):
    hub.status = 503
    with pytest.raises(DownloadError, match=r"someone/tiny cannot be fetched: .* \(503\)"):
        open_checkpoint(REPO)
    hub.status = 200
    HubFolder(REPO).fetch("unet")
    hub.status = 503
    with pytest.raises(DownloadError, match=r"\(503\)"):
        open_checkpoint(REPO)  # text encoder and autoencoder are not there
    hub.status = 200
    download(REPO)
    hub.status = 503
    assert open_checkpoint(REPO).config == TINY


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"unet/config.json": None}, FileNotFoundError, "it lacks unet/config.json"),
        ({FILES["vae"]: None}, FileNotFoundError, f"it lacks {FILES['vae']}"),
        ({"unet/config.json": b"<html>"}, CheckpointError, "not the JSON it should be"),
        (
            {"model_index.json": None, "v1.ckpt": b""},
            CheckpointError,
            "Name one of its files: .*someone/tiny/v1.ckpt",
        ),
    ],
)
def test_a_repository_that_is_no_model_is_refused_before_any_weights(
    hub, tiny_repo, change, error, message
):
    tiny_repo |= change
    for name in [name for name, content in tiny_repo.items() if content is None]:
        del tiny_repo[name]
    with pytest.raises(error, match=message):
        open_checkpoint(REPO)
    assert all(name.endswith(".json") for name in hub.downloads())


def test_a_path_that_is_mistyped_is_not_only_a_hub_s_affair(hub, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for status in (200, 503):
        hub.status = status
        with pytest.raises(DownloadError, match=r"Nor is there a folder or file runs/my-emoj here"):
            open_checkpoint("runs/my-emoj")
    asked = len(hub.requests)
    (tmp_path / "runs").mkdir()
    with pytest.raises(CheckpointError, match="no runs/my-emoj, but a folder runs: so no hub is"):
        open_checkpoint("runs/my-emoj")
    assert len(hub.requests) == asked


def test_a_preset_s_parts_are_fetched_when_they_are_used(hub, monkeypatch):
    files = {part: HubFile("a/b", f"{part}.h5") for part in PARTS}
    hub.repositories["a/b"] = {file.name: part.encode() for part, file in files.items()}
    monkeypatch.setitem(PRESETS, "some", replace(PRESETS["emoji"], config=TINY, files=files))
    checkpoint = open_checkpoint("some")
    assert checkpoint.config == TINY
    assert hub.requests == []

    monkeypatch.setattr(catalog, "open_parts", Opened)
    assert checkpoint.match("unet", ["a variable"]) == ("unet", b"unet", ["a variable"])
    assert hub.downloads() == ["unet.h5"]
    assert len(download("some")) == len(stored_files("some")) == 4


class Opened:
    def __init__(self, paths, config):
        assert config == TINY
        self.paths = paths

    def match(self, part, variables):
        return part, self.paths[part].read_bytes(), variables


def test_a_file_of_a_repository_is_opened_as_a_local_one(hub, monkeypatch):
    hub.repositories["a/b"] = {"some/file.ckpt": b"weights"}
    with pytest.raises(CheckpointError, match=r"file\.ckpt is no file of weights"):
        open_checkpoint("a/b/some/file.ckpt")
    assert download("a/b/some/file.ckpt")[0].read_bytes() == b"weights"


@pytest.mark.parametrize("name", ["", "/vae/diffusion_pytorch_model.safetensors"])
def test_an_autoencoder_on_a_hub_is_to_be_downloaded_first(hub, tiny_repo, tiny_model, name):
    with pytest.raises(CheckpointError, match=f"download {REPO}{name or '/FILE'}` for its weights"):
        open_checkpoint(tiny_model, vae=REPO + name)
    assert hub.requests == []
    download(f"{REPO}/vae/config.json")
    [weights] = download(f"{REPO}/{FILES['vae']}")
    assert open_checkpoint(tiny_model, vae=weights).config == TINY


def test_every_preset_names_a_file_for_every_part():
    for name, preset in PRESETS.items():
        if preset.config is not None:
            assert preset.files.keys() == PARTS.keys(), name
            assert all(len(file.sha256) == 64 for file in preset.files.values())


@pytest.mark.parametrize("source", ["emoji", "nothing", "./a/b"])
def test_what_is_on_no_hub_cannot_be_downloaded(source):
    with pytest.raises(CheckpointError, match=r"nothing to download|is on no hub"):
        download(source)
