"""A repository in the diffusers layout: only what is needed of it, part by part."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from stable_diffusion_tf.checkpoints.config_json import read_config
from stable_diffusion_tf.checkpoints.diffusers import (
    FILES,
    JSON_FILES,
    TABLES,
    TOKENIZER_FILES,
    find_weights,
    missing_files,
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
            self._names, license, unreachable = _names(path.parent), "", error
        else:
            if index.name not in self._names:
                raise CheckpointError(f"{repo} {_not_the_layout(repo, self._names)}")
            path, unreachable = fetch(index), None
        if missing := missing_files(self._names.__contains__, variant):
            raise unreachable or FileNotFoundError(
                f"{repo} is not a whole model in the diffusers layout: it lacks "
                f"{', '.join(missing)}."
            )
        self._file = replace(index, revision=path.parent.name)
        self._license = license or "none named there"
        self._variant = variant
        for name in (*JSON_FILES, *TOKENIZER_FILES):
            if name in self._names:
                fetch(replace(self._file, name=name))
        self.config = read_config(path.parent, name=repo)

    def match(self, part: str, variables: Sequence[Any]) -> list[Match]:
        """As of `Checkpoint`; DownloadError when the part's weights cannot be had."""
        return TABLES[part].match(variables, open_tensors(self.fetch(part)))

    def fetch(self, part: str) -> Path:
        """The file of a part's weights; of weights in shards, their index."""
        path = self._fetch(find_weights(part, self._names.__contains__, self._variant))
        if path.suffix == ".json":
            places = read_json(path).get("weight_map")  # what is wrong with it shows on opening
            shards = set(map(str, places.values())) if isinstance(places, dict) else ()
            folder = Path(FILES[part]).parent.as_posix()
            for name in sorted({f"{folder}/{shard}" for shard in shards}.intersection(self._names)):
                self._fetch(name)
        return path

    def download(self) -> list[Path]:
        """Fetch all parts' weights."""
        return list(dict.fromkeys(self.fetch(part) for part in FILES))

    def _fetch(self, name: str) -> Path:
        return fetch(replace(self._file, name=name, license=self._license))


def cached_files(repo: str) -> list[HubFile]:
    """The files of a repository that are in the cache, of the commit that "main" was last."""
    index = HubFile(repo, JSON_FILES[0])
    if (path := cached(index)) is None:
        return []
    names = _names(path.parent)
    return [replace(index, name=name, revision=path.parent.name) for name in names]


def _names(folder: Path) -> list[str]:
    return sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())


def _not_the_layout(repo: str, names: Sequence[str]) -> str:
    files = [name for name in names if name.endswith(WEIGHTS)]
    if not files:
        return "has no weights of Stable Diffusion."
    return (
        "is not in the diffusers layout. Name one of its files: "
        f"{', '.join(f'{repo}/{name}' for name in files)}."
    )
