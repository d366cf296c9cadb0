"""The precision of FSDP2 modules as configuration files say it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.fsdp import MixedPrecisionPolicy

from finetuning_scheduler.core.sharding.precision import mixed_precision

WHOLE = MixedPrecisionPolicy(torch.bfloat16, torch.float32, torch.float16, cast_forward_inputs=False)


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ({}, MixedPrecisionPolicy()),
        ({"param_dtype": "bfloat16"}, MixedPrecisionPolicy(param_dtype=torch.bfloat16)),
        ({"param_dtype": torch.float16, "reduce_dtype": None}, MixedPrecisionPolicy(param_dtype=torch.float16)),
        (
            {
                "param_dtype": "torch.bfloat16",
                "reduce_dtype": "float32",
                "output_dtype": "half",
                "cast_forward_inputs": False,
            },
            WHOLE,
        ),
        (WHOLE, WHOLE),
    ],
)
def test_a_policy_is_made_of_its_arguments(value: Any, expected: MixedPrecisionPolicy) -> None:
    assert mixed_precision(value) == expected


@pytest.mark.parametrize(
    ("value", "complaint"),
    [
        ("bfloat16", "got 'bfloat16'"),
        (None, "got None"),
        ({"param_dtype": "bfloat"}, "got 'bfloat' as param_dtype"),
        ({"reduce_dtype": "nn"}, "got 'nn' as reduce_dtype"),
        ({"reduce_dtype": 16}, "got 16 as reduce_dtype"),
        ({"dtype": "bfloat16"}, "unexpected keyword argument 'dtype'"),
    ],
)
def test_what_makes_no_policy_is_told(value: Any, complaint: str) -> None:
    with pytest.raises(TypeError, match=complaint):
        mixed_precision(value)
