"""Every kind of invalid schedule, from a file, with the whole message a user reads."""

from pathlib import Path

import pytest
import torch
from torch import nn

from finetuning_scheduler.core.prepare import resolve
from finetuning_scheduler.errors import ScheduleError, ScheduleFileError, ScheduleFormatError, SelectorError

HEAD = "0:\n  params: [head]\n"


class Model(nn.Module):
    """A body, a head, a parameter tied to the head's, and one that has no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
        self.head = nn.Linear(2, 2)
        self.tied = nn.Linear(2, 2, bias=False)
        self.tied.weight = self.head.weight
        self.counts = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)


@pytest.fixture(autouse=True)
def _in_empty_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Messages name files as the user does, here by relative paths."""
    monkeypatch.chdir(tmp_path)


CASES = [
    pytest.param(
        "",
        ScheduleFileError,
        "schedule.yaml: expected a schedule, got an empty file. Fix: Write at least phase 0",
        id="empty",
    ),
    pytest.param(
        "# nothing\n",
        ScheduleFileError,
        "schedule.yaml: expected a schedule, got an empty file. Fix: Write at least phase 0",
        id="only-comments",
    ),
    pytest.param(
        "null\n",
        ScheduleFormatError,
        "schedule.yaml: expected a mapping of phase numbers to phases, got nothing. "
        "Fix: Write `0:` with `params:` below it",
        id="null",
    ),
    pytest.param(
        "- params: [head]\n",
        ScheduleFormatError,
        "schedule.yaml: expected a mapping of phase numbers to phases, got [{'params': [...]}]. "
        "Fix: Write `0:` with `params:` below it",
        id="list",
    ),
    pytest.param(
        "hello\n",
        ScheduleFormatError,
        "schedule.yaml: expected a mapping of phase numbers to phases, got 'hello'. "
        "Fix: Write `0:` with `params:` below it",
        id="text",
    ),
    pytest.param(
        "{}\n",
        ScheduleFormatError,
        "schedule.yaml: expected a mapping of phase numbers to phases, got an empty mapping. "
        "Fix: Write `0:` with `params:` below it",
        id="empty-mapping",
    ),
    pytest.param(
        "0: [head]\n",
        ScheduleFormatError,
        "schedule.yaml:1, phase 0: expected a mapping with `params`, got ['head']. Fix: Write `params:` below it",
        id="phase-is-a-list",
    ),
    pytest.param(
        "0:\n",
        ScheduleFormatError,
        "schedule.yaml:1, phase 0: expected a mapping with `params`, got nothing. Fix: Write `params:` below it",
        id="phase-null",
    ),
    pytest.param(
        "0:\n  lr: 1\n",
        ScheduleFormatError,
        "schedule.yaml:1, phase 0: expected the key `params`, got none. Fix: Add `params`",
        id="params-missing",
    ),
    pytest.param(
        HEAD + "1:\n  max_transition_epoch: 3\n",
        ScheduleFormatError,
        "schedule.yaml:3, phase 1: expected the key `params`, got none. Fix: Add `params`",
        id="params-missing-in-1",
    ),
    pytest.param(
        "0:\n  params: []\n",
        ScheduleFormatError,
        "schedule.yaml:2, phase 0: `params`: expected a list of at least one item, got []. "
        "Fix: Fill it in, or remove it",
        id="params-empty",
    ),
    pytest.param(
        "0:\n  params: head\n",
        ScheduleFormatError,
        "schedule.yaml:2, phase 0: `params`: expected a list, got 'head'. Fix: Make it a list: `params: [head]`",
        id="params-string",
    ),
    pytest.param(
        "0:\n  params:\n",
        ScheduleFormatError,
        "schedule.yaml:2, phase 0: `params`: expected a list, got nothing. Fix: Write a list",
        id="params-null",
    ),
    pytest.param(
        "0:\n  params: {a: b}\n",
        ScheduleFormatError,
        "schedule.yaml:2, phase 0: `params`: expected a list, got {'a': 'b'}. Fix: Write a list",
        id="params-mapping",
    ),
    pytest.param(
        "0:\n  params:\n  - head\n  - 3\n",
        ScheduleFormatError,
        "schedule.yaml:4, phase 0: `params[1]`: expected a string, got 3. "
        "Fix: Write text, in quotes if it looks like a number",
        id="selector-number",
    ),
    pytest.param(
        "0:\n  params:\n  - head\n  - ''\n",
        ScheduleFormatError,
        "schedule.yaml:4, phase 0: `params[1]`: expected a non-empty string, got ''. Fix: Fill it in, or remove it",
        id="selector-empty",
    ),
    pytest.param(
        "0:\n  params: [[head]]\n",
        ScheduleFormatError,
        "schedule.yaml:2, phase 0: `params[0]`: expected a string, got ['head']. "
        "Fix: Write text, in quotes if it looks like a number",
        id="selector-list",
    ),
    pytest.param(
        HEAD + "  max_transition_epok: 3\n",
        ScheduleFormatError,
        "schedule.yaml:3, phase 0: expected one of the keys params, max_transition_epoch, "
        "max_transition_step, lr, lr_decay, lr_decay_min_scale, lr_warmup_steps, new_optimizer, "
        "new_lr_scheduler, got `max_transition_epok`. "
        "Fix: Did you mean `max_transition_epoch`?",
        id="unknown-key",
    ),
    pytest.param(
        HEAD + "  zzz: 3\n",
        ScheduleFormatError,
        "schedule.yaml:3, phase 0: expected one of the keys params, max_transition_epoch, "
        "max_transition_step, lr, lr_decay, lr_decay_min_scale, lr_warmup_steps, new_optimizer, "
        "new_lr_scheduler, got `zzz`. "
        "Fix: Remove it",
        id="unknown-key-far",
    ),
    pytest.param(
        HEAD + "  5: 3\n",
        ScheduleFormatError,
        "schedule.yaml:3, phase 0: expected keys that are strings, got 5. Fix: Quote the key, or remove it",
        id="key-not-string",
    ),
    pytest.param(
        HEAD + "  max_transition_epoch: '3.0'\n",
        ScheduleFormatError,
        "schedule.yaml:3, phase 0: `max_transition_epoch`: expected an integer, got '3.0'. "
        "Fix: Write a whole number without quotes",
        id="epoch-string",
    ),
    pytest.param(
        HEAD + "  max_transition_epoch: 3.0\n",
        ScheduleFormatError,
        "schedule.yaml:3, phase 0: `max_transition_epoch`: expected an integer, got 3.0. "
        "Fix: Write a whole number without quotes",
        id="epoch-float",
    ),
    pytest.param(
        HEAD + "  max_transition_epoch: true\n",
        ScheduleFormatError,
        "schedule.yaml:3, phase 0: `max_transition_epoch`: expected an integer, got true. "
        "Fix: Write a whole number without quotes",
        id="epoch-bool",
    ),
    pytest.param(
        HEAD + "  max_transition_epoch: -2\n",
        ScheduleFormatError,
        "schedule.yaml:3, phase 0: `max_transition_epoch`: expected -1 or more, got -2. "
        "Fix: Correct it, or leave it out for no limit",
        id="epoch--2",
    ),
    pytest.param(
        HEAD + "  max_transition_step: yes\n",
        ScheduleFormatError,
        "schedule.yaml:3, phase 0: `max_transition_step`: expected an integer, got 'yes'. "
        "Fix: Write a whole number without quotes",
        id="step-yes",
    ),
    pytest.param(
        HEAD + "1:\n  params: [body]\n  lr: 0\n",
        ScheduleFormatError,
        "schedule.yaml:5, phase 1: `lr`: expected a number greater than 0, got 0. Fix: Write a number such as 1.0e-05",
        id="lr-0",
    ),
    pytest.param(
        HEAD + "1:\n  params: [body]\n  lr: -1e-3\n",
        ScheduleFormatError,
        "schedule.yaml:5, phase 1: `lr`: expected a number greater than 0, got -0.001. "
        "Fix: Write a number such as 1.0e-05",
        id="lr-neg",
    ),
    pytest.param(
        HEAD + "1:\n  params: [body]\n  lr: .inf\n",
        ScheduleFormatError,
        "schedule.yaml:5, phase 1: `lr`: expected a finite number, got infinity. Fix: Write a number such as 1.0e-05",
        id="lr-inf",
    ),
    pytest.param(
        HEAD + "1:\n  params: [body]\n  lr: .nan\n",
        ScheduleFormatError,
        "schedule.yaml:5, phase 1: `lr`: expected a finite number, got not-a-number. "
        "Fix: Write a number such as 1.0e-05",
        id="lr-nan",
    ),
    pytest.param(
        HEAD + "1:\n  params: [body]\n  lr: '1e'\n",
        ScheduleFormatError,
        "schedule.yaml:5, phase 1: `lr`: expected a number, got '1e'. "
        "Fix: Write a number without quotes, such as 1.0e-05",
        id="lr-str",
    ),
    pytest.param(
        HEAD + "1:\n  params: [body]\n  lr: true\n",
        ScheduleFormatError,
        "schedule.yaml:5, phase 1: `lr`: expected a number, got true. "
        "Fix: Write a number without quotes, such as 1.0e-05",
        id="lr-bool",
    ),
    pytest.param(
        HEAD + "  new_optimizer: {optimizer_init: {class_path: torch.optim.SGD}}\n",
        ScheduleFormatError,
        "schedule.yaml:3, phase 0: expected `new_optimizer` in later phases only. "
        "Fix: Remove it, or move it to a later phase",
        id="opt0",
    ),
    pytest.param(
        HEAD + "  new_lr_scheduler: {lr_scheduler_init: {class_path: torch.optim.SGD}}\n",
        ScheduleFormatError,
        "schedule.yaml:3, phase 0: expected `new_lr_scheduler` in later phases only. "
        "Fix: Remove it, or move it to a later phase",
        id="sched0",
    ),
    pytest.param(
        HEAD + "1:\n  params: [body]\n  new_optimizer: torch.optim.SGD\n",
        ScheduleFormatError,
        "schedule.yaml:5, phase 1: `new_optimizer`: expected a mapping, got 'torch.optim.SGD'. "
        "Fix: Write `key: value` pairs below it",
        id="opt-str",
    ),
    pytest.param(
        HEAD + "1:\n  params: [body]\n  new_optimizer:\n    optimizer_init: {init_args: {}}\n",
        ScheduleFormatError,
        "schedule.yaml:6, phase 1: expected the key `new_optimizer.optimizer_init.class_path`, got none. "
        "Fix: Add `class_path`",
        id="opt-no-path",
    ),
    pytest.param(
        HEAD + "1:\n  params: [body]\n"
        "  new_optimizer:\n    optimizer_init:\n      class_path: torch.optim.SGD\n      init_arg: {}\n",
        ScheduleFormatError,
        "schedule.yaml:8, phase 1: expected one of the keys class_path, init_args in "
        "`new_optimizer.optimizer_init`, got `init_arg`. "
        "Fix: Did you mean `init_args`?",
        id="opt-typo",
    ),
    pytest.param(
        HEAD + "1:\n  params: [body]\n"
        "  new_optimizer:\n    optimizer_init:\n      class_path: torch.optim.SGD\n      init_args: [1]\n",
        ScheduleFormatError,
        "schedule.yaml:8, phase 1: `new_optimizer.optimizer_init.init_args`: expected a mapping, got [1]. "
        "Fix: Write `key: value` pairs below it",
        id="init_args-list",
    ),
    pytest.param(
        HEAD + "1:\n  params: [body]\n"
        "  new_lr_scheduler:\n    lr_scheduler_init: {class_path: a.B}\n    init_pg_lrs: [1, x]\n",
        ScheduleFormatError,
        "schedule.yaml:7, phase 1: `new_lr_scheduler.init_pg_lrs[1]`: expected a number, got 'x'. "
        "Fix: Write a number without quotes, such as 1.0e-05",
        id="pg_lrs",
    ),
    pytest.param(
        HEAD + "1:\n  params: [body]\n"
        "  new_lr_scheduler:\n    lr_scheduler_init: {class_path: a.B}\n    use_current_optimizer_pg_lrs: 1\n",
        ScheduleFormatError,
        "schedule.yaml:7, phase 1: `new_lr_scheduler.use_current_optimizer_pg_lrs`: expected true or false, got 1. "
        "Fix: Write true or false without quotes",
        id="use_current",
    ),
    pytest.param(
        "first:\n  params: [head]\n",
        ScheduleFormatError,
        "schedule.yaml:1: expected a phase number (0, 1, 2, ...) as key, got 'first'. Fix: Number the phases from 0",
        id="key-word",
    ),
    pytest.param(
        "true:\n  params: [head]\n",
        ScheduleFormatError,
        "schedule.yaml:1: expected a phase number (0, 1, 2, ...) as key, got true. Fix: Number the phases from 0",
        id="key-bool",
    ),
    pytest.param(
        HEAD + "1.5:\n  params: [body]\n",
        ScheduleFormatError,
        "schedule.yaml:3: expected a phase number (0, 1, 2, ...) as key, got 1.5. Fix: Number the phases from 0",
        id="key-1.5",
    ),
    pytest.param(
        HEAD + "-1:\n  params: [body]\n",
        ScheduleFormatError,
        "schedule.yaml:3: expected a phase number (0, 1, 2, ...) as key, got -1. Fix: Number the phases from 0",
        id="key-neg",
    ),
    pytest.param(
        HEAD + "~:\n  params: [body]\n",
        ScheduleFormatError,
        "schedule.yaml:3: expected a phase number (0, 1, 2, ...) as key, got nothing. Fix: Number the phases from 0",
        id="key-null",
    ),
    pytest.param(
        HEAD + "[1]:\n  params: [body]\n",
        ScheduleFormatError,
        "schedule.yaml:3: expected a number or a string as key, got a list. Fix: Use a number or a string",
        id="key-list",
    ),
    pytest.param(
        HEAD + "'0':\n  params: [body]\n",
        ScheduleFormatError,
        "schedule.yaml:3, phase 0: expected each phase number once, got 0 and '0'. Fix: Remove one of the two",
        id="same-number",
    ),
    pytest.param(
        HEAD + "2:\n  params: [body]\n",
        ScheduleFormatError,
        "schedule.yaml:3: expected phase numbers from 0 without gaps, got 0, 2; phase 1 is missing. "
        "Fix: Renumber the phases from 0",
        id="gap",
    ),
    pytest.param(
        "1:\n  params: [head]\n",
        ScheduleFormatError,
        "schedule.yaml:1: expected phase numbers from 0 without gaps, got 1; phase 0 is missing. "
        "Fix: Renumber the phases from 0",
        id="from-1",
    ),
    pytest.param(
        HEAD + "5:\n  params: [body]\n",
        ScheduleFormatError,
        "schedule.yaml:3: expected phase numbers from 0 without gaps, got 0, 5; phases 1 to 4 are missing. "
        "Fix: Renumber the phases from 0",
        id="gap-wide",
    ),
    pytest.param(
        HEAD + "0:\n  params: [body]\n",
        ScheduleFormatError,
        "schedule.yaml:3: expected each key once, got 0 on line 1 and again on line 3. "
        "Fix: Merge lines 1 and 3, or remove one",
        id="dup-key-phase",
    ),
    pytest.param(
        HEAD + "  params: [body]\n",
        ScheduleFormatError,
        "schedule.yaml:3: expected each key once, got 'params' on line 2 and again on line 3. "
        "Fix: Merge lines 2 and 3, or remove one",
        id="dup-key-field",
    ),
    pytest.param(
        "0:\n  params: !!python/object/apply:os.system [ls]\n",
        ScheduleError,
        "2 problems found:\n"
        "1. schedule.yaml:2: expected plain YAML, got the tag `!!python/object/apply:os.system`. "
        "Fix: Remove the tag; no objects are built\n"
        "2. schedule.yaml:2, phase 0, selector 'ls': expected to match a parameter, but matches none. "
        "Fix: Use names of the model's named_parameters()",
        id="tag",
    ),
    pytest.param(
        "0:\n  params: [!env head]\n",
        ScheduleFormatError,
        "schedule.yaml:2: expected plain YAML, got the tag `!env`. Fix: Remove the tag; no objects are built",
        id="tag-scalar",
    ),
    pytest.param(
        HEAD + "  max_transition_epoch: !!int three\n",
        ScheduleFormatError,
        "2 problems found:\n"
        "1. schedule.yaml:3: expected a value of the YAML type `!!int`, got 'three'. "
        "Fix: Remove the tag\n"
        "2. schedule.yaml:3, phase 0: `max_transition_epoch`: expected an integer, got 'three'. "
        "Fix: Write a whole number without quotes",
        id="bad-int-tag",
    ),
    pytest.param(
        "0:\n  params: [head\n1: {}\n",
        ScheduleFileError,
        "schedule.yaml:3: expected valid YAML 1.2, got an error: while parsing a flow sequence, expected ',' "
        "or ']', but got ':'. "
        "Fix: Correct the YAML",
        id="syntax",
    ),
    pytest.param(
        "0:\n\tparams: [head]\n",
        ScheduleFileError,
        "schedule.yaml:2: expected valid YAML 1.2, got an error: while scanning for the next token, found "
        "character '\\t' that cannot start any token. "
        "Fix: Correct the YAML",
        id="tab",
    ),
    pytest.param(
        "0:\n  params: *names\n",
        ScheduleFileError,
        "schedule.yaml:2: expected an alias of an anchor above it, got `*names`. Fix: Write the values out",
        id="undefined-alias",
    ),
    pytest.param(
        "0:\n  params:\n  - *.bias\n",
        ScheduleFileError,
        "schedule.yaml:3: expected an alias of an anchor above it, got `*.bias`. "
        "Fix: Put text that begins with `*` in quotes",
        id="unquoted-glob",
    ),
    pytest.param(
        "0:\n  params:\n  - *\n",
        ScheduleFileError,
        "schedule.yaml:3: expected valid YAML 1.2, got an error: while scanning an alias, expected alphabetic or "
        "numeric character, but found '\\n'. Fix: Put text that begins with `*` in quotes",
        id="unquoted-rest",
    ),
    pytest.param(
        "0: &a\n  params: *a\n",
        ScheduleFileError,
        "schedule.yaml:2: expected a finite structure, got the alias `*a` inside its own anchor. "
        "Fix: Write the values out",
        id="recursive",
    ),
    pytest.param(
        HEAD + "---\n" + HEAD,
        ScheduleFileError,
        "schedule.yaml:3: expected one YAML document, got a second one. Fix: Remove it, with its `---`",
        id="two-docs",
    ),
    pytest.param(
        "0:\n  params: [he\x07ad]\n",
        ScheduleFileError,
        "schedule.yaml:2: expected text, got the control character U+0007. "
        "Fix: Remove it, or write it as an escape in quotes",
        id="control",
    ),
    pytest.param(
        f"{HEAD}  max_transition_epoch: {'9' * 5000}\n",
        ScheduleFormatError,
        "schedule.yaml:3: expected a number of ordinary size, got one of 5,000 digits. Fix: Write a smaller number",
        id="huge-int",
    ),
    pytest.param(
        "0: " + "[" * 200 + "\n",
        ScheduleFileError,
        "schedule.yaml:1: expected at most 100 nested levels, got more. Fix: Flatten it",
        id="deep",
    ),
    pytest.param(
        "0:\n  params:\n  - head\n  - heda.weight\n",
        SelectorError,
        "schedule.yaml:4, phase 0, selector 'heda.weight': expected to match a parameter, but matches none. "
        "Fix: Did you mean `head.weight` or `body.1.weight` or `body.0.weight`?",
        id="no-match",
    ),
    pytest.param(
        "0:\n  params: [qqqq]\n",
        SelectorError,
        "schedule.yaml:2, phase 0, selector 'qqqq': expected to match a parameter, but matches none. "
        "Fix: Use names of the model's named_parameters()",
        id="no-match-far",
    ),
    pytest.param(
        "0:\n  params: ['head.(']\n",
        SelectorError,
        "schedule.yaml:2, phase 0, selector 'head.(': expected a parameter name or a regular expression, got "
        "an invalid one: missing ), unterminated subpattern at position 5. "
        "Fix: Correct the expression",
        id="bad-regex",
    ),
    pytest.param(
        HEAD + "1:\n  params:\n  - head.bias\n",
        SelectorError,
        "schedule.yaml:5, phase 1, selector 'head.bias': expected each parameter in one phase, but phase 0 "
        "by selector 'head' on line 2 already has head.bias. "
        "Fix: Take it out of one of the two phases",
        id="overlap",
    ),
    pytest.param(
        "0:\n  params: ['*']\n1:\n  params:\n  - head\n  - '*'\n",
        SelectorError,
        "schedule.yaml:6, phase 1, selector '*': expected the rest in one phase only, but phase 0 by selector '*' on "
        "line 2 already has it. "
        "Fix: Remove one of the two",
        id="rest-twice",
    ),
    pytest.param(
        HEAD + "1:\n  params: [body]\n2:\n  params:\n  - '*'\n",
        SelectorError,
        "schedule.yaml:7, phase 2, selector '*': expected a parameter that no other selector matches, but none is "
        "left. "
        "Fix: Remove it, or leave parameters to it",
        id="rest-empty",
    ),
    pytest.param(
        HEAD + "1:\n  params: [tied.weight]\n",
        SelectorError,
        "schedule.yaml:4, phase 1: expected a parameter to thaw, got only tied.weight (registered as head.weight). "
        "Fix: Name registered floating point parameters, or remove the phase",
        id="alias-only",
    ),
    pytest.param(
        HEAD + "1:\n  params: [tied.*]\n",
        SelectorError,
        "schedule.yaml:4, phase 1: expected a parameter to thaw, got only tied.weight (registered as head.weight). "
        "Fix: Name registered floating point parameters, or remove the phase",
        id="alias-regex",
    ),
    pytest.param(
        "0:\n  params: [counts]\n",
        SelectorError,
        "schedule.yaml:2, phase 0, selector 'counts': expected a floating point or complex parameter, got "
        "dtype torch.int64. "
        "Fix: Remove it: it has no gradient",
        id="int-param",
    ),
    pytest.param(
        "0:\n  params: [count.*]\n",
        SelectorError,
        "schedule.yaml:2, phase 0: expected a parameter to thaw, got only counts (torch.int64). "
        "Fix: Name registered floating point parameters, or remove the phase",
        id="int-regex",
    ),
    pytest.param(
        "0:\n  params: head\n1:\n  params: [body]\n  lr: fast\n3:\n  params:\n  - bdoy.0\n",
        ScheduleError,
        "4 problems found:\n"
        "1. schedule.yaml:6: expected phase numbers from 0 without gaps, got 0, 1, 3; phase 2 is missing. "
        "Fix: Renumber the phases from 0\n"
        "2. schedule.yaml:2, phase 0: `params`: expected a list, got 'head'. "
        "Fix: Make it a list: `params: [head]`\n"
        "3. schedule.yaml:5, phase 1: `lr`: expected a number, got 'fast'. "
        "Fix: Write a number without quotes, such as 1.0e-05\n"
        "4. schedule.yaml:8, phase 3, selector 'bdoy.0': expected to match a parameter, but matches none. "
        "Fix: Use names of the model's named_parameters()",
        id="several",
    ),
]


