"""Schedules and adapter arguments of sharded training as users have them in files, run as they stand on two ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML
from torch import nn

from tests.reference import cases, harness
from tests.reference.cases import AN_EPOCH_EACH, Classifier

# What `AN_EPOCH_EACH` says, in expressions.
SCHEDULE = """
0:
  params:
  - network.head.*
  max_transition_epoch: 1
1:
  params:
  - network.(second|third).*
  max_transition_epoch: 2
  lr: 1e-02
2:
  params:
  - network.norm.*
  - network.first.*
  max_transition_epoch: 3
  lr: 1.0e-02
"""


@dataclass(frozen=True)
class Case:
    """A strategy, and ``strategy_adapter_cfg`` as it stands in a file."""

    strategy: Callable[[], Any]
    adapter: str
    module: type[Classifier] = Classifier
    ranks: int = 2


FLAT = partial(cases.fsdp, use_orig_params=False, state_dict_type="sharded", auto_wrap_policy=None)
CASES = {
    "awp_overrides by name": Case(FLAT, "awp_overrides: [network.head, network.second, network.third]"),
    "awp_overrides by expression": Case(FLAT, "awp_overrides:\n- network.head\n- network.(second|third)"),
    "awp_overrides beside classes": Case(
        partial(cases.fsdp, auto_wrap_policy={nn.Linear}, use_orig_params=False, state_dict_type="sharded"),
        "awp_overrides: [network.norm]",
    ),
    "fsdp_plan": Case(
        cases.fsdp2,
        r"""
fsdp_default_kwargs:
  cpu_offload_policy: {pin_memory: false}
fsdp_plan:
  network.first: {act_ckpt: ['composable']}
  network.second: {act_ckpt: [composable, {preserve_rng_state: false}]}
  network.(norm|third|head):
  network: {reshard_after_forward: false}
""",
    ),
    "fsdp_plan of the whole, after layers by their end": Case(
        cases.fsdp2,
        r"""
fsdp_plan:
  network.\w+$: {reshard_after_forward: true}
  network: {}
""",
    ),
    "tensor parallel": Case(cases.tensor_parallel, "{}", cases.TensorParallel),
    "tensor parallel and fsdp_plan": Case(
        cases.mesh_2d,
        """
fsdp_plan:
  network.(first|norm|second|third|head): {}
  network: {}
""",
        cases.ParallelizedOnly,
        ranks=4,
    ),
}


@pytest.mark.parametrize("case", CASES.values(), ids=CASES.keys())
def test_a_configuration_as_users_have_it(case: Case, tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(SCHEDULE, encoding="utf-8")
    adapter = YAML(typ="safe", pure=True).load(case.adapter)
    expected = cases.on_one_device(AN_EPOCH_EACH)
    run = partial(cases.fit, schedule=str(path), adapter=adapter, module=case.module)
    for epochs in harness.run_ranks(run, case.ranks, tmp_path, case.ranks, case.strategy):
        assert [(epoch.phase, epoch.lrs) for epoch in epochs] == [(epoch.phase, epoch.lrs) for epoch in expected]
        for one, other in zip(epochs, expected, strict=True):
            cases.assert_same_weights(one, other)
