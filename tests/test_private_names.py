"""Private names of PyTorch and Lightning: each that the package uses exists, and each that it uses is in a table here.

Such a name may go with any release. Then a test here fails, and not a user's run.
"""

from __future__ import annotations

import ast
import importlib
import importlib.util
import inspect
import pkgutil
import re
import textwrap
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType

import lightning.pytorch  # before the stand-alone package, so that other tests go on with this one
import pytest
import torch
import transformers
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.fsdp.wrap import CustomPolicy
from torch.nn.parallel import DistributedDataParallel
from torch.optim import LBFGS, SGD, Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, ConstantLR, SequentialLR

import finetuning_scheduler

PACKAGE = finetuning_scheduler.__name__
SOURCES = Path(finetuning_scheduler.__file__).parent
FOREIGN = ("torch", "lightning", "lightning_fabric", "pytorch_lightning")


@dataclass(frozen=True)
class Row:
    """One private name.

    Args:
        owner: Makes the smallest object that has the name.
        name: The name.
        use: What the package uses it for.
    """

    owner: Callable[..., object]
    name: str
    use: str


# --- what the package uses -------------------------------------------------------------------------------------------


def optimizer() -> Optimizer:
    return SGD(nn.Linear(1, 1).parameters(), lr=0.1)


def constant() -> ConstantLR:
    return ConstantLR(optimizer())


def sequential() -> SequentialLR:
    owner = optimizer()
    return SequentialLR(owner, [ConstantLR(owner), ConstantLR(owner)], milestones=[1])


def chained() -> ChainedScheduler:
    return ChainedScheduler([constant()])


def lbfgs() -> LBFGS:
    return LBFGS(nn.Linear(1, 1).parameters())


def custom_policy() -> CustomPolicy:
    return CustomPolicy(lambda module: False)


def compiled() -> object:
    return torch.compile(nn.Linear(1, 1), backend="eager")


def checkpointed() -> nn.Module:
    return checkpoint_wrapper(nn.Linear(1, 1))


def torch_() -> ModuleType:
    return torch


def torch_distributed() -> ModuleType:
    return importlib.import_module("torch.distributed")


def distributed_algorithms() -> ModuleType:
    return importlib.import_module("torch.distributed.algorithms")


def batchnorm() -> ModuleType:
    return importlib.import_module("torch.nn.modules.batchnorm")


def of_transformers() -> nn.Module:
    config = transformers.ViTConfig(hidden_size=4, num_hidden_layers=1, num_attention_heads=1, intermediate_size=4)
    return transformers.ViTModel(config)


def torch_utils() -> ModuleType:
    return importlib.import_module("torch.utils")


def dispatch_mode() -> object:
    return importlib.import_module("torch.utils._python_dispatch").TorchDispatchMode


def operation() -> object:
    return torch.ops.aten.relu_.default


def compiled_in_place() -> nn.Module:
    module = nn.Linear(1, 1)
    module.compile(backend="eager")
    return module


