import errno
import hashlib
import os
import shutil
import subprocess
import sys
from collections import namedtuple
from pathlib import Path

import fake_hub
import huggingface_hub
import pytest
from fake_hub import FakeHub, always
from huggingface_hub import constants

from stable_diffusion_tf.checkpoints.hub import (
    DownloadError,
    HubFile,
    announce,
    cached,
    fetch,
    is_whole,
    sha256,
)

REPO = "someone/some-model"
CONTENT = bytes(range(256)) * 4
SHA = hashlib.sha256(CONTENT).hexdigest()
PINNED = HubFile(REPO, "weights.h5", SHA, license="Some Licence")
UNPINNED = HubFile(REPO, "weights.h5", license="Some Licence")


@pytest.fixture
def hub(hub):
    hub.repositories[REPO] = {"weights.h5": CONTENT, "model_index.json": b"{}"}
    return hub


def refused(file=PINNED):
    """The message of the error, after which the cache has nothing of the file."""
    with pytest.raises(DownloadError) as caught:
        fetch(file)
    assert cached(file) is None
    assert [p for p in Path(constants.HF_HUB_CACHE).rglob("*") if "blobs" in p.parts[:-1]] == []
    message = str(caught.value)
    assert message.startswith(str(file))
    assert "\n" not in message
    return message


@pytest.mark.parametrize("file", [PINNED, UNPINNED])
def test_a_file_is_fetched_once(hub, file):
    path = fetch(file)
    assert path.read_bytes() == CONTENT
    assert path == cached(file)
    assert fetch(file) == path
    assert len(hub.downloads()) == 1
    assert is_whole(file, path)


def test_a_pinned_file_that_is_there_needs_no_network(hub):
    fetch(PINNED)
    asked = len(hub.requests)
    fetch(PINNED)
    assert len(hub.requests) == asked


@pytest.mark.parametrize("file", [PINNED, UNPINNED, HubFile(REPO, "model_index.json")])
def test_offline_what_is_there_is_used_and_what_is_not_is_named(hub, monkeypatch, file):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert "HF_HUB_OFFLINE forbids to fetch it. Unset HF_HUB_OFFLINE" in refused(file)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    path = fetch(file)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(file) == path


@pytest.mark.parametrize("tenth", range(10))
def test_a_cut_is_mended(hub, tenth):
    at = tenth * len(CONTENT) // 10
    hub.faults = iter([fake_hub.cut(at)])
    assert fetch(PINNED).read_bytes() == CONTENT
    shutil.rmtree(constants.HF_HUB_CACHE)
    hub.faults = always(fake_hub.cut(at))
    assert "the connection was cut. Try again later" in refused()


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (fake_hub.status(429), "too many requests (429). Try again later. Put a valid access"),
        (fake_hub.status(503), "the hub is out of order (503). Try again later"),
        (fake_hub.status(403), "the hub forbids it. Put a valid access token into HF_TOKEN"),
        (fake_hub.altered(lambda content: content[:-1]), "not the length it should have"),
        (fake_hub.altered(lambda content: content + b"!"), "not the length it should have"),
        (fake_hub.altered(fake_hub.flip_a_bit), f"and not {SHA}, which the catalog pins. It was r"),
    ],
)
def test_each_failure_has_its_message(hub, fault, message):
    hub.faults = always(fault)
    assert message in refused()
    hub.faults = iter(())
    assert fetch(PINNED).read_bytes() == CONTENT


def test_a_hub_that_stops_sending(hub, monkeypatch):
    hub.faults = always(fake_hub.stalled(100))
    with monkeypatch.context() as context:
        context.setattr(constants, "HF_HUB_DOWNLOAD_TIMEOUT", 0.2)
        assert "the hub stopped sending. Try again later; for a slow line" in refused()
    hub.faults = iter(())
    assert fetch(PINNED).read_bytes() == CONTENT


@pytest.mark.parametrize("name", ["weights.h5", "model_index.json"])
@pytest.mark.parametrize("links", [True, False])
def test_what_nothing_pins_is_held_against_the_hub_s_own_hash(hub, monkeypatch, name, links):
    monkeypatch.setattr(
        huggingface_hub.file_download, "are_symlinks_supported", lambda _=None: links
    )
    file = HubFile(REPO, name)
    hub.faults = always(fake_hub.altered(fake_hub.flip_a_bit))
    assert "which the hub gives. It was removed again" in refused(file)
    hub.faults = iter(())
    path = fetch(file)
    assert path.is_symlink() == links
    assert is_whole(file, path) is (True if links else None)


@pytest.mark.parametrize("code", [429, 503])
def test_a_hub_that_is_out_of_order_serves_from_the_cache(hub, code):
    hub.status = code
    assert str(code) in refused(UNPINNED)
    hub.status = 200
    path = fetch(UNPINNED)
    hub.status = code
    assert fetch(UNPINNED) == path


@pytest.mark.parametrize(
    ("file", "message"),
    [
        (HubFile("no/such", "weights.h5"), "there is no such repository, or it is private"),
        (HubFile(REPO, "no-such.h5"), "the repository has no such file. Check its name"),
    ],
)
def test_what_is_not_there_is_named(hub, file, message):
    assert message in refused(file)


def test_an_impossible_name_is_refused(hub):
    with pytest.raises(
        DownloadError, match=r"no name a repository can have\. Give it as owner/name"
    ):
        fetch(HubFile("a/b--c", "weights.h5"))
    assert hub.requests == []


def test_no_hub_at_all(hub):
    hub.__exit__()
    assert "the hub cannot be reached. Check the network" in refused()


