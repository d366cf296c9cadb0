"""The tests of the pages find what is on a page, and notice what does not hold."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.docs import pages, running
from tests.docs.pages import Block

pytestmark = pytest.mark.quick

PAGE = """# Title

```python
print("one")
```

```text
one
```

<!-- not run: needs a GPU here -->
```python
raise
```

- In a list, `make this` and `python that.py`, not `make_that(1)`:

  ```console
  $ make this  # for a reason
  output
  $ python that.py \\
      --long
  ```
"""


@pytest.fixture
def page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.setattr(pages, "ROOT", tmp_path)
    monkeypatch.setattr(running, "ROOT", tmp_path)
    monkeypatch.chdir(tmp_path)
    pages.tokens_of.cache_clear()
    pages.blocks.cache_clear()
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "page.md").write_text(PAGE, encoding="utf-8")
    return "docs/page.md"


def test_blocks_are_found_with_their_place_and_their_mark(page: str) -> None:
    first, second = pages.blocks(page, "python")
    assert first == Block(page, "Title", 3, "python", 'print("one")\n')
    assert second.not_run == "needs a GPU here"
    assert [block.language for block in pages.blocks(page)] == ["python", "text", "python", "console"]


def test_commands_are_found_without_prompts_comments_and_output(page: str) -> None:
    assert list(pages.commands(page)) == ["make this", "python that.py --long", "make this", "python that.py"]


def test_what_a_block_says_is_compared_with_the_text_below_it(page: str) -> None:
    said: list[list[str]] = []
    block = pages.blocks(page, "python")[0]
    running.run([block], {}, lambda block, names: said.append(names["said"]))
    assert said == [["one"]]
    assert running.shown(block) == ["one"]
    assert running.missing(["one"], said[0]) == []


@pytest.mark.parametrize(
    ("expected", "not_said"),
    [
        (["a 1", "c 3"], []),
        (["a ...", "... 3"], []),
        (["a 2"], ["a 2"]),
        (["c 3", "a 1"], ["a 1"]),
        (["a"], ["a"]),
    ],
)
def test_lines_have_to_be_said_whole_and_in_order(expected: list[str], not_said: list[str]) -> None:
    assert running.missing(expected, ["a 1", "b 2", "c 3"]) == not_said