TORCH = [
    Row(constant, "_last_lr", "grows with the parameter groups"),
    Row(sequential, "_schedulers", "the schedulers one is made of"),
    Row(sequential, "_milestones", "which of them is at work"),
    Row(chained, "_schedulers", "the schedulers one is made of"),
    Row(lbfgs, "_params", "the only group's parameters under another name"),
    Row(optimizer, "_optimizer_step_post_hooks", "whether hooks tell of an optimizer's steps"),
    Row(optimizer, "_optimizer_load_state_dict_pre_hooks", "whether an optimizer loads its state in linear time"),
    Row(optimizer, "_process_value_according_to_param_policy", "of which kind a tensor of the state is"),
    Row(nn.Module, "_non_persistent_buffers_set", "buffers that are no part of a best state"),
    Row(nn.Module, "_modules", "all children, a child's second name included"),
    Row(nn.Module, "_parameters", "given to modules that are made of names, whatever these are"),
    Row(of_transformers, "_no_split_modules", "the classes of a model's blocks"),
    Row(nn.Module, "_load_from_state_dict", "a module's own values, loaded with its hooks"),
    Row(nn.Module, "_load_state_dict_pre_hooks", "whether a module loads its values alone"),
    Row(nn.Module, "_load_state_dict_post_hooks", "the same, and hooks that are called when it has loaded them"),
    Row(lambda: nn.Module().state_dict(), "_metadata", "versions of layers, which these ask for when they load"),
    Row(compiled, "_orig_mod", "left out of parameter names"),
    Row(checkpointed, "_checkpoint_wrapped_module", "left out of parameter names"),
    Row(custom_policy, "_lambda_fn", "a wrapping policy that is extended"),
    Row(torch_, "_dynamo", "how many graphs a model may have"),
    Row(torch_distributed, "_composable", "activation checkpointing without wrappers"),
    Row(distributed_algorithms, "_checkpoint", "wrappers for activation checkpointing and offloading"),
    Row(nn.Module, "_parameters", "whether a frozen module is what it was, asked before each step"),
    Row(nn.Module, "_buffers", "whether a frozen module is what it was, asked before each step"),
    Row(nn.Module, "_forward_hooks", "modules whose calls somebody is told of are not skipped"),
    Row(nn.Module, "_forward_pre_hooks", "modules whose calls somebody is told of are not skipped"),
    Row(nn.Module, "_backward_hooks", "modules whose calls somebody is told of are not skipped"),
    Row(nn.Module, "_backward_pre_hooks", "modules whose calls somebody is told of are not skipped"),
    Row(compiled_in_place, "_compiled_call_impl", "what is called of a module that is compiled in place"),
    Row(
        lambda: torch.zeros(1), "_version", "whether a tensor was changed in place; PyTorch's notes on autograd name it"
    ),
    Row(torch_utils, "_python_dispatch", "operations are watched, as PyTorch's notes on extending it show"),
    Row(dispatch_mode, "_should_skip_dynamo", "watching operations does not import the compiler"),
    Row(operation, "_schema", "which arguments an operation changes in place"),
    Row(batchnorm, "_BatchNorm", "the common class of layers that track statistics"),
]


def replicated() -> DistributedDataParallel:
    return DistributedDataParallel(nn.Linear(1, 1))


def zero() -> Optimizer:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of PyTorch's own, when it is imported
        from torch.distributed.optim import ZeroRedundancyOptimizer
    return ZeroRedundancyOptimizer(nn.Linear(1, 1).parameters(), SGD, lr=0.1)


def unit() -> FullyShardedDataParallel:
    return FullyShardedDataParallel(nn.Linear(1, 1), device_id=torch.device("cpu"))


def flat_parameter() -> object:
    """The tensor of a unit between its forward and its backward pass."""
    module = unit()
    module(torch.ones(1, 1))
    return next(handle.flat_param for handle in vars(module).values() if hasattr(handle, "flat_param"))


IN_A_PROCESS_GROUP = [
    Row(replicated, "_comm_hooks", "registered anew on the module that is wrapped anew"),
    Row(zero, "_optim_constructor", "the class that is made anew when its parameters change"),
    Row(zero, "_optim_defaults", "its arguments"),
    Row(zero, "_overlap_with_ddp", "refused"),
    Row(unit, "_fsdp_wrapped_module", "left out of parameter names"),
    Row(unit, "_flat_param", "the tensor a unit has flattened its parameters into"),
    Row(flat_parameter, "_param_infos", "the names of the parameters in it"),
    Row(flat_parameter, "_shapes", "their shapes"),
    Row(flat_parameter, "_shared_param_infos", "those that are tied to another"),
    Row(flat_parameter, "_post_backward_hook_state", "taken away from units that are thawed later"),
]


