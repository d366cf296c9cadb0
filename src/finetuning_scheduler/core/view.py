"""A model as its schedule sees it, whatever wrappers and strategies have made of its modules and parameters."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import UninitializedParameter

from ..errors import Problem, ScheduleError
from .schedule.blocks import parameter_size, told_blocks
from .schedule.names import frozen_by_others
from .schedule.schedule import Schedule
from .schedule.wording import listed

# What fully sharded data parallel, activation checkpointing and `torch.compile` call the module they wrap. State
# dictionaries leave these out of their keys, apart from the last.
WRAPPED = ("_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod")
CONTAINERS = (nn.ModuleList, nn.ModuleDict, nn.ParameterList, nn.ParameterDict)  # they have no forward pass
SPARSE_MODULES = (nn.Embedding, nn.EmbeddingBag)  # modules whose parameters can have sparse gradients
_BUILDING_BLOCKS = (nn.Sequential, *CONTAINERS)


def plain_name(name: str) -> str:
    """Return the name that a parameter or module has without wrappers."""
    return ".".join(part for part in name.split(".") if part not in WRAPPED)


@dataclass(frozen=True)
class ModelView:
    """The parameters a schedule names, and the tensors that are trained for them.

    Args:
        model: The model that is trained.
        plain: A module of the same structure without wrappers, whose parameters have the names and shapes that the
            user knows. Only its structure is used.
        tensors: By each of these names, the tensor in ``model`` that the optimizer holds. A tensor that several
            parameters have been flattened into stands under the name of each.
    """

    model: nn.Module
    plain: nn.Module
    tensors: Mapping[str, nn.Parameter]

    @classmethod
    def of(cls, model: nn.Module) -> ModelView:
        """View a model whose parameters are all there, each a tensor of its own."""
        tensors = {plain_name(name): parameter for name, parameter in model.named_parameters()}
        return cls(model, unwrapped(model), tensors)

    @cached_property
    def trained(self) -> Mapping[str, nn.Parameter]:
        """Each tensor once, by the first of its names."""
        return {names[0]: self.tensors[names[0]] for names in self.names_of.values()}

    @property
    def frozen(self) -> frozenset[str]:
        """The names of the parameters that somebody else than a schedule has frozen, and that could be trained."""
        return frozen_by_others(self.tensors.items())

    @cached_property
    def names_of(self) -> Mapping[int, tuple[str, ...]]:
        """By the identity of each tensor, the names of the parameters it holds."""
        names: dict[int, list[str]] = {}
        for name, tensor in self.tensors.items():
            names.setdefault(id(tensor), []).append(name)
        return {key: tuple(held) for key, held in names.items()}

    @cached_property
    def sizes(self) -> Mapping[str, int]:
        """The number of values that each tensor in :attr:`trained` stands for, on all devices together."""
        return self.counted()

    @property
    def has_lazy(self) -> bool:
        """Whether there are parameters that get their shape in the first forward pass."""
        return any(isinstance(tensor, UninitializedParameter) for tensor in self.trained.values())

    def counted(self) -> dict[str, int]:
        """Count the values anew; a parameter without a shape has none yet."""
        sizes = {name: parameter_size(parameter) for name, parameter in self.plain.named_parameters()}
        return {name: sum(sizes[held] for held in self.names_of[id(tensor)]) for name, tensor in self.trained.items()}

    def renamed(self, named: Mapping[str, nn.Parameter]) -> ModelView:
        """Return a view of the same model by other names of its parameters; what is not named is not in it.

        Raises:
            ScheduleError: These are no names, or names of something else.
        """
        given: Mapping[Any, Any] = named
        wrong = [name for name, it in given.items() if not (isinstance(name, str) and name and id(it) in self.names_of)]
        if wrong or not named:
            got = f"something else under {listed([str(name) for name in wrong])}" if wrong else "none"
            raise ScheduleError(
                Problem(
                    f"expected the parameters of the module, each under a name for schedules, got {got}",
                    "Return a mapping of names to parameters of `named_parameters()`.",
                )
            )
        return ModelView(self.model, named_structure(named, type(self.plain).__name__), named)

    def names_for(self, names: Iterable[str], other: ModelView) -> tuple[str, ...]:
        """Tell the names in another view of the tensors that have these names in this one."""
        return tuple(dict.fromkeys(name for own in names for name in other.names_of[id(self.tensors[own])]))

    def merged(self, names: Iterable[str]) -> list[str]:
        """Leave out the names of parameters whose tensor has another name in :attr:`trained`."""
        return [name for name in names if name in self.trained or name not in self.tensors]

    def expanded(self, names: Iterable[str]) -> list[str]:
        """Undo :meth:`merged`: list every parameter that the tensors hold."""
        return [held for name in names for held in self.names_of.get(id(self.trained.get(name)), (name,))]

    def merged_schedule(self, schedule: Schedule) -> Schedule:
        """Name each tensor once in a schedule of full names."""
        if len(self.trained) == len(self.tensors):
            return schedule
        phases = (phase.model_copy(update={"params": tuple(self.merged(phase.params))}) for phase in schedule.phases)
        return Schedule(phases=tuple(phases))


def unwrapped(model: nn.Module) -> nn.Module:
    """Return the model itself if nothing in it is wrapped, else a copy of its structure without the wrappers.

    The copy's modules are of classes with the names of the model's, its parameters hold no values.
    """
    if any(name.rpartition(".")[2] in WRAPPED for name, _ in model.named_modules()):
        return structure_of(model, {})
    return model


def without_values(shape: torch.Size, dtype: torch.dtype) -> nn.Parameter:
    """Make a parameter that takes no memory."""
    return nn.Parameter(torch.empty(shape, dtype=dtype, device="meta"), requires_grad=False)


def named_structure(named: Mapping[str, nn.Parameter], title: str) -> nn.Module:
    """Make a module of a class with this title whose parameters, without values, have these dotted names."""
    root: nn.Module = type(title, (nn.Module,), {})()
    made: dict[int, nn.Parameter] = {}
    for name, tensor in named.items():
        *path, last = name.split(".")
        module = root
        for part in path:
            if part not in module._modules:
                module._modules[part] = nn.Module()  # under any name, also one that modules have an attribute of
            module = module.get_submodule(part)
        like = tensor if isinstance(tensor, UninitializedParameter) else without_values(tensor.shape, tensor.dtype)
        module._parameters[last] = made.setdefault(id(tensor), like)
    return root


def structure_of(
    model: nn.Module, replacements: Mapping[int, Mapping[str, nn.Parameter]], left_out: str | None = None
) -> nn.Module:
    """Copy the structure of a model: names of classes, modules and parameters, shapes; no wrappers and no values.

    Args:
        model: The model.
        replacements: By the identity of a module, what is to stand for its own parameters of these names.
        left_out: What a parameter is called that is not copied.
    """
    return _Structure(replacements, left_out).module_like(model)


class _Structure:
    """Makes a copy of one model's structure; parameters that it shares are shared in the copy."""

    def __init__(self, replacements: Mapping[int, Mapping[str, nn.Parameter]], left_out: str | None) -> None:
        self._replacements = replacements
        self._left_out = left_out
        self._parameters: dict[int, nn.Parameter] = {}
        self._classes: dict[type, type[nn.Module]] = {}

    def module_like(self, module: nn.Module) -> nn.Module:
        children = module._modules  # `named_children` leaves out a child's second name
        inner = next((children[name] for name in WRAPPED if children.get(name) is not None), None)
        if inner is not None:
            return self.module_like(inner)
        copy = self._class_like(module)()
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        for name, parameter in {**own, **self._replacements.get(id(module), {})}.items():
            if name != self._left_out:
                copy.register_parameter(name, self._parameter_like(parameter))
        for name, child in children.items():
            if child is not None:
                copy.add_module(name, self.module_like(child))
        if isinstance(module, SPARSE_MODULES):
            vars(copy)["sparse"] = module.sparse
        return copy

    def _parameter_like(self, parameter: nn.Parameter) -> nn.Parameter:
        if isinstance(parameter, UninitializedParameter):
            return parameter
        if id(parameter) not in self._parameters:
            self._parameters[id(parameter)] = without_values(parameter.shape, parameter.dtype)
        return self._parameters[id(parameter)]

    def _class_like(self, module: nn.Module) -> type[nn.Module]:
        """Return a class of that name without its methods, which may need what its constructor sets."""
        kind = type(module)
        if kind in _BUILDING_BLOCKS:
            return kind
        if kind not in self._classes:
            base = next((known for known in (*_BUILDING_BLOCKS, *SPARSE_MODULES) if issubclass(kind, known)), nn.Module)
            self._classes[kind] = type(kind.__name__, (base,), {"__init__": nn.Module.__init__, **told_blocks(module)})
        return self._classes[kind]


def sparse_parameters(model: nn.Module) -> frozenset[str]:
    """Name the parameters whose gradients are sparse: the weights of embeddings made with ``sparse=True``."""
    return frozenset(
        f"{name}.weight" if name else "weight"
        for name, module in model.named_modules()
        if isinstance(module, SPARSE_MODULES) and module.sparse
    )
