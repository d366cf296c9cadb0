"""Which parameters a selector stands for, what is said about it, and how much work that takes."""

import re
import string
from collections.abc import Iterator, Sequence

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from finetuning_scheduler.core.prepare import resolve
from finetuning_scheduler.core.schedule.draft import draft
from finetuning_scheduler.core.schedule.expression import compiled
from finetuning_scheduler.core.schedule.names import ParameterIndex, matching_names
from finetuning_scheduler.core.schedule.resolve import Resolution, resolve_names
from finetuning_scheduler.errors import ScheduleError, ScheduleFormatError, SelectorError


class Tower(nn.Module):
    """Twelve layers, a tied output, and counters that have no gradient."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(3, 2)
        self.layer = nn.ModuleList([nn.Linear(2, 2) for _ in range(12)])
        self.head = nn.Linear(2, 3)
        self.head.weight = self.embed.weight
        self.counts = nn.Parameter(torch.zeros(2, dtype=torch.int64), requires_grad=False)
        self.phase = nn.Parameter(torch.zeros(2, dtype=torch.complex64))


@pytest.fixture(scope="module")
def index() -> ParameterIndex:
    return ParameterIndex.of(Tower())


def _resolved(index: ParameterIndex, *phases: Sequence[str]) -> Resolution:
    return resolve({number: {"params": list(selectors)} for number, selectors in enumerate(phases)}, index)


def _indexed(*names: str) -> ParameterIndex:
    return ParameterIndex(names)


def test_index_holds_registered_names_and_aliases(index: ParameterIndex) -> None:
    assert index.names[:5] == ("counts", "phase", "embed.weight", "layer.0.weight", "layer.0.bias")
    assert index.aliases == {"head.weight": "embed.weight"}
    assert index.fixed == {"counts": "torch.int64"}


@pytest.mark.parametrize(
    ("selectors", "params"),
    [
        (["head.bias"], ("head.bias",)),
        (["layer.3"], ("layer.3.weight", "layer.3.bias")),
        (["layer.3."], ("layer.3.weight", "layer.3.bias")),
        ([r"layer\.(11|3)\.bias"], ("layer.3.bias", "layer.11.bias")),
        (["layer.2.bias", "embed"], ("layer.2.bias", "embed.weight")),
        (["layer.2.bias", r"layer\.2\..*"], ("layer.2.bias", "layer.2.weight")),
        (["phase"], ("phase",)),
        ([".*[.]0[.].*|head[.]bias"], ("layer.0.weight", "layer.0.bias", "head.bias")),
        (["(?i)HEAD.BIAS"], ("head.bias",)),
        (["^layer.7.bias$"], ("layer.7.bias",)),
    ],
)
def test_selected_names(index: ParameterIndex, selectors: list[str], params: tuple[str, ...]) -> None:
    resolution = _resolved(index, selectors)
    assert resolution.schedule[0].params == params
    assert resolution.frozen == len(index.names) - len(params)
    assert resolution.warnings == ()


THAWABLE = tuple(name for name in ParameterIndex.of(Tower()).names if name != "counts")


@pytest.mark.parametrize(
    ("phases", "number", "rest"),
    [
        ([["*"]], 0, THAWABLE),
        ([["*"], ["layer", "embed"]], 0, ("phase", "head.bias")),
        ([["head"], ["*"], ["layer", "embed"]], 1, ("phase",)),
        ([["layer", "embed"], ["*", "head"]], 1, ("phase", "head.bias")),
        ([["layer"], ["head.bias", "*"]], 1, ("head.bias", "phase", "embed.weight")),
        ([["layer"], ["head.weight", "*"]], 1, ("phase", "embed.weight", "head.bias")),
        ([["layer"], ["*", "*"]], 1, ("phase", "embed.weight", "head.bias")),
    ],
)
def test_a_star_alone_is_the_rest_in_model_order_without_what_has_no_gradient(
    index: ParameterIndex, phases: list[list[str]], number: int, rest: tuple[str, ...]
) -> None:
    resolution = _resolved(index, *phases)
    assert resolution.schedule[number].params == rest
    selected = [name for phase in resolution.schedule.phases for name in phase.params]
    assert sorted(selected) == sorted(THAWABLE)
    assert resolution.frozen == len(index.fixed)
    assert resolution.warnings == ()


def test_a_parameter_named_like_the_rest_is_selected_by_its_name() -> None:
    assert _resolved(_indexed("*", "a"), ["*"], ["a"]).schedule[0].params == ("*",)


def test_the_rest_is_one_phase_s(index: ParameterIndex) -> None:
    assert _messages(index, ["head", "*"], ["*"], ["layer", "*"]) == [
        f"phase {number}, selector '*': expected the rest in one phase only, but phase 0 by selector '*' already has "
        "it. Fix: Remove one of the two"
        for number in (1, 2)
    ]


@pytest.mark.parametrize("last", [["*"], ["*", "head.bias"]])
def test_a_rest_of_nothing_is_a_problem(index: ParameterIndex, last: list[str]) -> None:
    everything_else = ["phase", "embed", "layer", *(["head.bias"] if last == ["*"] else [])]
    assert _messages(index, everything_else, last) == [
        "phase 1, selector '*': expected a parameter that no other selector matches, but none is left. "
        "Fix: Remove it, or leave parameters to it"
    ]


@pytest.mark.parametrize("wrong", [{"params": ["hed.bias"]}, {"params": "head.bias"}])
def test_the_rest_is_not_used_while_another_phase_is_wrong(index: ParameterIndex, wrong: dict[str, object]) -> None:
    drafted = draft({0: {"params": ["layer.0"]}, 1: {"params": ["*"]}, 2: wrong})
    assert [phase.params for phase in resolve_names(drafted, index).phases] == [("layer.0.weight", "layer.0.bias")]


@settings(max_examples=100, deadline=None)
@given(data=st.data(), names=st.lists(st.text("ab.", min_size=1), min_size=1, unique=True))
def test_every_parameter_is_in_one_phase_of_a_schedule_with_the_rest(data: st.DataObject, names: list[str]) -> None:
    named = data.draw(st.lists(st.sampled_from(names), unique=True, max_size=len(names) - 1))
    phases = [*([name] for name in named)]
    phases.insert(data.draw(st.integers(0, len(phases))), ["*"])
    resolution = _resolved(_indexed(*names), *phases)
    assert sorted(name for phase in resolution.schedule.phases for name in phase.params) == sorted(names)
    assert resolution.frozen == 0


def test_an_exact_name_selects_nothing_else() -> None:
    index = _indexed("a.b", "acb")
    assert _resolved(index, ["a.b"], ["acb"]).schedule[0].params == ("a.b",)


def test_a_prefix_counts_only_if_nothing_matches_whole() -> None:
    index = _indexed("a.w", "a.w.x")
    assert _resolved(index, ["a.[w]"]).schedule[0].params == ("a.w",)


def test_a_model_is_accepted_and_other_fields_are_kept() -> None:
    resolution = resolve({0: {"params": ["head"], "max_transition_epoch": 4}}, nn.ModuleDict({"head": nn.Linear(1, 1)}))
    assert resolution.schedule.to_dict() == {0: {"params": ["head.weight", "head.bias"], "max_transition_epoch": 4}}
    assert resolution.frozen == 0


def test_a_resolved_schedule_resolves_to_itself(index: ParameterIndex) -> None:
    resolution = _resolved(index, ["head"], ["layer.1", "embed"])
    assert resolve(resolution.schedule, index).schedule == resolution.schedule


def test_an_alias_named_exactly_is_dropped_with_a_notice(index: ParameterIndex) -> None:
    resolution = _resolved(index, ["head.weight", "head.bias"])
    assert resolution.schedule[0].params == ("head.bias",)
    assert resolution.notices == (
        "phase 0, selector 'head.weight': aliases of tied parameters are dropped, "
        "the registered name thaws them: head.weight (registered as embed.weight)",
    )


def test_an_alias_matched_by_a_regular_expression_is_dropped_with_a_notice(index: ParameterIndex) -> None:
    resolution = _resolved(index, ["head.*"])
    assert resolution.schedule[0].params == ("head.bias",)
    assert len(resolution.notices) == 1


def test_an_alias_matched_with_its_registered_name_needs_no_notice(index: ParameterIndex) -> None:
    resolution = _resolved(index, ["(head|embed).*"])
    assert resolution.schedule[0].params == ("embed.weight", "head.bias")
    assert resolution.notices == ()


def test_parameters_without_gradient_are_left_out_with_a_notice(index: ParameterIndex) -> None:
    resolution = _resolved(index, ["counts|phase"])
    assert resolution.schedule[0].params == ("phase",)
    assert resolution.notices == (
        "phase 0, selector 'counts|phase': left out, since their dtype has no gradient: counts (torch.int64)",
    )


@pytest.mark.parametrize(
    ("selector", "unintended", "corrected"),
    [
        ("layer.1.*", "layer.10.bias", r"layer.1\..*"),
        ("layer.1.+", "layer.10.bias", r"layer.1\..+"),
        ("layer.1.", "layer.10.bias", r"layer.1\."),
        ("layer.1.*.bias", "layer.10.bias", r"layer.1(?!\d).*.bias"),
        ("layer.[01].*", "layer.10.bias", r"layer.[01]\..*"),
        ("layer.(0|1).*", "layer.10.bias", r"layer.(0|1)\..*"),
        (r"layer\.\d.*", "layer.10.bias", r"layer\.\d\..*"),
        ("layer.*1.bias", "layer.11.bias", r"layer.*\.1.bias"),
        ("layer.*.1.bias", "layer.11.bias", r"layer.*\.1.bias"),
    ],
)
def test_a_match_that_runs_across_a_number_gets_a_warning(
    index: ParameterIndex, selector: str, unintended: str, corrected: str
) -> None:
    warnings = _resolved(index, [selector]).warnings
    assert warnings == (
        f"phase 0, selector '{selector}': the match runs across a number: it also selects {unintended}. "
        f"Fix: Write '{corrected}'",
    )
    assert unintended not in _resolved(index, [corrected]).schedule[0].params


@pytest.mark.parametrize(
    "selector",
    ["layer.*", r"layer.1\..*", r"layer.\d+.*", "layer.[0-9]+.bias", "layer.1", "embed.*", ".*bias"],
)
def test_a_match_that_ends_with_its_number_gets_no_warning(index: ParameterIndex, selector: str) -> None:
    assert _resolved(index, [selector]).warnings == ()


def _messages(index: ParameterIndex, *phases: Sequence[str]) -> list[str]:
    with pytest.raises(SelectorError) as caught:
        _resolved(index, *phases)
    return [str(problem) for problem in caught.value.problems]


def test_overlaps_list_each_parameter_with_both_phases_and_selectors(index: ParameterIndex) -> None:
    assert _messages(index, ["layer.1", "layer.2"], ["layer.[23].bias"], [r"layer\.1\.w.*"], ["layer.2.bias"]) == [
        "phase 1, selector 'layer.[23].bias': expected each parameter in one phase, but phase 0 by selector 'layer.2' "
        "already has layer.2.bias. Fix: Take it out of one of the two phases",
        r"phase 2, selector 'layer\.1\.w.*': expected each parameter in one phase, but phase 0 by selector 'layer.1' "
        "already has layer.1.weight. Fix: Take it out of one of the two phases",
        "phase 3, selector 'layer.2.bias': expected each parameter in one phase, but phase 0 by selector 'layer.2' "
        "already has layer.2.bias. Fix: Take it out of one of the two phases",
    ]


def test_every_selector_that_matches_nothing_is_reported(index: ParameterIndex) -> None:
    assert _messages(index, ["haed.bais", "[0"], ["qqqqqq"]) == [
        "phase 0, selector 'haed.bais': expected to match a parameter, but matches none. "
        "Fix: Did you mean `head.bias`?",
        "phase 0, selector '[0': expected a parameter name or a regular expression, got an invalid one: "
        "unterminated character set at position 0. Fix: Correct the expression",
        "phase 1, selector 'qqqqqq': expected to match a parameter, but matches none. "
        "Fix: Use names of the model's named_parameters()",
    ]


@pytest.mark.parametrize(
    ("selector", "fix"),
    [
        ("bias", "Write `.*bias` to match head.bias and 12 more"),
        ("1.bias", r"Write `.*\.1.bias` to match layer.1.bias"),
        ("ead.bi", "Write `.*ead.bi.*` to match head.bias"),
        ("ayer.1", r"Write `.*ayer.1\..*` to match layer.1.bias and 1 more"),
        ("ayer.1.*", r"Write `.*ayer.1\..*` to match layer.1.bias and 1 more"),
        ("ead|mbed", "Write `.*(?:ead|mbed).*` to match embed.weight and 1 more"),
        (r"ayer\.\d\.bias", r"Write `.*ayer\.\d\.bias` to match layer.0.bias and 9 more"),
        ("re:head", "Write `head` to match head.bias"),
        ("re: head.bias", "Write `head.bias` to match head.bias"),
        ("re:.*bias", "Write `.*bias` to match head.bias and 12 more"),
        ("re:*.bias", r"Write `.*\.bias` to match head.bias and 12 more"),
        ("head*bias", "Write `head.*bias` to match head.bias"),
        ("layer.?.weight", r"Write `layer\..\.weight` to match layer.0.weight and 9 more"),
        ("ayer(.*)*bais", "Did you mean `layer.9.bias` or `layer.8.bias` or `layer.7.bias`?"),
        ("counts?x|counts:", "Use names of the model's named_parameters()"),
        ("x", "Use names of the model's named_parameters()"),
        ("re:ead", "Write `.*ead.*` to match head.bias"),
        ("re:", "Use names of the model's named_parameters()"),
    ],
)
def test_a_selector_that_matches_nothing_gets_the_pattern_it_stands_for(
    index: ParameterIndex, selector: str, fix: str
) -> None:
    assert _messages(index, [selector]) == [
        f"phase 0, selector '{selector}': expected to match a parameter, but matches none. Fix: {fix}"
    ]


def test_a_suggested_pattern_ends_its_numbers_on_both_sides() -> None:
    assert _messages(_indexed("0", "00", "01"), ["*0*"])[0].endswith(r"Fix: Write `.*(?<!\d)0(?!\d).*` to match 0")


@pytest.mark.parametrize(
    ("selector", "error", "fix"),
    [
        ("*.bias", "nothing to repeat at position 0", r"Write `.*\.bias` to match head.bias and 12 more"),
        ("**head*", "nothing to repeat at position 0", "Write `.*head.*` to match head.bias"),
        (
            "?ayer.[12].*",
            "nothing to repeat at position 0",
            r"Write `.ayer\.[12]\..*` to match layer.1.bias and 3 more",
        ),
        (
            "layer.[!0-8]?*",
            "multiple repeat at position 13",
            r"Write `layer\.[^0-8]..*` to match layer.9.bias and 1 more",
        ),
        ("*.bais", "nothing to repeat at position 0", "Correct the expression"),
        ("*.[bias", "nothing to repeat at position 0", "Correct the expression"),
    ],
)
def test_a_shell_pattern_that_is_no_expression_is_said_to_be_none_and_translated(
    index: ParameterIndex, selector: str, error: str, fix: str
) -> None:
    assert _messages(index, [selector]) == [
        f"phase 0, selector '{selector}': expected a parameter name or a regular expression, got an invalid one: "
        f"{error}. Fix: {fix}"
    ]


def test_bad_structure_and_bad_selectors_are_reported_in_one_error(index: ParameterIndex) -> None:
    with pytest.raises(ScheduleError) as caught:
        resolve({0: {"params": ["head"], "zzz": 1}, 1: {"params": "x"}, 2: {"params": ["none"]}}, index)
    assert type(caught.value) is ScheduleError
    assert [problem.phase for problem in caught.value.problems] == [0, 1, 2]
    assert caught.value.problems[2].selector == "none"


def test_bad_structure_alone_is_a_format_error(index: ParameterIndex) -> None:
    with pytest.raises(ScheduleFormatError) as caught:
        resolve({0: {"params": ["head"]}, 2: {"params": ["embed"]}}, index)
    assert caught.value.renumbered == {0: {"params": ["head"]}, 1: {"params": ["embed"]}}


ALPHABET = st.sampled_from(["a", "b", "1", "0", ".", "_"])
NAMES = st.lists(st.text(ALPHABET, min_size=1, max_size=8), min_size=1, max_size=12, unique=True)
TOKENS = [*"ab10._", r"\.", r"\d", ".*", "+", "?", "[ab]", "[^.]", "[]a]", "(", ")", "|", "{2}", "^", "$", "(?i)"]
TOKENS += [")*", ")+", "(?:", "(?!1)", "{,3}", "*?", r"\1"]
PATTERNS = st.lists(st.sampled_from(TOKENS), min_size=1, max_size=10).map("".join)


@settings(max_examples=500, deadline=None)
@given(names=NAMES, pattern=PATTERNS)
def test_narrowing_loses_no_match(names: list[str], pattern: str) -> None:
    try:
        judge = re.compile(pattern)
    except re.error:
        return
    whole = {name for name in names if judge.fullmatch(name)}
    cuts = {name: [end for i, c in enumerate(name) if c == "." for end in (i, i + 1)] for name in names}
    up_to_dot = {name for name in names if any(judge.fullmatch(name[:end]) for end in cuts[name])}
    assert set(matching_names(compiled(pattern), _indexed(*names))) == (whole or up_to_dot)


@settings(max_examples=500, deadline=None)
@given(names=NAMES, pattern=PATTERNS)
def test_a_warning_gives_a_pattern_that_selects_less(names: list[str], pattern: str) -> None:
    index = _indexed(*names)
    try:
        resolution = _resolved(index, [pattern])
    except SelectorError:
        return
    for warning in resolution.warnings:
        corrected = warning.partition("Fix: Write '")[2].removesuffix("'")
        remaining = _resolved(index, [corrected]).schedule[0].params
        assert set(remaining) < set(resolution.schedule[0].params)


@settings(max_examples=500, deadline=None)
@given(names=NAMES, data=st.data())
def test_a_suggested_pattern_selects_what_it_says_without_a_warning(names: list[str], data: st.DataObject) -> None:
    index = _indexed(*names)
    name = data.draw(st.sampled_from(names))
    fragments = st.builds(
        lambda notation, ends: notation.format(name[min(ends) : max(ends) + 1]),
        st.sampled_from(["{}", "re:{}", "*{}", "{}*", "re:*{}*", "{}?", "{}[!a]*"]),
        st.tuples(*[st.integers(0, len(name) - 1)] * 2),
    )
    selector = data.draw(PATTERNS | fragments)
    try:
        _resolved(index, [selector])
    except SelectorError as error:
        hints = [re.fullmatch(r"write `(.*)` to match (.*?)(?: and (\d+) more)?", str(p.fix)) for p in error.problems]
    else:
        return
    for hint in filter(None, hints):
        resolution = _resolved(index, [hint[1]])
        assert hint[2] in resolution.schedule[0].params
        assert len(resolution.schedule[0].params) == 1 + int(hint[3] or 0)
        assert resolution.warnings == ()


@settings(max_examples=300, deadline=None)
@given(names=st.lists(st.text(string.printable, min_size=1, max_size=6), min_size=1, max_size=8, unique=True))
def test_an_escaped_name_selects_that_name_only(names: list[str]) -> None:
    for name in names:
        assert matching_names(compiled(re.escape(name)), _indexed(*names)) == [name]


def _large_index(layers: int) -> ParameterIndex:
    return _indexed(*(f"model.layers.{i}.{leaf}" for i in range(layers) for leaf in ("weight", "bias")))


@pytest.mark.parametrize("layers", [100, 1000])
@pytest.mark.parametrize(
    "template", [r"model\.layers\.{}\..*", "model.layers.{}.(weight|bias)", "model.layers.{}.[wb].*"]
)
def test_names_tried_grow_linearly_with_the_model(template: str, layers: int) -> None:
    index = _large_index(layers)
    tried = sum(len(list(index.candidates(template.format(layer)))) for layer in range(layers))
    # a name is tried for its own number and, where a dot may stand for a digit, for those that its number begins with
    assert tried <= len(str(layers - 1)) * len(index.names)


def test_a_module_prefix_tries_each_name_at_most_once_a_digit() -> None:
    index = _large_index(1000)
    tried = sum(len(list(index.candidates(f"model.layers.{layer}"))) for layer in range(1000))
    assert tried <= 3 * 2000


def test_only_few_suggestions_are_looked_for() -> None:
    index = _large_index(2000)
    messages = _messages(index, [f"modle.layers.{i}.weight" for i in range(2000)])
    assert len(messages) == 2000
    assert sum("Did you mean" in message for message in messages) == 5


@pytest.mark.parametrize("selector", ["{}.weight", "*.{}.weight", "re:model.layers.{}", "layers.{}.x.*"])
def test_only_few_patterns_are_suggested(selector: str) -> None:
    index = _large_index(2000)
    problems = _messages(index, [selector.format(layer) for layer in range(2000, 2100)])
    assert sum("Fix: Write `" in problem or "Did you mean" in problem for problem in problems) <= 5


def test_names_compared_for_a_suggestion_are_few_passes_over_the_model(monkeypatch: pytest.MonkeyPatch) -> None:
    index = _large_index(1000)
    tried = 0
    candidates = ParameterIndex.candidates

    def counted(self: ParameterIndex, pattern: str) -> Iterator[str]:
        nonlocal tried
        for name in candidates(self, pattern):
            tried += 1
            yield name

    monkeypatch.setattr(ParameterIndex, "candidates", counted)
    _messages(index, [f"re:*.weight_{number}?" for number in range(1000)])
    assert tried <= 5 * 5 * len(index.names)


def test_20_000_tensors_and_selectors_resolve() -> None:
    index = _large_index(10_000)
    resolution = _resolved(index, *([name] for name in index.names))
    assert resolution.frozen == 0
    assert len(resolution.schedule) == 20_000


def test_the_rest_of_20_000_tensors_resolves() -> None:
    index = _large_index(10_000)
    resolution = _resolved(index, ["*"], *([name] for name in index.names[::2]))
    assert resolution.schedule[0].params == index.names[1::2]