def test_another_host_gets_no_token(hub, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    with FakeHub() as other:
        other.repositories = hub.repositories
        hub.content_host = other
        assert fetch(PINNED).read_bytes() == CONTENT
        assert {authorization for *_, authorization in hub.requests} == {"Bearer hf_secret"}
        assert other.downloads()
        assert {authorization for *_, authorization in other.requests} == {None}


@pytest.mark.parametrize("file", [PINNED, UNPINNED])
def test_a_damaged_file_that_was_there_is_left_named_and_not_used(hub, file):
    blob = fetch(file).resolve()
    blob.write_bytes(fake_hub.flip_a_bit(CONTENT))
    with pytest.raises(DownloadError, match=r"not used\. Delete") as caught:
        fetch(file)
    assert str(blob) in str(caught.value)
    assert blob.read_bytes() == fake_hub.flip_a_bit(CONTENT)
    assert is_whole(file, cached(file)) is False

    blob.unlink()
    assert fetch(file).read_bytes() == CONTENT


@pytest.mark.parametrize("links", [True, False], ids=["links", "no links"])
def test_the_cache_may_lie_behind_a_link(hub, monkeypatch, tmp_path, links):
    monkeypatch.setattr(
        huggingface_hub.file_download, "are_symlinks_supported", lambda _=None: links
    )
    (tmp_path / "large_disk").mkdir()
    (tmp_path / "link").symlink_to("large_disk")
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "link" / ".." / "link"))
    path = fetch(PINNED)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert fetch(UNPINNED).read_bytes() == CONTENT
    path.resolve().write_bytes(fake_hub.flip_a_bit(CONTENT))
    with pytest.raises(DownloadError, match=r"not used\. Delete"):
        fetch(PINNED)
    assert path.resolve().exists()


def test_what_is_no_hash_says_nothing_of_a_file(hub, monkeypatch):
    monkeypatch.setattr(fake_hub, "git_hash", lambda content: "9bb58f26192e4ba00f01e2e7b136bbd8-5")
    assert fetch(HubFile(REPO, "model_index.json")).read_bytes() == b"{}"


@pytest.mark.parametrize(
    ("number", "message"),
    [
        (errno.ENOSPC, "the disk is full. Make room. Name another place for the cache in HF_HOME"),
        (errno.EROFS, "the cache cannot be written to. Name another place"),
        (errno.EACCES, "the cache cannot be written to. Name another place"),
    ],
)
def test_a_cache_that_cannot_be_written(hub, monkeypatch, number, message):
    def fail(*_, **__):
        raise OSError(number, os.strerror(number))

    path = fetch(PINNED)
    monkeypatch.setattr(os, "makedirs", fail)
    monkeypatch.setattr(huggingface_hub.file_download.os, "symlink", fail)
    assert fetch(PINNED) == path
    shutil.rmtree(constants.HF_HUB_CACHE)
    assert message in refused()


def test_a_disk_too_small_is_known_before_the_download(hub, monkeypatch):
    usage = namedtuple("usage", "total used free")(1000, 999, 1)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    assert "there is not enough free disk space. Make room" in refused()
    assert hub.downloads() == []


def test_the_licence_is_shown_at_the_first_download(hub, capsys):
    fetch(UNPINNED)
    said = capsys.readouterr().err
    assert f"{hub.url}/{REPO}. Their licence: Some Licence." in said
    assert "They are unpinned" in said
    assert "No safety checker" in said
    announce.cache_clear()
    fetch(UNPINNED)
    assert "licence" not in capsys.readouterr().err
    fetch(HubFile(REPO, "model_index.json"))
    assert "licence" not in capsys.readouterr().err


FETCH = f"""
from stable_diffusion_tf.checkpoints.hub import HubFile, fetch
import sys
fetch(HubFile({REPO!r}, "weights.h5", {SHA!r}))
sys.exit("tensorflow" in sys.modules or "keras" in sys.modules)
"""


def start(hub, home):
    """A process that fetches, told where by the environment."""
    environment = {**os.environ, "HF_ENDPOINT": hub.url, "HF_HOME": str(home), "HF_TOKEN": "token"}
    environment.pop("HF_HUB_CACHE", None)
    return subprocess.Popen(
        [sys.executable, "-c", FETCH], env=environment, stderr=subprocess.PIPE, text=True
    )


def test_processes_that_are_killed_or_two_at_once(hub, tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "home" / "hub"))
    hub.faults = iter([fake_hub.stalled(500)])
    with start(hub, tmp_path / "home") as killed:
        assert hub.downloading.wait(60)
        killed.kill()
    assert cached(PINNED) is None

    with start(hub, tmp_path / "home") as one, start(hub, tmp_path / "home") as other:
        for process in (one, other):
            _, said = process.communicate(timeout=60)
            assert process.returncode == 0, said
    assert cached(PINNED).read_bytes() == CONTENT
    assert ("HEAD", f"/{REPO}/resolve/main/weights.h5", "Bearer token") in hub.requests


def test_a_hash_that_the_cache_s_link_tells_is_not_computed(hub):
    path = fetch(UNPINNED)
    path.resolve().write_bytes(b"other weights")
    assert sha256(path) == SHA


def test_a_name_that_another_link_leads_to_is_no_hash(tmp_path):
    content = tmp_path / ("a" * 64)
    content.write_bytes(CONTENT)
    (tmp_path / "link").symlink_to(content)
    assert sha256(content) == sha256(tmp_path / "link") == SHA
