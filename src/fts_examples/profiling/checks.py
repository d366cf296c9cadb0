"""What is wrong with a configuration for a module, said before the first batch."""

from __future__ import annotations

import difflib
import tempfile
from collections.abc import Collection, Iterable, Iterator
from dataclasses import MISSING, fields, is_dataclass
from pathlib import Path
from types import FunctionType

from torch import nn
from torch.distributed.fsdp import FSDPModule

from .config import MemProfilerCfg, imported

DECORATED = "memprofilable"  # attribute of a decorated method
UNITS = ("B", "KiB", "MiB", "GiB")


def check_module(cfg: MemProfilerCfg, module: nn.Module) -> None:
    """Raise a ValueError with all that is wrong, if anything is."""
    problems = list(_kind_problems(cfg))
    if not problems:
        problems = [*_number_problems(cfg), *_function_problems(cfg), *_list_problems(cfg)]
    if not problems:
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


def sharded_module(model: nn.Module, name: str) -> str:
    """Name the module that FSDP2's tracker follows: the one of that name, or the outermost one.

    Raises:
        ValueError: There is none, it is not sharded, or several are outermost.
    """
    sharded = [path for path, module in model.named_modules() if isinstance(module, FSDPModule)]
    outermost = [path for path in sharded if not any(_inside(path, other) for other in sharded)]
    if not sharded:
        raise ValueError(
            "track_fsdp_mem: expected a module under `torch.distributed.fsdp.fully_shard`, got none. "
            "Fix: use ModelParallelStrategy and shard modules in `configure_model` or by an `fsdp_plan`."
        )
    if name and name not in sharded:
        known = name in dict(model.named_modules())
        what = "a module that is not sharded" if known else "no module of the model"
        raise ValueError(
            f"fsdp_mem_tracker_root_module: expected a module under `fully_shard`, got {name!r}, {what}. "
            f"{_suggestion(name, sharded, 'Sharded')}"
        )
    if not name and len(outermost) > 1:
        raise ValueError(
            f"track_fsdp_mem: expected one outermost module under `fully_shard`, got {', '.join(outermost)}. "
            "Fix: name one as fsdp_mem_tracker_root_module."
        )
    return name or outermost[0]


def decorated_methods(module: nn.Module) -> set[str]:
    """Names of the methods that are decorated in the module's class or one that it inherits from."""
    kinds = [vars(kind) for kind in type(module).__mro__]
    return {
        name
        for names in kinds
        for name, value in names.items()
        if isinstance(value, FunctionType) and getattr(value, DECORATED, False) is True
    }


def _inside(path: str, other: str) -> bool:
    return path != other and (other == "" or path.startswith(f"{other}."))


def _suggestion(name: str, known: Iterable[str], heading: str) -> str:
    near = difflib.get_close_matches(name, list(known), n=1)
    return f"Did you mean {near[0]!r}?" if near else f"{heading}: {', '.join(sorted(known))}."


def _kind_problems(cfg: MemProfilerCfg) -> Iterator[str]:
    for each in fields(cfg):
        default = each.default if each.default is not MISSING else getattr(MemProfilerCfg(), each.name)
        value, kind = getattr(cfg, each.name), type(default)
        if (kind is bool or is_dataclass(default)) and not isinstance(value, kind):
            yield f"{each.name}: expected a {kind.__name__}, got {value!r}."


def _number_problems(cfg: MemProfilerCfg) -> Iterator[str]:
    warmup, end, depth = cfg.schedule.warmup_iters, cfg.schedule.max_iter, cfg.fsdp_mem_track_module_depth
    wrong = [*_not_whole("schedule.warmup_iters", warmup), *_not_whole("fsdp_mem_track_module_depth", depth)]
    if end is not None:
        wrong += _not_whole("schedule.max_iter", end)
    yield from wrong
    if not wrong and end is not None and end <= warmup:
        yield (
            f"schedule: expected max_iter above warmup_iters, got {end} and {warmup}: no call would be measured. "
            "Fix: max_iter counts from the first call, those of the warm-up included."
        )
    if cfg.fsdp_mem_tracker_units not in UNITS:
        yield f"fsdp_mem_tracker_units: expected one of {', '.join(UNITS)}, got {cfg.fsdp_mem_tracker_units!r}."


def _not_whole(place: str, value: object) -> list[str]:
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return []
    return [f"{place}: expected a whole number of at least 0, got {value!r}."]


def _function_problems(cfg: MemProfilerCfg) -> Iterator[str]:
    for place in ("memory_hooks", "saved_tensors_funcs"):
        functions = getattr(cfg, place)
        of_ours = set()
        for each in fields(functions):
            try:
                of_ours.add(imported(getattr(functions, each.name)) is each.default)
            except ValueError as error:
                yield f"{place}.{each.name}: {error}"
        if len(of_ours) > 1:
            names = " and ".join(each.name for each in fields(functions))
            yield f"{place}: expected both {names}, got one of them. Fix: give both, they work together."


def _list_problems(cfg: MemProfilerCfg) -> Iterator[str]:
    lists: dict[str, object] = {
        "save_hook_attrs": cfg.save_hook_attrs,
        "retain_hooks_for_funcs": cfg.retain_hooks_for_funcs,
    }
    lists |= {f"collect_funcs.{each.name}": getattr(cfg.collect_funcs, each.name) for each in fields(cfg.collect_funcs)}
    for place, names in lists.items():
        if isinstance(names, str):
            yield f"{place}: expected a list of names, got {names!r}. Fix: write [{names!r}]."
        elif not isinstance(names, Collection) and not (names is None and place.startswith("collect_funcs.")):
            yield f"{place}: expected a list of names, got {names!r}."


def _method_problems(cfg: MemProfilerCfg, module: nn.Module) -> Iterator[str]:
    kind, decorated = type(module).__name__, decorated_methods(module)
    if not decorated:
        yield (
            f"{kind}: expected methods under @MemProfiler.memprofilable, got none. "
            "Fix: decorate the methods to measure, such as training_step, or set enabled to false."
        )
        return
    for field, names in cfg.collect_funcs.named().items():
        for name in sorted(set(names) - decorated):
            what = "a method that is not decorated" if hasattr(type(module), name) else f"no method of {kind}"
            yield (
                f"collect_funcs.{field}: expected methods under @MemProfiler.memprofilable, got {name!r}, {what}. "
                f"{_suggestion(name, decorated, 'Decorated')}"
            )
    for name in sorted(set(cfg.retain_hooks_for_funcs) - set(dir(type(module)))):
        yield (
            f"retain_hooks_for_funcs: expected methods under @MemProfiler.memprofilable, got {name!r}, "
            f"no method of {kind}. {_suggestion(name, decorated, 'Decorated')}"
        )


def _attribute_problems(cfg: MemProfilerCfg, module: nn.Module) -> Iterator[str]:
    for name in cfg.save_hook_attrs if cfg.enable_memory_hooks else ():
        owner = next(
            (path or type(module).__name__ for path, part in module.named_modules() if hasattr(part, name)), ""
        )
        if owner:
            yield (
                f"save_hook_attrs: expected attributes that only hooks set, got {name!r}, which {owner} has already. "
                "Fix: have the hook use another name."
            )
