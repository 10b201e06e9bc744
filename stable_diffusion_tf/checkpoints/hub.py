"""Files of a model hub's repositories: fetched once, by huggingface_hub, and checked by their hash.

The transfer, the cache and the variables that steer them (`HF_HOME`, `HF_TOKEN`, `HF_ENDPOINT`,
`HF_HUB_OFFLINE`, `HF_HUB_DISABLE_PROGRESS_BARS`) are huggingface_hub's, which is imported when the
first file is asked for.
"""

import errno
import hashlib
import os
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from tqdm import tqdm

from stable_diffusion_tf.screen import printable


class DownloadError(OSError):
    """A file that cannot be had: the message says which, why, and what to do."""


@dataclass(frozen=True)
class HubFile:
    """A file of a repository.

    Attributes:
        repo: "owner/name".
        name: its path in the repository.
        sha256: what its content must hash to; None: unpinned, whatever the hub says it is.
        revision: branch, tag or commit.
        license: what to show when it is downloaded; "" for files that are no weights.
    """

    repo: str
    name: str
    sha256: str | None = None
    revision: str = "main"
    license: str = ""

    def __str__(self) -> str:
        return f"{self.repo}/{self.name}"


def fetch(file: HubFile) -> Path:
    """The file's path in the cache, downloaded if it is not there, with the content it should have.

    A file that is pinned and there needs no network. A damaged file is removed if it came with this
    call, and left where it is if it was there before.

    Raises:
        DownloadError: it cannot be had, or is damaged.
    """
    with _explained(file):
        there_before = _entries(file.repo)
    path = cached(file)
    if path is None:
        announce(file.repo, file.license, file.sha256 is not None)
    if path is None or file.sha256 is None:
        path = _download(file)
    stored = _target(path)
    is_new = stored not in there_before
    expected = expected_hash(file, path) or (_hub_hash(file) if is_new else None)
    if expected is None or (found := _hash(path, expected)) == expected:
        return path
    authority = "the hub gives" if file.sha256 is None else "the catalog pins"
    damage = f"its hash is {found} and not {expected}, which {authority}"
    if not is_new:
        raise DownloadError(
            f"{file} is in the cache, but damaged or replaced: {damage}. It is not used. Delete "
            f"{stored} and try again."
        )
    path.unlink(missing_ok=True)
    stored.unlink(missing_ok=True)
    raise DownloadError(
        f"{file} did not arrive as it should be: {damage}. It was removed again. Try once more; if "
        "the error stays, the file was replaced at its source, or something on the way alters it."
    )


def cached(file: HubFile) -> Path | None:
    """Where the file is in the cache, unchecked; None if it is not."""
    from huggingface_hub import try_to_load_from_cache

    with _explained(file):
        path = try_to_load_from_cache(file.repo, file.name, revision=file.revision)
    return Path(path) if isinstance(path, str) else None  # it also tells of files known not to be


def expected_hash(file: HubFile, path: Path) -> str | None:
    """What the cached file should hash to: the catalog's SHA-256, else the hub's own if known.

    The cache names the stored file by the hub's, and links `path` there where the file system can.
    """
    if file.sha256 is not None:
        return file.sha256
    return _as_hash(_target(path).name) if path.is_symlink() else None


def is_whole(file: HubFile, path: Path) -> bool | None:
    """Whether the cached file has the content it should have; None if nothing says what that is."""
    expected = expected_hash(file, path)
    return None if expected is None else _hash(path, expected) == expected


def sha256(path: Path, *others: Path) -> str:
    """SHA-256 of a file, hexadecimal: of a large one in the cache as its link says, or computed.

    That of several files is the hash of theirs, one after the other.
    """
    if others:
        return hashlib.sha256("".join(map(sha256, (path, *others))).encode()).hexdigest()
    stored = _target(path)
    if path.is_symlink() and re.fullmatch("[0-9a-f]{64}", stored.name) and _in_cache(stored):
        return stored.name
    return _hash(path, like=64 * "0")


def list_files(repo: str) -> tuple[list[str], str]:
    """The names of a repository's files, and the licence that it names, or "".

    Raises:
        DownloadError: the hub does not say.
    """
    from huggingface_hub import HfApi

    with _explained(HubFile(repo, "")):
        info = HfApi().model_info(repo, timeout=10)
    license = getattr(info.card_data, "license", None)
    return [sibling.rfilename for sibling in info.siblings or []], str(license or "")


def page(repo: str) -> str:
    """The address where a person reads about the repository."""
    from huggingface_hub import constants

    return f"{constants.ENDPOINT}/{repo}"


def _download(file: HubFile) -> Path:
    from huggingface_hub import hf_hub_download

    with _explained(file), warnings.catch_warnings():
        # It warns and begins all the same; that gigabytes do not fit is better known now.
        warnings.filterwarnings("error", "Not enough free disk space", UserWarning)
        return Path(hf_hub_download(file.repo, file.name, revision=file.revision))


@cache  # once a repository
def announce(repo: str, license: str, pinned: bool) -> None:
    """Says on the screen what is about to be downloaded, and under whose terms."""
    if not license:
        return
    check = "" if pinned else " They are unpinned: checked against the hub's own hashes only."
    tqdm.write(
        f"Downloading weights from {page(repo)}. Their licence: {printable(license)}. Read it "
        f"before you use them.{check} No safety checker is included: pictures are not filtered.",
        file=sys.stderr,
    )


