"""What is wrong with a configuration for a module, said before the first batch."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Iterator
from pathlib import Path

from torch import nn
from torch.distributed.fsdp import FSDPModule

from .config import MemProfilerCfg

DECORATED = "memprofilable"  # attribute of a decorated method


def check_module(cfg: MemProfilerCfg, module: nn.Module) -> None:
    """Raise a ValueError with all that is wrong, if anything is."""
    problems = [*_method_problems(cfg, module), *_attribute_problems(cfg, module)]
    if problems:
        raise ValueError("\n".join(["MemProfiler cannot work as it is configured:", *problems]))


def check_folder(folder: Path) -> None:
    """Make the folder of the files.

    Raises:
        ValueError: Nothing can be written there.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise ValueError(
            f"MemProfiler's save_dir: expected a folder that can be written to, got {str(folder)!r}: {error}"
        ) from error


def sharded_module(model: nn.Module, name: str) -> FSDPModule:
    """Find the module that FSDP2's tracker follows: the one of that name, or the outermost one.

    Raises:
        ValueError: There is none, it is not sharded, or several are outermost.
    """
    modules = dict(model.named_modules())
    sharded = [path for path, module in modules.items() if isinstance(module, FSDPModule)]
    outermost = [path for path in sharded if not any(_inside(path, other) for other in sharded)]
    if not sharded:
        raise ValueError(
            "track_fsdp_mem: expected a module under `torch.distributed.fsdp.fully_shard`, got none. "
            "Fix: use ModelParallelStrategy and shard modules in `configure_model` or by an `fsdp_plan`."
        )
    if name and name not in sharded:
        what = "a module that is not sharded" if name in modules else "no module of the model"
        near = difflib.get_close_matches(name, sharded, n=1) or sharded[:3]
        raise ValueError(
            f"fsdp_mem_tracker_root_module: expected a module under `fully_shard`, got {name!r}, {what}. "
            f"Fix: did you mean {' or '.join(map(repr, near))}?"
        )
    if not name and len(outermost) > 1:
        raise ValueError(
            f"track_fsdp_mem: expected one outermost module under `fully_shard`, got {', '.join(outermost)}. "
            "Fix: name one as fsdp_mem_tracker_root_module."
        )
    found = modules[name or outermost[0]]
    if not isinstance(found, FSDPModule):  # for the type checker: it was found among those
        raise TypeError(type(found).__name__)
    return found


def _inside(path: str, other: str) -> bool:
    return path != other and (other == "" or path.startswith(f"{other}."))


def decorated_methods(module: nn.Module) -> set[str]:
    """Names of the methods that are decorated in the module's class or one that it inherits from."""
    kinds = [vars(kind) for kind in type(module).__mro__]
    return {name for names in kinds for name, value in names.items() if getattr(value, DECORATED, False) is True}


def _method_problems(cfg: MemProfilerCfg, module: nn.Module) -> Iterator[str]:
    kind, decorated = type(module).__name__, decorated_methods(module)
    if not decorated:
        yield (
            f"{kind}: expected methods under @MemProfiler.memprofilable, got none. "
            "Fix: decorate the methods to measure, such as training_step, or set enabled to False."
        )
        return
    for field, names in cfg.collect_funcs.named().items():
        for name in sorted(names - decorated):
            what = "a method that is not decorated" if hasattr(type(module), name) else f"no method of {kind}"
            yield (
                f"collect_funcs.{field}: expected methods under @MemProfiler.memprofilable, got {name!r}, {what}. "
                f"{_suggestion(name, decorated)}"
            )
    known = set(dir(type(module)))
    for name in sorted(cfg.retain_hooks_for_funcs - known):
        yield f"retain_hooks_for_funcs: got {name!r}, no method of {kind}. {_suggestion(name, decorated)}"


def _suggestion(name: str, known: set[str]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    return f"Did you mean {near[0]!r}?" if near else f"Decorated: {', '.join(sorted(known))}."


def _attribute_problems(cfg: MemProfilerCfg, module: nn.Module) -> Iterator[str]:
    if not cfg.enable_memory_hooks:
        return
    for name in cfg.save_hook_attrs:
        for path, part in module.named_modules():
            if hasattr(part, name):
                yield (
                    f"save_hook_attrs: expected attributes that only hooks set, got {name!r}, which "
                    f"{path or type(module).__name__} has already. Fix: have the hook use another name."
                )
                break
