"""``no_decay`` holds in phase 0 too, unless the user has set weight decay for groups or phase 0 is not enforced."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from torch import nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler, ReduceLROnPlateau, StepLR

from tests.core_programs.loops import HEAD, LOWER, LOWER_LR, UPPER, UPPER_LR, Schedule, copied, differing, thaw

from .toys import Fit, Toy, fit, phases

DECAY = 0.1
EPOCHS = 6
WEIGHTS = tuple(name for name in (*HEAD, *UPPER, *LOWER) if name.endswith("weight"))


def adamw(parameters: Any) -> Optimizer:
    return AdamW(parameters, lr=0.1, weight_decay=DECAY)


def adam(parameters: Any) -> Optimizer:
    return Adam(parameters, lr=0.1, weight_decay=DECAY)


def sgd(parameters: Any) -> Optimizer:
    return SGD(parameters, lr=0.1, momentum=0.9, weight_decay=DECAY)


OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {"AdamW": adamw, "Adam": adam, "SGD": sgd}


class Exempting(Toy):
    """Exempts what ``no_decay`` names; its optimizer gets what ``parameters_of`` makes of its parameters."""

    def __init__(
        self,
        optimizer_over: Callable[[Any], Optimizer],
        no_decay: list[str],
        parameters_of: Callable[[Toy], Any] = lambda toy: toy.parameters(),
        make_scheduler: Callable[[Optimizer], LRScheduler] | None = None,
    ) -> None:
        super().__init__()
        self.optimizer_over, self.no_decay = optimizer_over, no_decay
        self.parameters_of, self.make_scheduler = parameters_of, make_scheduler

    def configure_optimizers(self) -> Any:
        optimizer = self.optimizer_over(self.parameters_of(self))
        if self.make_scheduler is None:
            return optimizer
        return {
            "optimizer": optimizer,
            "lr_scheduler": {"scheduler": self.make_scheduler(optimizer), "monitor": "val_loss"},
        }


def decay_of(done: Fit) -> dict[str, float]:
    """The weight decay of each parameter that a group holds."""
    names = {parameter: name for name, parameter in done.module.named_parameters()}
    groups = done.optimizer.param_groups
    return {names[parameter]: group["weight_decay"] for group in groups for parameter in group["params"]}


def lr_of(done: Fit) -> dict[str, float]:
    names = {parameter: name for name, parameter in done.module.named_parameters()}
    return {names[parameter]: group["lr"] for group in done.optimizer.param_groups for parameter in group["params"]}


def groups_of(done: Fit) -> list[tuple[str, ...]]:
    names = {parameter: name for name, parameter in done.module.named_parameters()}
    return [tuple(names[parameter] for parameter in group["params"]) for group in done.optimizer.param_groups]


def by_hand(optimizer_over: Callable[[Any], Optimizer], schedule: Schedule, exempt: Callable[[str], bool]) -> Toy:
    """Train with a decaying and an exempt group for each phase."""
    module = Toy()
    module.requires_grad_(False)
    named = dict(module.named_parameters())
    rates = (0.1, UPPER_LR, LOWER_LR)

    def groups(phase: int) -> list[dict[str, Any]]:
        names = schedule[phase]["params"]
        thaw(named, names)
        decaying = [named[name] for name in names if not exempt(name)]
        others = [named[name] for name in names if exempt(name)]
        made = [{"params": decaying, "lr": rates[phase]}, {"params": others, "lr": rates[phase], "weight_decay": 0.0}]
        return [group for group in made if group["params"]]

    optimizer = optimizer_over(groups(0))
    phase = 0
    for epoch in range(EPOCHS):
        if phase + 1 in schedule and epoch >= schedule[phase]["max_transition_epoch"]:
            phase += 1
            for group in groups(phase):
                optimizer.add_param_group(group)
        for index, batch in enumerate(module.train_dataloader()):
            optimizer.zero_grad()
            module.loss(batch, index).backward()
            optimizer.step()
    return module


@pytest.mark.parametrize(
    ("no_decay", "exempt"),
    [
        (["bias"], lambda name: "bias" in name),
        (["head"], lambda name: "head" in name),
        (["upper", "head.bias"], lambda name: "upper" in name or name == "head.bias"),
        (["norm"], lambda name: False),
    ],
    ids=["biases", "all of phase 0", "parts of two phases", "nothing"],
)
@pytest.mark.parametrize("optimizer_over", OPTIMIZERS.values(), ids=OPTIMIZERS.keys())
def test_exempt_parameters_of_phase_0_do_not_decay_as_by_hand(
    optimizer_over: Callable[[Any], Optimizer], no_decay: list[str], exempt: Callable[[str], bool], tmp_path: Path
) -> None:
    done = fit(Exempting(optimizer_over, no_decay), tmp_path, phases(2, 4), epochs=EPOCHS)
    assert decay_of(done) == {name: 0.0 if exempt(name) else DECAY for name in (*HEAD, *UPPER, *LOWER)}
    assert differing(done.recorder.weights[-1], copied(by_hand(optimizer_over, phases(2, 4), exempt))) == set()


def test_the_group_of_phase_0_is_split_in_two_the_decaying_part_first(tmp_path: Path) -> None:
    done = fit(Exempting(adamw, ["bias"]), tmp_path, phases(2), epochs=1)
    assert groups_of(done) == [("head.weight",), ("head.bias",)]
    assert done.optimizer.param_groups[0].keys() == done.optimizer.param_groups[1].keys()
    changed = {
        key
        for key, value in done.optimizer.param_groups[0].items()
        if key != "params" and done.optimizer.param_groups[1][key] != value
    }
    assert changed == {"name", "weight_decay"}


def one_group_a_layer(toy: Toy) -> Any:
    rates = {"head": 0.2, "upper": 0.3, "lower": 0.4}
    return [{"params": list(getattr(toy, name).parameters()), "lr": lr} for name, lr in rates.items()]


def of_the_head_alone(toy: Toy) -> Any:
    return [parameter for parameter in toy.parameters() if parameter.requires_grad]


def without_the_bias(toy: Toy) -> Any:
    """The bias of the head joins when phase 0 is enforced."""
    return [toy.head.weight]


def weights_and_biases_apart(toy: Toy) -> Any:
    """As users write it who know nothing of ``no_decay``: biases have a rate of their own but decay."""
    named = list(toy.named_parameters())
    return [
        {"params": [parameter for name, parameter in named if "weight" in name], "lr": 0.1},
        {"params": [parameter for name, parameter in named if "bias" in name], "lr": 0.2},
    ]


@dataclass(frozen=True)
class Given:
    """The groups a user gives, and phase 0's learning rates, which stay."""

    parameters_of: Callable[[Toy], Any]
    rates: dict[str, float] = field(default_factory=lambda: dict.fromkeys(HEAD, 0.1))


