"""The files of one rank."""

from __future__ import annotations

import pickle
from pathlib import Path
from typing import Any

from ruamel.yaml import YAML

SUFFIXES = (".yaml", ".pickle", "_fsdp.txt")


def free_stem(folder: Path, stage: str, rank: int) -> Path:
    """A path without suffix that no file of an earlier run has: ``memory_fit_rank_0``, ``memory_fit_2_rank_0``, ..."""
    number = 1
    while True:
        run = stage if number == 1 else f"{stage}_{number}"
        stem = folder / f"memory_{run}_rank_{rank}"
        if not any(stem.with_name(stem.name + suffix).exists() for suffix in SUFFIXES):
            return stem
        number += 1


def write(stem: Path, content: dict[str, Any], *, as_yaml: bool, as_pickle: bool) -> list[Path]:
    """Write the content in the wanted forms; return the files."""
    written = []
    if as_yaml:
        path = stem.with_name(f"{stem.name}.yaml")
        yaml = YAML(typ="safe", pure=True)
        yaml.default_flow_style = False
        yaml.sort_base_mapping_type_on_output = False  # type: ignore[assignment]
        with path.open("w", encoding="utf-8") as file:
            file.write("# Sizes are in bytes. Names of CUDA statistics are those of torch.cuda.memory_stats.\n")
            yaml.dump(content, file)
        written.append(path)
    if as_pickle:
        path = stem.with_name(f"{stem.name}.pickle")
        path.write_bytes(pickle.dumps(content))
        written.append(path)
    return written
