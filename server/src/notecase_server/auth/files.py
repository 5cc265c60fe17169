"""Reads the operator's files again when they change, without a restart."""

import asyncio
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Generic, TypeVar

import structlog

from notecase_server.auth.tables import SettingsError

T = TypeVar("T")

log = structlog.get_logger()

LOOK_SECONDS = 1.0
"""How long a change may go unnoticed."""

Stamp = tuple[int, int, int] | None


class Watched(Generic[T]):
    """What a few files that belong together say."""

    def __init__(self, paths: Sequence[Path], read: Callable[[], T]) -> None:
        """Reads them for the first time. Raises what `read` raises: SettingsError for what cannot be used."""
        self._paths = paths
        self._read = read
        self._stamps = [_stamp(path) for path in paths]
        self.value = read()
        """What they said when they could last be used."""

    def look(self) -> None:
        """Reads the files again if one of them has changed. What cannot be used is logged, once for each change, and
        `value` stays as it is."""
        stamps = [_stamp(path) for path in self._paths]
        if stamps == self._stamps:
            return
        self._stamps = stamps  # taken before they are read: what changes in between is seen the next time
        names = [str(path) for path in self._paths]
        try:
            self.value = self._read()
        except SettingsError as error:
            log.error("files_refused", files=names, problems=[mistake.text for mistake in error.mistakes])
        else:
            log.info("files_reloaded", files=names)


class Files:
    """All files that one server watches."""

    def __init__(self) -> None:
        self._watched: list[Watched[Any]] = []

    def watch(self, paths: Sequence[Path], read: Callable[[], T]) -> Watched[T]:
        """Reads files now and whenever they change. Raises what `read` raises now."""
        watched = Watched(paths, read)
        self._watched.append(watched)
        return watched

    async def keep_looking(self) -> None:
        """Checks all of them every LOOK_SECONDS, without end."""
        while True:
            await asyncio.sleep(LOOK_SECONDS)
            if self._watched:
                await asyncio.to_thread(self._look)

    def _look(self) -> None:
        for watched in self._watched:
            watched.look()


def _stamp(path: Path) -> Stamp:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_mtime_ns, found.st_size, found.st_ino
