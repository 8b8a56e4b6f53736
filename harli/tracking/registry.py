"""The registry of latency predictors: numbered versions of one model, and which of them is the champion.

A version is a folder that MLflow keeps, with the predictor's own files under ``artifact``. Runs use the
version with the alias ``champion``. A version that becomes champion is tagged with the one it follows,
so that a rollback finds the way back.
"""

from __future__ import annotations

import os
import re
import tempfile
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING
from urllib.parse import unquote, urlparse

from harli.models import cache_folder
from harli.tracking.store import open_store, reporting_failures, tracking_uri
from harli.types import HarliError

if TYPE_CHECKING:
    from mlflow import MlflowClient

MODEL = "harli-decode-latency"
EXPERIMENT = "harli predictors"
CHAMPION, CHALLENGER = "champion", "challenger"
CHAMPION_URI = f"models:/{MODEL}@{CHAMPION}"

ARTIFACT = "artifact"
"""Where a version's folder has the predictor's own files."""

PREVIOUS = "previous_champion"
"""Tag of a champion: the number of the champion before it."""

NO_CHAMPION = "no predictor is the champion yet: run `harli train-predictor`, or `harli predictors --promote N`"


@dataclass(frozen=True)
class Version:
    """One registered predictor."""

    number: int
    aliases: tuple[str, ...]
    created_at: datetime
    """In UTC."""
    tags: Mapping[str, str]
    run_id: str


class Registry:
    """The versions of ``MODEL``. Every method raises HarliError when MLflow cannot be used."""

    def __init__(self, client: MlflowClient) -> None:
        self._client = client

    @reporting_failures()
    def versions(self) -> list[Version]:
        """All versions, the oldest first; none while nothing was registered."""
        named = f"name = '{MODEL}'"
        aliases = {
            alias: int(number)
            for model in self._client.search_registered_models(named)
            for alias, number in model.aliases.items()
        }
        found = [
            Version(
                number=int(version.version),
                aliases=tuple(sorted(alias for alias, number in aliases.items() if number == int(version.version))),
                created_at=datetime.fromtimestamp(version.creation_timestamp / 1000.0, UTC),
                tags=dict(version.tags),
                run_id=version.run_id or "",
            )
            for version in self._client.search_model_versions(named)
        ]
        return sorted(found, key=lambda version: version.number)

    def champion(self) -> Version | None:
        """The version that runs use."""
        return next((version for version in self.versions() if CHAMPION in version.aliases), None)

    def get(self, number: int) -> Version:
        """Version ``number``. Raises HarliError when there is none."""
        versions = self.versions()
        for version in versions:
            if version.number == number:
                return version
        known = ", ".join(str(version.number) for version in versions) or "none"
        raise HarliError(f"no version {number} of {MODEL}; registered: {known} (`harli predictors` lists them)")

    def folder(self, number: int) -> Path:
        """Version ``number``'s folder on this machine, fetched once. Raises HarliError when files are missing."""
        with reporting_failures():
            uri = self._client.get_model_version_download_uri(MODEL, str(number))
        parts = urlparse(uri)
        folder = Path(unquote(parts.path)) if parts.scheme in ("", "file") else _fetched(uri, number)
        if not (folder / ARTIFACT).is_dir():
            raise HarliError(
                f"version {number} of {MODEL} is damaged: {folder / ARTIFACT} is missing; "
                "choose another with `harli predictors --promote N`, or delete the version in MLflow"
            )
        return folder

    def add(self, run_id: str, source: str, tags: Mapping[str, str], *, champion: bool) -> int:
        """Register the model folder at ``source``, an artifact of the run, as champion or challenger; its number."""
        with reporting_failures():
            if not self._client.search_registered_models(f"name = '{MODEL}'"):
                self._client.create_registered_model(MODEL, description="Time between tokens at every compute share.")
            number = int(
                self._client.create_model_version(MODEL, source, run_id, dict(tags), await_creation_for=0).version
            )
        try:
            if champion:
                self.promote(number)
            else:
                with reporting_failures():
                    self._client.set_registered_model_alias(MODEL, CHALLENGER, str(number))
        except BaseException:
            with suppress(Exception):
                self._client.delete_model_version(MODEL, str(number))
            raise
        return number

    def promote(self, number: int) -> None:
        """Make version ``number`` the champion. Raises HarliError when it does not exist or has no files."""
        version, before = self.get(number), self.champion()
        self.folder(number)
        with reporting_failures():
            if before is not None and before.number != number:
                self._client.set_model_version_tag(MODEL, str(number), PREVIOUS, str(before.number))
            self._client.set_registered_model_alias(MODEL, CHAMPION, str(number))
            if CHALLENGER in version.aliases:
                self._client.delete_registered_model_alias(MODEL, CHALLENGER)

    def rollback(self) -> Version:
        """Make the champion's predecessor the champion again. Raises HarliError when it has none."""
        champion = self.champion()
        if champion is None:
            raise HarliError(NO_CHAMPION)
        if PREVIOUS not in champion.tags:
            raise HarliError(f"version {champion.number} is the first champion; there is none to go back to")
        version = self.get(int(champion.tags[PREVIOUS]))
        self.folder(version.number)
        with reporting_failures():
            self._client.set_registered_model_alias(MODEL, CHAMPION, str(version.number))
        return version


