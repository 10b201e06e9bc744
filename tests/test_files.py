import os
import stat
from pathlib import Path

import pytest

from stable_diffusion_tf.files import atomic_path, check_folder


def private(path):
    """Writes a file as the safetensors library does: for its owner only."""
    path.touch(mode=0o600)
    path.write_text("new")


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX permissions")
def test_files_get_the_permissions_of_any_new_file(tmp_path):
    before = os.umask(0o027)
    try:
        with atomic_path(tmp_path / "file") as path:
            private(path)
        with atomic_path(tmp_path / "folder") as path:
            (path / "part").mkdir(parents=True)
            private(path / "part" / "file")
    finally:
        os.umask(before)
    for name in ("file", "folder/part/file"):
        assert stat.S_IMODE((tmp_path / name).stat().st_mode) == 0o640
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
    assert os.listdir(tmp_path / "folder" / "part") == ["file"]


def test_a_file_is_on_the_disk_before_it_has_its_name(tmp_path, monkeypatch):
    path, synced = tmp_path / "file", []
    monkeypatch.setattr(os, "fsync", lambda _: synced.append(path.read_text()))
    path.write_text("old")
    with atomic_path(path) as temporary:
        temporary.write_text("new")
    assert synced == ["old"]
    assert path.read_text() == "new"


def test_a_folder_is_never_replaced(tmp_path):
    path = tmp_path / "folder"
    path.mkdir()
    with pytest.raises(FileExistsError, match="folder is a folder"), atomic_path(path) as new:
        new.mkdir()
    assert os.listdir(tmp_path) == ["folder"]


@pytest.mark.skipif(os.name == "nt", reason="needs links")
def test_a_link_is_replaced_and_not_what_it_leads_to(tmp_path):
    file, folder, link = tmp_path / "file", tmp_path / "folder", tmp_path / "link"
    file.write_text("old")
    folder.mkdir()
    for target in (file, folder):
        link.symlink_to(target)
        with atomic_path(link) as new:
            new.write_text("new")
        assert not link.is_symlink()
        link.unlink()
    assert file.read_text() == "old"
    assert os.listdir(folder) == []


def test_what_raises_leaves_nothing(tmp_path):
    path = tmp_path / "file"
    with pytest.raises(ZeroDivisionError), atomic_path(path) as temporary:
        temporary.write_text("new")
        raise ZeroDivisionError
    assert os.listdir(tmp_path) == []


def test_a_folder_may_be_to_be_made_but_not_in_a_file_or_nowhere(tmp_path):
    (tmp_path / "file").touch()
    check_folder(tmp_path / "new" / "newer", "")
    with pytest.raises(NotADirectoryError, match="file is a file; take another"):
        check_folder(tmp_path / "file" / "folder", "take another")


@pytest.mark.skipif(os.name == "nt", reason="needs POSIX links")
def test_a_link_to_what_is_not_there_is_no_folder(tmp_path):
    (tmp_path / "link").symlink_to(tmp_path / "unmounted")
    for folder in ("link", "link/folder"):
        with pytest.raises(NotADirectoryError, match="link leads nowhere; take another"):
            check_folder(tmp_path / folder, "take another")


def test_where_nothing_can_be_written_is_found_by_writing(tmp_path, monkeypatch):
    """Not by permissions, by which root, and who has a network's disk, may write everywhere."""
    monkeypatch.setattr(Path, "touch", lambda path, **_: (path / "absent" / "file").open("w"))
    with pytest.raises(OSError, match=r"cannot be written to: No such file.*; take another"):
        check_folder(tmp_path / "new", "take another")