def trainer(pl: ModuleType) -> object:
    return pl.Trainer(
        accelerator="cpu",
        devices=1,
        logger=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        enable_progress_bar=False,
    )


def checkpoint_connector(pl: ModuleType) -> object:
    return getattr(trainer(pl), "_checkpoint_connector")  # noqa: B009  # a name of the table


def accelerator_connector(pl: ModuleType) -> object:
    return getattr(trainer(pl), "_accelerator_connector")  # noqa: B009  # a name of the table


def early_stopping(pl: ModuleType) -> object:
    return pl.callbacks.EarlyStopping("loss")


def model_checkpoint(pl: ModuleType) -> object:
    return pl.callbacks.ModelCheckpoint()


def validation_loop(pl: ModuleType) -> object:
    return trainer(pl).fit_loop.epoch_loop.val_loop


def ddp_strategy(pl: ModuleType) -> object:
    return pl.strategies.DDPStrategy()


def fsdp_strategy(pl: ModuleType) -> object:
    return pl.strategies.FSDPStrategy()


def model_parallel_strategy(pl: ModuleType) -> object:
    return pl.strategies.ModelParallelStrategy()


def exceptions(pl: ModuleType) -> object:
    return importlib.import_module(f"{pl.__name__}.utilities.exceptions")


def launchers(pl: ModuleType) -> object:
    return importlib.import_module(f"{pl.__name__}.strategies.launchers")


def optimizer_setup(pl: ModuleType) -> object:
    return importlib.import_module(f"{pl.__name__}.core.optimizer")


def lightning_module(pl: ModuleType) -> object:
    return pl.LightningModule()


LIGHTNING = [
    Row(optimizer_setup, "_init_optimizers_and_lr_schedulers", "a plan needs the optimizer of a fit"),
    Row(trainer, "_data_connector", "the number of steps, which optimizers ask for, needs the data of a plan"),
    Row(lightning_module, "_trainer", "a module that is planned gets its trainer back, or none"),
    Row(exceptions, "_TunerExitException", "ends a fit as one that has done its work"),
    Row(launchers, "_MultiProcessingLauncher", "whether another process waits for what a fit returns"),
    Row(trainer, "_teardown", "the last that is called when such a fit ends"),
    Row(trainer, "_checkpoint_connector", "restores weights, precision and data at a transition"),
    Row(trainer, "_accelerator_connector", "how the user has named the strategy"),
    Row(checkpoint_connector, "_loaded_checkpoint", "what is restored"),
    Row(accelerator_connector, "_strategy_flag", "how the user has named the strategy"),
    Row(early_stopping, "_check_on_train_epoch_end", "when the check runs"),
    Row(early_stopping, "_evaluate_stopping_criteria", "its verdict ends a phase instead of the session"),
    Row(early_stopping, "_run_early_stopping_check", "a resumed run meets a validation that nobody has judged yet"),
    Row(early_stopping, "_validate_condition_metric", "a metric that is missing is a configuration error"),
    Row(model_checkpoint, "_save_checkpoint", "the best depth is up to date before a file is written"),
    Row(model_checkpoint, "_save_topk_checkpoint", "what is no longer among the best goes later"),
    Row(model_checkpoint, "_save_last_checkpoint", "when the last checkpoint knows of it"),
    Row(model_checkpoint, "_remove_checkpoint", "when the last checkpoint knows of it"),
    Row(model_checkpoint, "_ModelCheckpoint__resolve_ckpt_dir", "where one saves that has been given no directory"),
    Row(model_checkpoint, "_enable_version_counter", "part of a configuration"),
    Row(model_checkpoint, "_every_n_epochs", "part of a configuration"),
    Row(model_checkpoint, "_every_n_train_steps", "part of a configuration"),
    Row(model_checkpoint, "_train_time_interval", "part of a configuration"),
    Row(model_checkpoint, "_last_checkpoint_saved", "forgotten when a fit starts clean"),
    Row(model_checkpoint, "_last_global_step_saved", "a step is not saved twice by a resume"),
    Row(model_checkpoint, "_last_time_checked", "forgotten when a fit starts clean"),
    Row(validation_loop, "_results", "which metrics validation has logged"),
    Row(ddp_strategy, "_ddp_kwargs", "the module is wrapped anew without sending its weights"),
    Row(ddp_strategy, "_setup_model", "the module is wrapped anew"),
    Row(fsdp_strategy, "_state_dict_type", "whether each rank saves its shards"),
    Row(model_parallel_strategy, "_save_distributed_checkpoint", "whether each rank saves its shards"),
]