def open_registry() -> Registry:
    """The registry for reading. Raises HarliError when MLflow does not answer, or nothing was ever stored."""
    uri = urlparse(tracking_uri())
    if uri.scheme == "sqlite" and not Path(unquote(uri.path.removeprefix("/"))).exists():
        raise HarliError(NO_CHAMPION)
    return Registry(open_store(EXPERIMENT)[0])


def load_predictor_folder(uri: str = CHAMPION_URI) -> Path:
    """A local folder with the predictor at ``uri``, as ``predictor.artifact`` loads it.

    ``uri`` is a folder, ``models:/harli-decode-latency@champion`` (or another alias), or
    ``models:/harli-decode-latency/3``. Raises HarliError when there is no such folder, version or alias,
    when MLflow does not answer, or when files of the version are missing.
    """
    if uri and Path(uri).is_dir():
        return Path(uri)
    match = re.fullmatch(rf"models:/{MODEL}(?:@(?P<alias>[\w-]+)|/(?P<number>\d+))", uri)
    if match is None:
        raise HarliError(f"no predictor {uri!r}: give a folder, {CHAMPION_URI}, or models:/{MODEL}/N")
    registry = open_registry()
    if match["number"]:
        return registry.folder(registry.get(int(match["number"])).number) / ARTIFACT
    for version in registry.versions():
        if match["alias"] in version.aliases:
            return registry.folder(version.number) / ARTIFACT
    if match["alias"] == CHAMPION:
        raise HarliError(NO_CHAMPION)
    raise HarliError(f"no version of {MODEL} has the alias {match['alias']!r}; `harli predictors` lists them")


def _fetched(uri: str, number: int) -> Path:
    """The copy of ``uri`` in the cache folder. A version never changes, so one copy is enough."""
    from hashlib import sha256

    from mlflow.artifacts import download_artifacts

    target = cache_folder() / "predictors" / f"{number}-{sha256(uri.encode()).hexdigest()[:16]}"
    if target.is_dir():
        return target
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as temporary:
            with reporting_failures():
                copy = download_artifacts(artifact_uri=uri, dst_path=temporary, tracking_uri=tracking_uri())
            try:
                os.replace(copy, target)
            except OSError:
                if not target.is_dir():  # another process was faster
                    raise
    except OSError as error:
        raise HarliError(
            f"cannot keep the predictor in {target.parent} ({error.strerror or error}); set HARLI_CACHE"
        ) from error
    return target
