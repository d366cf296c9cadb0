"""A model as far as it is known without its weights."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from math import prod
from typing import TYPE_CHECKING

from ..core.schedule.names import ParameterIndex, frozen_by_others

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ..core.view import ModelView
    from .shapes import ModelSummary

_WITH_GRADIENT = ("float", "bfloat", "complex")
BYTES = {
    **dict.fromkeys(["bool", "int8", "uint8"], 1),
    **dict.fromkeys(["int16", "uint16", "float16", "bfloat16"], 2),
    **dict.fromkeys(["int32", "uint32", "float32"], 4),
    **dict.fromkeys(["int64", "uint64", "float64", "complex64"], 8),
    "complex128": 16,
}


@dataclass(frozen=True)
class TensorFacts:
    """A tensor without its values.

    Attributes:
        shape: Its shape.
        dtype: PyTorch's name of its type, such as ``float32``.
    """

    shape: tuple[int, ...]
    dtype: str = "float32"

    @property
    def size(self) -> int:
        """How many values it has."""
        return prod(self.shape)

    @property
    def bytes(self) -> int:
        """How much memory its values take."""
        return self.size * BYTES.get(self.dtype, 1)

    @property
    def has_gradient(self) -> bool:
        """Whether a parameter of its type can be trained."""
        return self.dtype.startswith(_WITH_GRADIENT)


@dataclass(frozen=True)
class ModelOutline:
    """A model as far as it is known without its weights.

    Attributes:
        title: The name of its class, or of its file.
        source: What the user has named.
        parameters: Its parameters, tied ones once, in the order of registration if that is known, else guessed from
            the names: embeddings, blocks, head.
        tied: The other names of tied parameters, each with the registered one.
        buffers: Its buffers.
        classes: By the path of a module, the name of its class, where known.
        frozen: Parameters that come with ``requires_grad=False``.
        module: The model itself, on the meta device where possible; ``None`` if only its names are known.
        notes: What a user should know of where this comes from, one line each.
    """

    title: str
    source: str
    parameters: Mapping[str, TensorFacts]
    tied: Mapping[str, str] = field(default_factory=dict)
    buffers: Mapping[str, TensorFacts] = field(default_factory=dict)
    classes: Mapping[str, str] = field(default_factory=dict)
    frozen: frozenset[str] = frozenset()
    module: nn.Module | None = None
    notes: tuple[str, ...] = ()

    @cached_property
    def total(self) -> int:
        """How many values its parameters have."""
        return self.sizes_of(self.parameters)

    def sizes_of(self, names: Iterable[str]) -> int:
        """How many values some parameters have."""
        return sum(self.parameters[name].size for name in names)

    @cached_property
    def index(self) -> ParameterIndex:
        """Its names, for look-ups; needs no PyTorch."""
        fixed = {name: f"torch.{facts.dtype}" for name, facts in self.parameters.items() if not facts.has_gradient}
        return ParameterIndex(tuple(self.parameters), dict(self.tied), fixed)

    @cached_property
    def structure(self) -> nn.Module:
        """The model as a module without values: itself, or modules made of the names."""
        return self.module if self.module is not None else _module_of(self)

    @cached_property
    def block_of(self) -> Mapping[str, str]:
        """The block of each parameter that is in one."""
        from ..core.schedule.blocks import blocks_of

        return blocks_of(self.structure)

    @cached_property
    def view(self) -> ModelView:
        """The model as the engine sees it."""
        from ..core.view import ModelView

        return ModelView.of(self.structure)

    @property
    def buffer_tensors(self) -> Iterator[torch.Tensor]:
        """Its buffers, without values."""
        import torch

        for facts in self.buffers.values():
            yield torch.empty(facts.shape, dtype=getattr(torch, facts.dtype, torch.float32), device="meta")

    @classmethod
    def of_module(cls, module: nn.Module, source: str, notes: tuple[str, ...] = ()) -> ModelOutline:
        """Outline a model that is there."""
        parameters: dict[str, TensorFacts] = {}
        tied: dict[str, str] = {}
        registered: dict[int, str] = {}
        for name, tensor in module.named_parameters(remove_duplicate=False):
            if id(tensor) in registered:
                tied[name] = registered[id(tensor)]
            else:
                registered[id(tensor)] = name
                parameters[name] = facts_of(tensor)
        return cls(
            title=type(module).__name__,
            source=source,
            parameters=parameters,
            tied=tied,
            buffers={name: facts_of(tensor) for name, tensor in module.named_buffers()},
            classes={name: type(inner).__name__ for name, inner in module.named_modules()},
            frozen=frozen_by_others(module.named_parameters()),
            module=module,
            notes=notes,
        )

    @property
    def summary(self) -> ModelSummary:
        """What ``--json`` says of it."""
        from .shapes import ModelSummary

        return ModelSummary(
            name=self.title,
            source=self.source,
            tensors=len(self.parameters),
            parameters=self.total,
            notes=list(self.notes),
        )

    def with_notes(self, *notes: str) -> ModelOutline:
        """Add what a user should know."""
        return replace(self, notes=(*self.notes, *notes))


def facts_of(tensor: object) -> TensorFacts:
    """Tell shape and type of a tensor; a lazy parameter has no values yet."""
    shape = () if "Uninitialized" in type(tensor).__name__ else tuple(getattr(tensor, "shape", ()))
    dtype = str(getattr(tensor, "dtype", "")).removeprefix("torch.")
    return TensorFacts((0,) if "Uninitialized" in type(tensor).__name__ else shape, dtype)


# Buffers as their names tell, in files that do not say what is a parameter.
_BUFFERS = re.compile(
    r"(^|\.)(running_mean|running_var|num_batches_tracked|position_ids|token_type_ids|inv_freq|masked_bias"
    r"|relative_position_index|rotary_emb\..*)$"
)


def is_buffer(name: str, facts: TensorFacts) -> bool:
    """Guess by name and type whether a tensor of a file is a buffer: no file says it.

    Besides the names of PyTorch's and Hugging Face's buffers, these are tensors of whole numbers without a quantiser's
    scales, and causal masks, which GPT-2 calls ``bias`` (1, 1, n, n).
    """
    if _BUFFERS.search(name) or facts.dtype in ("bool", "int64", "int32"):
        return True
    return name.endswith(".bias") and len(facts.shape) == 4 and facts.shape[:2] == (1, 1)


_ROLES: tuple[tuple[str, float], ...] = (
    (r"(\w*_)?(embed\w*|emb|wte|wpe|shared|stem|patchifier)|cls_token|mask_token|reg_token|conv1|bn1|conv_stem", 0),
    (r"weight|encoder\w*|features|backbone|body|vision\w*|visual", 1),
    (r"decoder\w*|language\w*|text\w*", 3),
    (r"(\w*_)?(norm\w*|ln_f|layernorm|layer_norm|pooler|projector|projection)|LayerNorm", 4),
    (r"(\w*_)?(head\w*|classifier|fc|score|output_layer|logit_scale)", 5),
)
_AS_ROLE = tuple((re.compile(pattern), rank) for pattern, rank in _ROLES)


def guessed_order(names: Iterable[str]) -> list[str]:
    """Order names as models register them, as far as names tell: embeddings, blocks by number, norm, head."""
    ranks: dict[str, tuple[float, str, int, str]] = {}

    def rank(part: str) -> tuple[float, str, int, str]:
        if part not in ranks:
            role = next((value for pattern, value in _AS_ROLE if pattern.fullmatch(part)), 2.0)
            word, digits = re.fullmatch(r"(.*?)(\d*)", part).groups()  # type: ignore[union-attr]  # matches anything
            ranks[part] = (role, word, int(digits or -1), part)
        return ranks[part]

    return sorted(names, key=lambda name: [rank(part) for part in name.split(".")])


def _module_of(outline: ModelOutline) -> nn.Module:
    """Make modules of names; modules with the same names inside are of one class, as blocks are."""
    made: dict[str, nn.Parameter] = {name: _parameter(facts) for name, facts in outline.parameters.items()}
    made |= {alias: made[name] for alias, name in outline.tied.items()}
    tree: dict[str, object] = {}
    for name, parameter in made.items():
        *path, last = name.split(".")
        level = tree
        for part in path:
            inner = level.setdefault(part, {})
            level = inner if isinstance(inner, dict) else {}
        level[last] = parameter
    return _Maker(outline.title).module(tree, root=True)


class _Maker:
    """Makes modules of nested names."""

    def __init__(self, title: str) -> None:
        self._title = title
        self._classes: dict[str, type[nn.Module]] = {}

    def module(self, tree: Mapping[str, object], *, root: bool = False) -> nn.Module:
        from torch import nn

        children = {name: self.module(inner) for name, inner in tree.items() if isinstance(inner, dict)}
        own = {name: inner for name, inner in tree.items() if isinstance(inner, nn.Parameter)}
        inside = " ".join([*own, *(f"{name}:{type(child).__name__}" for name, child in children.items())])
        numbered = bool(children) and not own and all(name.isdigit() for name in children)
        module = nn.ModuleList() if numbered and not root else self._class(inside, root=root)()
        module._modules.update(children)  # under any name, also one that modules have an attribute of
        module._parameters.update(own)
        return module

    def _class(self, inside: str, *, root: bool) -> type[nn.Module]:
        from torch import nn

        title = self._title if root else f"Module{len(self._classes)}"
        if root:
            return type(title, (nn.Module,), {})
        if inside not in self._classes:
            self._classes[inside] = type(title, (nn.Module,), {})
        return self._classes[inside]


def _parameter(facts: TensorFacts) -> nn.Parameter:
    import torch
    from torch import nn

    dtype = getattr(torch, facts.dtype, torch.float32)
    return nn.Parameter(torch.empty(facts.shape, dtype=dtype, device="meta"), requires_grad=facts.has_gradient)
