"""A repository in the diffusers layout: only what is needed of it, part by part."""

from collections.abc import Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

from stable_diffusion_tf.checkpoints.config_json import read_config
from stable_diffusion_tf.checkpoints.diffusers import (
    FILES,
    JSON_FILES,
    OLD_FILES,
    TABLES,
    TOKENIZER_FILES,
    find_all,
)
from stable_diffusion_tf.checkpoints.fit import Match
from stable_diffusion_tf.checkpoints.hub import DownloadError, HubFile, cached, fetch, list_files
from stable_diffusion_tf.checkpoints.readers import CheckpointError, read_json
from stable_diffusion_tf.checkpoints.tensors import open_tensors

WEIGHTS = (".safetensors", ".ckpt", ".h5")


class HubFolder:
    """An opened repository: its config is fetched and checked; weights are when first used.

    All files are of one commit, the one that "main" is on opening. When the hub cannot be reached,
    it is the one that "main" was when the cache last saw it.

    Args:
        repo: "owner/name".
        variant: which weights to take, as of `diffusers.open_folder`.

    Raises:
        FileNotFoundError: the repository lacks files; all of them are named.
        CheckpointError: it is not in the diffusers layout, or of another architecture.
        DownloadError: a file cannot be fetched.
    """

    def __init__(self, repo: str, variant: str | None = None):
        index = HubFile(repo, JSON_FILES[0])
        try:
            self._names, license = list_files(repo)
        except DownloadError as error:
            if (path := cached(index)) is None:
                raise
            here = [file.name for file in cached_files(repo) if cached(file)]
            self._names, license, unreachable = here, "", error
        else:
            if index.name not in self._names:
                raise CheckpointError(f"{repo} {_not_the_layout(repo, self._names)}")
            path, unreachable = fetch(index), None
        self._weights, missing = find_all(self._names.__contains__, variant)
        if missing:
            raise unreachable or FileNotFoundError(
                f"{repo} is not a whole model in the diffusers layout: it lacks "
                f"{', '.join(missing)}."
            )
        self._file = replace(index, revision=path.parent.name)
        self._license = license or "none named there"
        for name in (*JSON_FILES, *TOKENIZER_FILES):
            if name in self._names:
                fetch(replace(self._file, name=name))
        self.config = read_config(path.parent, name=repo)

    def match(self, part: str, variables: Sequence[Any]) -> list[Match]:
        """As of `Checkpoint`; DownloadError when the part's weights cannot be had."""
        return TABLES[part].match(variables, open_tensors(self.fetch(part)))

    def fetch(self, part: str) -> Path:
        """The file of a part's weights; of weights in shards, their index."""
        name = self._weights[part]
        path = self._fetch(name)
        for shard in sorted(_shards(path, name).intersection(self._names)):
            self._fetch(shard)
        return path

    def download(self) -> list[Path]:
        """Fetch all parts' weights."""
        return list(dict.fromkeys(self.fetch(part) for part in FILES))

    def _fetch(self, name: str) -> Path:
        return fetch(replace(self._file, name=name, license=self._license))


def cached_files(repo: str) -> list[HubFile]:
    """A repository's files in the cache, and those that the model lacks there.

    They are of the commit that "main" was last; none if the cache does not know the repository.
    """
    index = HubFile(repo, JSON_FILES[0])
    if (path := cached(index)) is None:
        return []
    folder = path.parent
    # A link in the cache can outlive what it leads to.
    names = {p.relative_to(folder).as_posix() for p in folder.rglob("*") if not p.is_dir()}
    weights, missing = find_all(names.__contains__)
    # What was taken with a variant is not missing.
    names.update(name for name in missing if not _has_weights(names, name))
    for name in filter(None, weights.values()):
        with suppress(FileNotFoundError, CheckpointError):  # said when it is hashed, or opened
            names |= _shards(folder / name, name)
    return [replace(index, name=name, revision=folder.name) for name in sorted(names)]


def _has_weights(names: Collection[str], missing: str) -> bool:
    """Whether some of the part that a missing file belongs to are there, of whatever variant."""
    stems = {f"{FILES[part]}.": f"{OLD_FILES[part]}." for part in FILES}
    stem = next(filter(missing.startswith, stems), None)
    return stem is not None and any(name.startswith((stem, stems[stem])) for name in names)


def _shards(path: Path, name: str) -> set[str]:
    """What a file of weights is the index of, by names in the repository; nothing if it is none."""
    if path.suffix != ".json":
        return set()
    places = read_json(path).get("weight_map")  # what is wrong with it shows on opening
    shards = set(map(str, places.values())) if isinstance(places, dict) else ()
    folder = name.rpartition("/")[0]
    return {f"{folder}/{shard}" for shard in shards if "/" not in shard}


def _not_the_layout(repo: str, names: Sequence[str]) -> str:
    files = [name for name in names if name.endswith(WEIGHTS)]
    if not files:
        return "has no weights of Stable Diffusion."
    return (
        "is not in the diffusers layout. Name one of its files: "
        f"{', '.join(f'{repo}/{name}' for name in files)}."
    )