def _hub_hash(file: HubFile) -> str | None:
    """What the hub says the file hashes to, if it does; caches without links do not keep it."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_url

    with _explained(file):
        url = hf_hub_url(file.repo, file.name, revision=file.revision)
        return _as_hash(get_hf_file_metadata(url).etag)


def _as_hash(tag: str | None) -> str | None:
    """The hub's tag of a file if it is a hash: SHA-256 of a large one, git's SHA-1 of a small."""
    return tag if tag and len(tag) in (40, 64) else None


def _hash(path: Path, like: str) -> str:
    """SHA-256 of a file, or git's SHA-1 if `like` is one: hexadecimal."""
    size = path.stat().st_size
    digest = hashlib.sha256() if len(like) == 64 else hashlib.sha1(b"blob %d\0" % size)
    with path.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _target(path: Path) -> Path:
    """The file that the cache's entry `path` stands for: where its link leads, or itself."""
    stored = path.parent / os.readlink(path) if path.is_symlink() else path
    return Path(os.path.realpath(stored.parent), stored.name)


def _cache() -> Path:
    """Where the cache is, without links on the way, as huggingface_hub gives what it downloads."""
    from huggingface_hub import constants

    return Path(os.path.realpath(constants.HF_HUB_CACHE))


def _in_cache(stored: Path) -> bool:
    """Whether a file is where the cache puts those that it names by their hashes."""
    blobs = stored.parent
    return blobs.name == "blobs" and blobs.parent.parent == _cache()


def _entries(repo: str) -> set[Path]:
    """All that the cache has of a repository."""
    return set(_cache().glob(f"models--{repo.replace('/', '--')}/**/*"))


AGAIN = "Try again later"
TOKEN = "Put a valid access token into HF_TOKEN"
CACHE = "Name another place for the cache in HF_HOME"

# Why a transfer fails: by the class of an error, whichever HTTP library huggingface_hub is built
# on; by HTTP status; by the operating system's number. (cause, remedy)
REASONS: dict[str | int | None, tuple[str, str]] = {
    "OfflineModeIsEnabled": (
        "it is not in the cache, and HF_HUB_OFFLINE forbids to fetch it",
        "Unset HF_HUB_OFFLINE, or run `sdtf weights download` where there is a network",
    ),
    "GatedRepoError": (
        "its owner gives it only to those who accept the terms",
        "Accept them on the repository's page, then put an access token into HF_TOKEN",
    ),
    "RepositoryNotFoundError": (
        "there is no such repository, or it is private",
        "Check its name; for a private one put an access token into HF_TOKEN",
    ),
    "RevisionNotFoundError": ("the repository has no such revision", "Check its name"),
    "EntryNotFoundError": ("the repository has no such file", "Check its name"),
    "HFValidationError": ("that is no name a repository can have", "Give it as owner/name"),
    "FileMetadataError": (
        "the answer is not that of a model hub",
        "Check HF_ENDPOINT, and the proxy if there is one",
    ),
    "ProxyError": ("the proxy refuses", "Check the proxy's settings"),
    **dict.fromkeys(
        ("TimeoutException", "Timeout", "TimeoutError"),
        ("the hub stopped sending", f"{AGAIN}; for a slow line raise HF_HUB_DOWNLOAD_TIMEOUT"),
    ),
    **dict.fromkeys(
        ("RemoteProtocolError", "ReadError", "ChunkedEncodingError", "ProtocolError"),
        ("the connection was cut", AGAIN),
    ),
    **dict.fromkeys(
        ("ConnectError", "ConnectionError"),
        ("the hub cannot be reached", "Check the network, the proxy and HF_ENDPOINT"),
    ),
    "Consistency check failed": ("what arrived has not the length it should have", AGAIN),
    "UserWarning": ("there is not enough free disk space", f"Make room. {CACHE}"),
    401: ("the hub wants to know who asks, or there is no such repository", TOKEN),
    403: ("the hub forbids it", TOKEN),
    429: ("the hub has had too many requests (429)", f"{AGAIN}. {TOKEN} to be allowed more"),
    **{status: (f"the hub is out of order ({status})", AGAIN) for status in (500, 502, 503, 504)},
    errno.ENOSPC: ("the disk is full", f"Make room. {CACHE}"),
    errno.EDQUOT: ("the disk quota is used up", f"Make room. {CACHE}"),
    **dict.fromkeys(
        (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOTDIR, errno.EEXIST),
        ("the cache cannot be written to", CACHE),
    ),
}


@contextmanager
def _explained(file: HubFile) -> Iterator[None]:
    """Turns whatever goes wrong inside into one DownloadError about the file."""
    try:
        yield
    except Exception as error:
        cause, remedy = _reason(error)
        raise DownloadError(
            f"{str(file).rstrip('/')} cannot be fetched: {cause}. {remedy}."
        ) from None


def _reason(error: BaseException) -> tuple[str, str]:
    for one in _chain(error):
        response = getattr(one, "response", None)
        for key in (
            *(cls.__name__ for cls in type(one).__mro__),
            getattr(response, "status_code", None),
            getattr(one, "errno", None),
            str(one).partition(":")[0],
        ):
            if key in REASONS:
                return REASONS[key]
    return f"{type(error).__name__}: {' '.join(str(error).split())}", AGAIN


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    """An error, what caused it, what caused that; without the one that says "not in the cache"."""
    while error is not None:
        if type(error).__name__ != "LocalEntryNotFoundError":
            yield error
        error = error.__cause__ or error.__context__
