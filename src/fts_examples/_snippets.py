"""Sentences of product reviews, editorials and tweets whose sentiment people have rated.

They lie in the source distribution of the package vaderSentiment (MIT licence; Hutto and Gilbert 2014, ICWSM) as an
archive in an archive. It has snippets of movie reviews, too, which are left out here: SST is made of the same reviews.
"""

import math
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

from fts_examples._text_data import DataError, Row

SOURCES = {"amazon": "amazonReviewSnippets", "nyt": "nytEditorialSnippets", "tweets": "tweets"}
INNER_ARCHIVE = "additional_resources/hutto_ICWSM_2014.tar.gz"
NEGATIVE, POSITIVE = 0, 1
REQUIREMENT = "vaderSentiment==3.3.2"
SHA256 = "5d7c06e027fc8b99238edb0d53d970cf97066ef97654009890b83703849632f9"


def fetch(folder: Path) -> Path:
    """Have pip download the source distribution into ``folder``; pip compares it with the hash that is written here.

    Raises:
        DataError: pip failed; its last line says why.
    """
    requirements = folder / "requirements.txt"
    requirements.write_text(f"{REQUIREMENT} --hash=sha256:{SHA256}\n", encoding="utf-8")
    options = ["--no-deps", "--no-binary", ":all:", "--disable-pip-version-check", "--dest", str(folder)]
    command = [sys.executable, "-m", "pip", "download", *options, "--requirement", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    archives = sorted(folder.glob("*.tar.gz"))
    if result.returncode or not archives:
        reason = (result.stderr.strip() or "no archive came").splitlines()[-1]
        raise DataError(f"expected pip to download {REQUIREMENT}, or --snippets ARCHIVE; pip says: {reason}")
    return archives[0]


def read_snippets(archive: Path, least: float = 1.0) -> dict[str, list[Row]]:
    """Read the snippets of each source whose mean rating, from -4 to 4, is at least ``least`` from 0.

    Nothing is unpacked to disk.

    Args:
        archive: The source distribution.
        least: The smallest absolute rating.

    Returns:
        Rows by source, labelled 0 (negative) and 1 (positive).

    Raises:
        DataError: The archive or a file in it is missing, or a line is not a rated snippet.
    """
    try:
        with (
            tarfile.open(archive) as outer,
            _member(outer, INNER_ARCHIVE, archive) as file,
            tarfile.open(fileobj=file) as inner,
        ):
            return {source: _rows(inner, f"{name}_GroundTruth.txt", archive, least) for source, name in SOURCES.items()}
    except OSError as error:
        raise DataError(f"{archive}: expected a readable archive, got: {error.strerror or error}") from error
    except (tarfile.TarError, EOFError) as error:
        reason = str(error).splitlines()[0].rstrip(":")
        raise DataError(f"{archive}: expected the source distribution of {REQUIREMENT}, got: {reason}") from error


@contextmanager
def _member(archive: tarfile.TarFile, ending: str, path: Path) -> Iterator[IO[bytes]]:
    name = next((name for name in archive.getnames() if name == ending or name.endswith(f"/{ending}")), None)
    file = None if name is None else archive.extractfile(name)
    if file is None:
        raise DataError(f"{path}: expected the file .../{ending} in it, got none")
    with file:
        yield file


def _rows(archive: tarfile.TarFile, name: str, path: Path, least: float) -> list[Row]:
    with _member(archive, name, path) as file:
        rated = [_rated(line, f"{path}:{name}:{number}") for number, line in enumerate(file, start=1)]
    rows = [row for score, row in rated if abs(score) >= least]
    if not rows:
        raise DataError(f"{path}:{name}: expected at least one snippet rated {least:g} or more from 0, got none")
    return rows


def _rated(line: bytes, where: str) -> tuple[float, Row]:
    """Read a line: identifier, mean rating and text, separated by tabs."""
    try:
        parts = line.decode("utf-8").rstrip("\r\n").split("\t")
    except UnicodeDecodeError as error:
        raise DataError(f"{where}: expected UTF-8, got: {error}") from error
    if len(parts) != 3:
        raise DataError(f"{where}: expected identifier, rating and text separated by tabs, got {len(parts)} columns")
    try:
        rating = float(parts[1])
    except ValueError:
        rating = math.nan
    if not math.isfinite(rating):
        raise DataError(f"{where}: expected a number as rating, got {parts[1]!r}")
    return rating, Row((parts[2],), POSITIVE if rating > 0 else NEGATIVE, where)
