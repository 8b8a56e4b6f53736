"""Uploaded files: one folder, names of our own, nothing in it that was not checked."""

from __future__ import annotations

import asyncio
import os
import secrets
import shutil
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, TYPE_CHECKING

from harli.finetune.dataset import check_lines
from harli.serve.objects import File
from harli.serve.store import Store
from harli.types import HarliError

if TYPE_CHECKING:
    from starlette.datastructures import UploadFile

MAX_FILES = 1000
MAX_NAME = 255


@contextmanager
def errors_name(path: Path, name: str) -> Iterator[None]:
    """Inside, a HarliError about the file at ``path`` says ``name`` instead: folders are no client's business."""
    try:
        yield
    except HarliError as error:
        raise HarliError(str(error).replace(str(path), name)) from None


class FileFolder:
    """The files that jobs train on."""

    def __init__(self, folder: Path, store: Store) -> None:
        """Files that were being uploaded when a server ended are dropped."""
        folder.mkdir(parents=True, exist_ok=True)
        for path in folder.iterdir():
            if path.is_file() and store.file(path.name) is None:
                path.unlink()
        self._folder = folder
        self._store = store

    def path(self, id_: str) -> Path:
        """Where the content of a file lies. Raises HarliError if there is no such file."""
        if self._store.file(id_) is None:
            raise HarliError(f"no file {id_!r}")
        return self._folder / id_

    def check_room(self) -> None:
        """Raises HarliError if there are as many files as there may be."""
        if self._store.count_files() >= MAX_FILES:
            raise HarliError(f"there are {MAX_FILES} files already; delete some first")

    async def add(self, upload: UploadFile) -> File:
        """Keep an upload. Raises HarliError if it is not finetuning data, or there are too many files."""
        id_ = f"file-{secrets.token_hex(12)}"
        name = (upload.filename or id_)[:MAX_NAME]
        try:
            size = await asyncio.to_thread(self._write, upload.file, id_, name)
            self.check_room()  # others may have come meanwhile
            file = File(id_, name, size, int(time.time()))
            self._store.add_file(file)
        except BaseException:
            (self._folder / id_).unlink(missing_ok=True)
            raise
        return file

    def delete(self, id_: str) -> None:
        """Raises HarliError if there is no such file. Jobs that have begun keep what they need."""
        path = self.path(id_)
        self._store.delete_file(id_)
        path.unlink(missing_ok=True)

    def _write(self, source: IO[bytes], id_: str, name: str) -> int:
        """Write and check the content; returns its size in bytes."""
        partial = self._folder / f"{id_}.partial"
        try:
            with partial.open("xb") as target:
                shutil.copyfileobj(source, target)
                target.flush()
                os.fsync(target.fileno())
                size = target.tell()
            with errors_name(partial, name):
                if not check_lines(partial):
                    raise HarliError(f"{name} is empty")
            partial.rename(self._folder / id_)
            self._flush_names()
        except OSError as error:
            raise HarliError(f"the file cannot be kept: {error.strerror}") from error
        finally:
            partial.unlink(missing_ok=True)
        return size

    def _flush_names(self) -> None:
        """The new name has to outlast a loss of power, as the content and the row do."""
        descriptor = os.open(self._folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