TABLE = [*TORCH, *IN_A_PROCESS_GROUP, *LIGHTNING]


def each(table: list[Row]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("row", table, ids=[f"{row.owner.__name__}.{row.name}" for row in table])


def exists(owner: object, name: str) -> bool:
    if isinstance(owner, nn.Module) and name in dict(owner.named_children()):
        return True
    if isinstance(owner, ModuleType) and not hasattr(owner, name):
        return importlib.util.find_spec(f"{owner.__name__}.{name}") is not None
    return hasattr(owner, name)


@pytest.fixture(scope="module")
def process_group(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    store = tmp_path_factory.mktemp("group") / "store"
    torch.distributed.init_process_group("gloo", init_method=store.as_uri(), rank=0, world_size=1)
    try:
        yield
    finally:
        torch.distributed.destroy_process_group()


@each(TORCH)
def test_private_name_of_torch_exists(row: Row) -> None:
    assert exists(row.owner(), row.name), f"PyTorch {torch.__version__} has no {row.name}: {row.use}"


@each(IN_A_PROCESS_GROUP)
@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`")
def test_private_name_of_torch_exists_in_a_process_group(row: Row) -> None:
    assert exists(row.owner(), row.name), f"PyTorch {torch.__version__} has no {row.name}: {row.use}"


@pytest.mark.parametrize("package", ["lightning.pytorch", "pytorch_lightning"])
@each(LIGHTNING)
def test_private_name_of_lightning_exists(row: Row, package: str) -> None:
    pl = importlib.import_module(package)
    assert exists(row.owner(pl), row.name), f"{package} {pl.__version__} has no {row.name}: {row.use}"


@pytest.mark.parametrize(
    "owner", [nn.Linear(1, 1), torch.nn, lightning.pytorch.Trainer], ids=["instance", "module", "class"]
)
def test_a_name_that_does_not_exist_is_noticed(owner: object) -> None:
    assert not exists(owner, "_no_such_name")


# --- finding them in the sources -------------------------------------------------------------------------------------

PRIVATE = re.compile(r"_[A-Za-z]\w*(?<!__)")
DOTTED = re.compile(r"[\w.]*\w\.[\w.]+|\.[\w.]+")
DOCUMENTED = ("_asdict", "_fields", "_make", "_replace")  # of named tuples: private by their looks only


def is_private(word: str) -> bool:
    return PRIVATE.fullmatch(word) is not None and word not in DOCUMENTED


def definitions(tree: ast.AST) -> set[str]:
    """The names that a module or class defines: functions, classes, variables, attributes that its methods set."""
    found: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            found.add(node.name)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            found.add(node.id)
        elif isinstance(node, ast.alias) and node.asname:
            found.add(node.asname)
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and is_own_object(node.value):
            found.add(node.attr)
    return found


def is_own_object(receiver: ast.expr) -> bool:
    """Whether what stands before the dot is an object of the class that is written there."""
    if isinstance(receiver, ast.Call):
        return isinstance(receiver.func, ast.Name) and receiver.func.id == "super"
    return isinstance(receiver, ast.Name) and receiver.id in ("self", "cls")


def mentioned(node: ast.AST, in_package: set[str], in_module: set[str]) -> list[str]:
    """The private names of others that a node mentions, but for the parts of it that are nodes themselves."""
    words: list[str] = []
    if isinstance(node, ast.Attribute):
        # Only a class's own methods reach its private attributes from another module.
        own = in_package if is_own_object(node.value) else in_module
        words = [node.attr] if node.attr not in own else []
    elif isinstance(node, ast.ImportFrom) and node.level == 0:
        words = [*(node.module or "").split("."), *(alias.name for alias in node.names)]
    elif isinstance(node, ast.Import):
        words = [word for alias in node.names for word in alias.name.split(".")]
    elif isinstance(node, ast.keyword) and node.arg:
        words = [node.arg] if node.arg not in in_package else []
    elif isinstance(node, ast.Constant) and isinstance(node.value, str):
        # "_name", as for `getattr`, or "package._module"; a private first part of several is the end of a file's name.
        dotted = DOTTED.fullmatch(node.value)
        words = node.value.split(".")[1:] if dotted else [node.value]
        words = [word for word in words if word not in in_package]
    return [word for word in words if is_private(word)]


def private_names(
    sources: Mapping[str, str], overridden: set[str] | frozenset[str] = frozenset()
) -> dict[str, list[str]]:
    """Find the private names of others in sources.

    Args:
        sources: The text of each module by its path.
        overridden: Names that classes in these modules define, but that a foreign parent has too.

    Returns:
        By name, the places it is used at.
    """
    trees = {path: ast.parse(text) for path, text in sources.items()}
    defined = {path: definitions(tree) - overridden for path, tree in trees.items()}
    in_package = set().union(*defined.values())
    places: dict[str, list[str]] = defaultdict(list)
    for path, tree in trees.items():
        # The end of an f-string, as in f"{kind}_schedule", is no name.
        ends = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
        for node in ast.walk(tree):
            if id(node) in ends and isinstance(node, ast.Constant) and not node.value.startswith("."):
                continue
            if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) and node.name in overridden:
                places[node.name].append(f"{path}:{node.lineno}")
            for word in mentioned(node, in_package, defined[path]):
                places[word].append(f"{path}:{getattr(node, 'lineno', 0)}")
    return places


def package_modules() -> Iterator[ModuleType]:
    for found in pkgutil.walk_packages([str(SOURCES)], f"{PACKAGE}."):
        try:
            yield importlib.import_module(found.name)
        except ModuleNotFoundError as error:  # of an extra that is not installed
            if (error.name or "").partition(".")[0] in (PACKAGE, *FOREIGN):
                raise


def defined_by(kind: type) -> set[str]:
    try:
        source = inspect.getsource(kind)
    except (OSError, TypeError):  # made at run time, or not written in Python
        return set(vars(kind))
    return definitions(ast.parse(textwrap.dedent(source)))


def overridden_names() -> set[str]:
    """The private names that a class in the package defines or sets, and that a parent in PyTorch or Lightning has."""
    found: set[str] = set()
    for module in package_modules():
        for kind in vars(module).values():
            if isinstance(kind, type) and kind.__module__ == module.__name__:
                for parent in kind.__mro__:
                    if parent.__module__.partition(".")[0] in FOREIGN:
                        found |= defined_by(kind) & defined_by(parent)
    return {name for name in found if is_private(name)}


@pytest.fixture(scope="module")
def in_the_sources() -> dict[str, list[str]]:
    paths = sorted(SOURCES.rglob("*.py"))
    sources = {str(path.relative_to(SOURCES.parent)): path.read_text(encoding="utf-8") for path in paths}
    return private_names(sources, overridden_names())


def test_every_private_name_in_the_sources_is_in_the_table(in_the_sources: dict[str, list[str]]) -> None:
    known = {row.name for row in TABLE}
    missing = [f"  {name}: {', '.join(places)}" for name, places in in_the_sources.items() if name not in known]
    assert not missing, "\n".join(
        [
            "private names of other packages that no table in this file has:",
            *missing,
            "Use a public name if there is one, else add a row with an object that has the name. A private name of our "
            "own stays in the module that defines it.",
        ]
    )


def test_every_private_name_in_the_table_is_in_the_sources(in_the_sources: dict[str, list[str]]) -> None:
    unused = [row.name for row in TABLE if row.name not in in_the_sources]
    assert not unused, f"nothing uses {', '.join(unused)} any more: remove the rows"


@dataclass(frozen=True)
class Sample:
    holds: str
    source: str
    names: tuple[str, ...]


SAMPLES = [
    Sample("an attribute of another object", "def f(x):\n  return x._a", ("_a",)),
    Sample("each part of a chain", "def f(x):\n  return x._a.b._c", ("_a", "_c")),
    Sample("an attribute that is set", "def f(x):\n  x._a = 1", ("_a",)),
    Sample("a parent's attribute", "class C(B):\n  def f(self):\n    return self._a", ("_a",)),
    Sample("a parent's method", "class C(B):\n  def f(self):\n    super()._a()", ("_a",)),
    Sample("a name for getattr", "def f(x):\n  return getattr(x, '_a')", ("_a",)),
    Sample("a keyword", "def f(x):\n  return x(_a=1)", ("_a",)),
    Sample("a name that is imported", "from torch.a import _B", ("_B",)),
    Sample("modules on the way", "import torch._a.b\nfrom torch._c.d import e", ("_a", "_c")),
    Sample("a module by its path", "def f(load):\n  load('torch._a.b')", ("_a",)),
    Sample("a module by the end of its path", "def f(load, name):\n  load(f'{name}.b._a')", ("_a",)),
    Sample("an own attribute", "class C:\n  def f(self):\n    self._a = 1\n  def g(self):\n    return self._a", ()),
    Sample("an own method", "class C:\n  def _a(self): ...\n  def f(self):\n    return self._a()", ()),
    Sample("an own class attribute", "class C:\n  _a: int = 1\n  def f(self):\n    return self._a", ()),
    Sample("a keyword of an own function", "def f(x):\n  _a = x\n  return g(_a=_a)", ()),
    Sample("an own module", "from ._a import b\nfrom .. import _c", ()),
    Sample("special names and underscores", "def f(x, _):\n  return x.__dict__, '__all__', '_', _", ()),
    Sample("a named tuple's methods", "def f(x):\n  return x._replace(a=1)", ()),
    Sample("ends of file names", "def f(x):\n  return f'{x}_a', f'{x}_a.yaml', '_a.yaml', '_a of words'", ()),
]


@pytest.mark.parametrize("sample", SAMPLES, ids=[sample.holds for sample in SAMPLES])
def test_finder_finds_names_of_others_only(sample: Sample) -> None:
    assert sorted(private_names({"module.py": sample.source})) == sorted(sample.names)


@pytest.mark.parametrize(
    ("user", "names"),
    [
        ("class D(C):\n  def f(self):\n    return self._a", []),
        ("def f(x):\n  return x._a", ["_a"]),
    ],
    ids=["a subclass's method may", "a function may not"],
)
def test_finder_lets_only_methods_use_what_another_module_defines(user: str, names: list[str]) -> None:
    owner = "class C:\n  def __init__(self):\n    self._a = 1"
    assert sorted(private_names({"owner.py": owner, "user.py": user})) == names


def test_finder_finds_a_method_that_overrides_a_foreign_one() -> None:
    source = "class C(B):\n  def _a(self): ...\n  def _b(self): ..."
    assert private_names({"module.py": source}, overridden={"_a"}) == {"_a": ["module.py:2"]}


@pytest.mark.parametrize(
    "name", ["_save_checkpoint", "_check_on_train_epoch_end"], ids=["a method", "an attribute that the parent sets"]
)
def test_names_that_a_class_shares_with_a_parent_in_lightning_count_as_lightnings(name: str) -> None:
    assert name in overridden_names()
