"""Files and folders that are either whole or absent."""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_path(path: str | os.PathLike) -> Iterator[Path]:
    """Yield a path beside `path` to write a file or a folder to; it becomes `path` at the end.

    The change is one rename of what is already on the disk, so that `path` is never seen
    half-written, not even after a power cut. A file there is replaced; of a link, the link and not
    what it leads to. Files get the permissions of any new one. When the block raises, what it wrote
    is removed.

    Raises:
        FileExistsError: there is a folder at `path`, empty or not.
    """
    path = Path(path)
    # A name may be as long as the file system lets it be.
    temporary = path.with_name(f".{path.name[:50]}.{uuid.uuid4().hex[:8]}.tmp")
    try:
        yield temporary
        for written in [temporary, *temporary.rglob("*")]:
            if written.is_file():
                settle(written)
        if path.is_dir() and not path.is_symlink():  # POSIX would replace an empty one
            raise FileExistsError(f"{path} is a folder, which is not replaced.")
        os.replace(temporary, path)
    finally:
        if temporary.is_dir():
            shutil.rmtree(temporary)
        else:
            temporary.unlink(missing_ok=True)


def check_folder(folder: Path, remedy: str) -> None:
    """Raises OSError where no files could be written; the folder may still be to be made.

    What is wrong is followed by the `remedy`.
    """
    existing = next(path for path in [folder, *folder.absolute().parents] if os.path.lexists(path))
    if not existing.exists():
        raise NotADirectoryError(f"{existing} leads nowhere; {remedy}.")
    if not existing.is_dir():
        raise NotADirectoryError(f"{existing} is a file; {remedy}.")
    probe = existing / f".{uuid.uuid4().hex}.tmp"
    try:  # to root, the system calls all writable
        probe.touch(exist_ok=False)
        probe.unlink()
    except OSError as error:
        raise OSError(f"{existing} cannot be written to: {error.strerror}; {remedy}.") from None


def settle(path: Path) -> None:
    """Gives a file the permissions of any new one, whatever made it, and puts it on the disk."""
    new = path.with_name(f"{path.name}.new")
    new.touch()  # the umask cannot be read without changing it for all threads
    try:
        with path.open("rb+") as file:
            shutil.copymode(new, path)
            os.fsync(file.fileno())
    finally:
        new.unlink()