GIVEN = {
    "all parameters": Given(lambda toy: toy.parameters()),
    "named parameters": Given(lambda toy: toy.named_parameters()),
    "the head alone": Given(of_the_head_alone),
    "a group a layer": Given(one_group_a_layer, dict.fromkeys(HEAD, 0.2)),
    "weights and biases apart": Given(weights_and_biases_apart, {"head.weight": 0.1, "head.bias": 0.2}),
    "the head without its bias": Given(without_the_bias),
}


@pytest.mark.parametrize("given", GIVEN.values(), ids=GIVEN.keys())
def test_however_the_user_groups_them_biases_do_not_decay_and_keep_their_rate(given: Given, tmp_path: Path) -> None:
    done = fit(Exempting(adamw, ["bias"], given.parameters_of), tmp_path, phases(2), epochs=1)
    assert decay_of(done) == {"head.weight": DECAY, "head.bias": 0.0}
    assert lr_of(done) == given.rates


def biases_decay_more(toy: Toy) -> Any:
    named = list(toy.named_parameters())
    return [
        {"params": [parameter for name, parameter in named if "weight" in name]},
        {"params": [parameter for name, parameter in named if "bias" in name], "weight_decay": 0.5},
    ]


def the_last_layers_decay_less(toy: Toy) -> Any:
    return [
        {"params": [*toy.lower.parameters(), *toy.upper.parameters()]},
        {"params": list(toy.head.parameters()), "weight_decay": 0.01},
    ]


