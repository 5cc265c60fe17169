"""Puts what was measured into a page of the docs, with the machine, the day and the versions it was measured on."""

import datetime
import os
import platform
from collections.abc import Iterable
from importlib.metadata import version
from pathlib import Path

BEGIN, END = "<!-- measured -->", "<!-- /measured -->"

PACKAGES = ("grpcio", "protobuf", "openai", "uvloop")


def write(page: Path, lines: Iterable[str]) -> None:
    """Replaces the text between the page's two marks. Raises ValueError for a page without both."""
    text = page.read_text()
    head, begun, rest = text.partition(f"{BEGIN}\n")
    _, ended, tail = rest.partition(END)
    if not (begun and ended):
        raise ValueError(f"{page} has no place for a table, between {BEGIN} and {END}")
    page.write_text("\n".join((f"{head}{BEGIN}", f"{circumstances()}", "", *lines, f"{END}{tail}")))


def circumstances() -> str:
    """One sentence: when and on what."""
    today = datetime.datetime.now(datetime.UTC).date()
    packages = ", ".join(f"{package} {version(package)}" for package in PACKAGES)
    return (
        f"Measured on {today}: {os.cpu_count()} CPUs ({_processor()}), "
        f"{platform.system()} {platform.release()}, Python {platform.python_version()}, {packages}."
    )


def _processor() -> str:
    with open("/proc/cpuinfo", encoding="utf-8") as about:
        names = [line.partition(":")[2].strip() for line in about if line.startswith("model name")]
    return names[0] if names else platform.machine()