@pytest.mark.parametrize(("text", "error", "message"), CASES)
def test_message(text: str, error: type[ScheduleError], message: str) -> None:
    Path("schedule.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(ScheduleError) as caught:
        resolve("schedule.yaml", Model())
    assert str(caught.value) == message
    assert type(caught.value) is error


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("missing.yaml", "missing.yaml: expected a schedule file, but it does not exist. Fix: Check the path"),
        (".", ".: expected a schedule file, got a directory. Fix: Give the path of a YAML file"),
        (
            "a\0b",
            r"a\x00b: expected a schedule file, but it cannot be read: embedded null byte. Fix: Check the path",
        ),
    ],
)
def test_message_for_a_path_that_is_no_file(path: str, message: str) -> None:
    with pytest.raises(ScheduleFileError) as caught:
        resolve(path, Model())
    assert str(caught.value) == message


def test_message_for_a_file_that_is_not_utf_8() -> None:
    Path("schedule.yaml").write_bytes(b"0:\n  params: [h\xe9ad]\n")
    with pytest.raises(ScheduleFileError) as caught:
        resolve("schedule.yaml", Model())
    expected = "schedule.yaml:2: expected UTF-8 text, got byte 0xe9 at offset 15. Fix: Save the file as UTF-8"
    assert str(caught.value) == expected
    assert isinstance(caught.value.__cause__, UnicodeDecodeError)


def test_message_for_a_file_that_is_too_large(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("finetuning_scheduler.core.schedule.yaml_reader.MAX_BYTES", 10)
    Path("schedule.yaml").write_text(HEAD)
    with pytest.raises(ScheduleFileError) as caught:
        resolve("schedule.yaml", Model())
    expected = "schedule.yaml: expected a file of at most 10 bytes, got a larger one. Fix: Split the schedule"
    assert str(caught.value) == expected


def test_valid_schedule_of_the_same_model_is_accepted() -> None:
    Path("schedule.yaml").write_text(HEAD + "1:\n  params: [body]\n  lr: 1e-06\n")
    resolution = resolve("schedule.yaml", Model())
    assert resolution.schedule[0].params == ("head.weight", "head.bias")
    assert resolution.schedule[1].lr == 1e-06
    assert resolution.frozen == 1
