"""Sphinx configuration; build with ``make docs``."""

import re
import zlib
from importlib.metadata import version as installed_version
from pathlib import Path
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from sphinx.application import Sphinx

HERE = Path(__file__).parent

project = "finetuning-scheduler"
author = "The Fine-Tuning Scheduler authors"
version = release = installed_version(project)
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.intersphinx", "sphinx.ext.napoleon"]
exclude_patterns = ["_build", "conf.py", "jupyter_execute", "pictures"]

default_role = "code"  # docstrings write `name` as Markdown does

html_theme = "furo"
html_title = "Fine-Tuning Scheduler"
html_show_copyright = False

myst_heading_anchors = 3

# The tutorial is executed at every build: what it shows is what the code does.
nb_custom_formats = {".py": ["jupytext.reads", {"fmt": "py:percent"}]}
nb_execution_mode = "force"
nb_execution_in_temp = True
nb_execution_raise_on_error = True
nb_execution_timeout = 300
nb_merge_streams = True

autodoc_member_order = "bysource"
autodoc_typehints = "signature"
autodoc_typehints_format = "short"
python_use_unqualified_type_names = True
python_maximum_signature_line_length = 100
napoleon_numpy_docstring = False


def inventory(name: str) -> str:
    """Make the inventory of another documentation from the readable list of names beside this file."""
    header, entries = (HERE / "inventories" / f"{name}.txt").read_text(encoding="utf-8").split("\n\n", maxsplit=1)
    path = HERE / "_build" / "inventories" / f"{name}.inv"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(f"{header}\n".encode() + zlib.compress(entries.encode()))
    return str(path)


# The documentation is built without a network, so the names that it refers to are listed here, not fetched.
intersphinx_mapping = {
    "python": ("https://docs.python.org/3/", inventory("python")),
    "lightning": ("https://lightning.ai/docs/pytorch/stable/", inventory("lightning")),
    "pytorch": ("https://docs.pytorch.org/docs/stable/", inventory("pytorch")),
}


def relink(app: Sphinx, path: Path, parent: str, content: list[str]) -> None:
    """Let links of a file of the project's root lead to the same from a page in ``project/``, which includes it."""
    if path.parent == Path(".."):
        pages = {page.name.upper(): page.name for page in (HERE / "project").glob("*.md")}

        def from_page(link: re.Match[str]) -> str:
            target, anchor = link.groups()
            return f"]({pages.get(target.upper(), f'../../{target}')}{anchor or ''})"

        content[0] = re.sub(r"\]\((?!https?:|mailto:|#)([^)#]+)(#[^)]*)?\)", from_page, content[0])


def is_model(kind: Any) -> bool:
    """Tell whether it is a pydantic model, whose signature and descriptions stand in its fields."""
    return isinstance(kind, type) and issubclass(kind, BaseModel)


def model_signature(app: Sphinx, what: str, name: str, kind: Any, options: Any, *_: object) -> tuple[str, None] | None:
    """Show a model's fields with their defaults, without pydantic's annotations."""
    if what != "class" or not is_model(kind):
        return None
    defaults = {field: info.get_default(call_default_factory=True) for field, info in kind.model_fields.items()}
    shown = [name if value is PydanticUndefined else f"{name}={value!r}" for name, value in defaults.items()]
    return f"(*, {', '.join(shown)})", None


def model_fields(app: Sphinx, what: str, name: str, kind: Any, options: Any, lines: list[str]) -> None:
    """Add the descriptions of a model's fields to its docstring."""
    if what == "class" and is_model(kind):
        lines += ["", *(f":param {name}: {info.description}" for name, info in kind.model_fields.items())]


def public_bases(app: Sphinx, name: str, kind: type, options: Any, bases: list[type]) -> None:
    """Name the public class behind a private base."""
    bases[:] = [next(each for each in base.__mro__ if "._" not in each.__module__) for base in bases]


def setup(app: Sphinx) -> None:
    """Register what this configuration adds."""
    app.connect("include-read", relink)
    app.connect("autodoc-process-bases", public_bases)
    app.connect("autodoc-process-signature", model_signature)
    app.connect("autodoc-process-docstring", model_fields)
