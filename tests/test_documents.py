"""What README.md, CONTRIBUTING.md and docs/*.md point to is there: links, files, commands, presets and keys by their
names. Nothing is run.
"""

import importlib.util
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from ssast.engine.cli import verbs
from ssast.engine.config import Config, Section
from ssast.engine.finetune.config import FinetuneConfig

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
FENCE = re.compile(r"^```.*?^```$|^<!--.*?-->$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\[[^\]]*\]\(([^)\s]+)\)|<img src=\"([^\"]+)\"")
VERB = re.compile(r"(?:^ {4}|`|&& )ssast ([a-z][\w-]*)", re.MULTILINE)
MODULE = re.compile(r"(?:python -m|--module|-m) (ssast[\w.]*)")
TARGET = re.compile(r"`make ([\w-]+)|^ {4}make ([\w-]+)", re.MULTILINE)
PLACE = re.compile(r"(?<![\w./-])((?:engine|kernels|benchmarks|configs|tests|docs)/[\w./-]*\w)(?=[`#\s,.;:)\"\]]|$)")
IMPORT = re.compile(r"^ *from (ssast[\w.]*) import ([\w, ]+)", re.MULTILINE)

HELP = ROOT / "tests" / "engine" / "command_line.txt"
NO_KEYS = {
    "embed",
    "predict",
    "config",
    "yaml",
    "md",
    "py",
    "json",
    "onnx",
    "safetensors",
}  # methods and files: model.md
EXAMPLE = re.compile(r"mean_tokens|birds|export/npz")
"""Names of the pages' own examples, which are not in the tree."""


def anchors(page: Path) -> set[str]:
    """The names of a page's headings, as GitHub makes them."""
    titles = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


def dead_links(page: Path, text: str) -> Iterator[str]:
    for match in LINK.finditer(FENCE.sub("", text)):
        target, _, anchor = (match[1] or match[2]).partition("#")
        if "://" in target:
            continue
        path = (page.parent / target).resolve() if target else page
        if not path.exists():
            yield f"{target}: is not there"
        elif anchor and anchor not in anchors(path):
            yield f"{target}#{anchor}: has no such heading"


def unknown_commands(text: str) -> Iterator[str]:
    yield from (f"ssast {verb}" for verb in VERB.findall(text) if verb not in verbs())
    yield from (module for module in MODULE.findall(text) if importlib.util.find_spec(module) is None)
    made = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    yield from (f"make {name}" for match in TARGET.findall(text) for name in match if name and name not in made)


def unknown_options(text: str) -> Iterator[str]:
    """`ssast VERB --option`, in a line of code or between backquotes, against the frozen help of each verb."""
    helps = re.split(r"^==== (?:ssast )?([\w-]*)\n", HELP.read_text(encoding="utf-8"), flags=re.MULTILINE)[1:]
    of_verb = dict(zip(helps[::2], helps[1::2], strict=True))
    del of_verb["bench"]  # whose programs have options of their own
    for line in re.findall(r"^ {4}(ssast .*)$|`(ssast [^`]*)`", text, re.MULTILINE):
        _, verb, *words = "".join(line).partition(" #")[0].split()
        options = {word.strip("[],").partition("=")[0] for word in words if word.strip("[").startswith("--")}
        words_of_help = re.findall(r"--[\w-]+", of_verb.get(verb, ""))
        yield from (f"ssast {verb} {each}" for each in sorted(options - set(words_of_help)) if verb in of_verb)


def unknown_keys(text: str) -> Iterator[str]:
    """`section.key` of a run's config; what lies below the `deepspeed` section is DeepSpeed's own."""
    keys: dict[str, set[str]] = {}
    for config in (Config, FinetuneConfig):
        for name, field in config.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, Section):
                keys.setdefault(name, set()).update(field.annotation.model_fields)
    for section, key in re.findall(
        r"(?<![\w./*])([a-z]+)\.([a-z_]+)(?=[=`: ,;)\]]|$)", FENCE.sub("", text), re.MULTILINE
    ):
        if section in keys and key not in keys[section] and key not in NO_KEYS:
            yield f"{section}.{key}"


def missing_files(text: str) -> Iterator[str]:
    """Files and folders of the tree that are named, but in tables, whose rows speak of the tree that was measured."""
    written = re.sub(r"^<!-- table.*?^<!-- end -->$", "", text, flags=re.MULTILINE | re.DOTALL)
    yield from (place for place in PLACE.findall(written) if not (ROOT / place).exists() and not EXAMPLE.search(place))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_what_a_page_names_is_there(page):
    text = page.read_text(encoding="utf-8")
    assert list(dead_links(page, text)) == []
    assert list(unknown_commands(text)) == []
    assert list(unknown_options(text)) == []
    assert list(unknown_keys(text)) == []
    assert list(missing_files(text)) == []
    for module, names in IMPORT.findall(text):
        if EXAMPLE.search(module + names):
            continue
        spec = importlib.util.find_spec(module)
        assert spec is not None, module
        source = Path(spec.origin).read_text(encoding="utf-8")
        unknown = [name for name in names.split(", ") if not re.search(rf"\b{name}\b", source)]
        assert unknown == [], f"{module} has no {unknown}"


def test_every_page_is_in_the_index():
    index = (ROOT / "docs" / "README.md").read_text(encoding="utf-8")
    assert [page.name for page in PAGES[2:] if page.name != "README.md" and f"({page.name})" not in index] == []


def test_nothing_on_the_front_page_waits_for_a_figure():
    assert "not measured yet" not in PAGES[0].read_text(encoding="utf-8")


def test_what_is_not_there_would_be_seen():
    page = ROOT / "docs" / "use.md"
    text = '[a](gone.md) [b](data.md#no-such-heading) [c](data.md#limits) <img src="pictures/gone.png">\n'
    text += (
        "    ssast fly x\n`ssast embed` `make tea` and `make test`\npython -m ssast.benchmarks.gone, engine/gone.py.\n"
    )
    assert list(dead_links(page, text)) == [
        "gone.md: is not there",
        "data.md#no-such-heading: has no such heading",
        "pictures/gone.png: is not there",
    ]
    assert list(unknown_commands(text)) == ["ssast fly", "ssast.benchmarks.gone", "make tea"]
    assert list(missing_files(text)) == ["engine/gone.py"]
    assert list(unknown_keys("`train.stepps=4`, `train.steps` and model.sizze")) == ["train.stepps", "model.sizze"]
    assert list(unknown_options("    ssast embed A --out B --fast  # --what")) == ["ssast embed --fast"]