@pytest.mark.parametrize(
    ("parameters_of", "expected"),
    [
        (biases_decay_more, {"head.weight": DECAY, "head.bias": 0.5}),
        (the_last_layers_decay_less, {"head.weight": 0.01, "head.bias": 0.01}),
    ],
    ids=["biases decay more", "the head decays less"],
)
def test_groups_in_which_the_user_set_weight_decay_are_left_alone(
    parameters_of: Callable[[Toy], Any], expected: dict[str, float], tmp_path: Path
) -> None:
    done = fit(Exempting(adamw, ["bias"], parameters_of), tmp_path, phases(2), epochs=1)
    assert decay_of(done) == expected


def test_where_phase_0_is_not_enforced_the_users_optimizer_is_left_alone(tmp_path: Path) -> None:
    module = Exempting(adamw, ["bias"])
    done = fit(module, tmp_path, phases(2), epochs=1, enforce_phase0_params=False)
    assert decay_of(done) == dict.fromkeys((*HEAD, *UPPER, *LOWER), DECAY)
    assert len(done.optimizer.param_groups) == 1


def plateau(optimizer: Optimizer) -> LRScheduler:
    return ReduceLROnPlateau(optimizer, factor=0.5, patience=0, min_lr=[0.03])


@pytest.mark.parametrize(
    "make_scheduler",
    [lambda o: StepLR(o, 1, gamma=0.5), lambda o: LambdaLR(o, [lambda count: 0.5**count]), plateau],
    ids=["StepLR", "LambdaLR with a list", "ReduceLROnPlateau with a list"],
)
def test_the_scheduler_acts_on_both_parts(make_scheduler: Callable[[Optimizer], LRScheduler], tmp_path: Path) -> None:
    done = fit(Exempting(sgd, ["bias"], make_scheduler=make_scheduler), tmp_path, phases(3), epochs=3)
    assert [len(rates) for rates in done.rates] == [2] * len(done.rates)
    assert [decaying for decaying, _ in done.rates] == [exempt for _, exempt in done.rates]
    if not isinstance(done.trainer.lr_scheduler_configs[0].scheduler, ReduceLROnPlateau):
        assert done.rates[-1] == (0.025, 0.025)


def installing(class_path: str, **arguments: Any) -> dict[str, Any]:
    return {"optimizer_init": {"class_path": class_path, "init_args": arguments}}


def test_an_optimizer_that_a_phase_installs_exempts_phase_0_too(tmp_path: Path) -> None:
    schedule = phases(1, phase_1={"new_optimizer": installing("torch.optim.AdamW", lr=0.01, weight_decay=0.03)})
    done = fit(Exempting(adamw, ["bias"]), tmp_path, schedule, epochs=2)
    assert decay_of(done) == {name: 0.03 if name in WEIGHTS else 0.0 for name in (*HEAD, *UPPER)}


@pytest.mark.parametrize("count", [2, 1], ids=["a rate for each part", "one rate for both"])
def test_lists_with_a_value_for_each_group_count_both_parts(count: int, tmp_path: Path) -> None:
    init = {"class_path": "torch.optim.lr_scheduler.StepLR", "init_args": {"step_size": 1, "gamma": 1.0}}
    new_scheduler = {"lr_scheduler_init": init, "init_pg_lrs": [0.01, 0.02][:count]}
    schedule = phases(1, phase_1={"new_lr_scheduler": new_scheduler})
    module = Exempting(adamw, ["bias"])
    if count == 1:
        with pytest.raises(Exception, match="expected `init_pg_lrs` to have 2 values"):
            fit(module, tmp_path, schedule, epochs=2)
        return
    done = fit(module, tmp_path, schedule, epochs=2)
    assert {name: lr_of(done)[name] for name in HEAD} == {"head.weight": 0.01, "head.bias": 0.02}


class Normalised(Exempting):
    """Exempts a normalisation in the head's phase."""

    def build(self) -> None:
        self.norm = nn.LayerNorm(4)

    def trunk(self, x: Any) -> Any:
        return self.norm(super().trunk(x))


def test_the_best_checkpoint_and_a_split_head_go_together(tmp_path: Path) -> None:
    module = Normalised(adamw, ["bias", "norm"])
    module.scores = (1.0, 2.0, 0.5, 0.75, 0.8, 0.9)
    schedule = phases(2, 4, parameters=((*HEAD, "norm.weight", "norm.bias"), UPPER, LOWER))
    done = fit(module, tmp_path, schedule, epochs=EPOCHS, restore_best=True)
    assert done.scheduler.curr_depth == 2
    assert {name for name, decay in decay_of(done).items() if decay} == set(WEIGHTS)
