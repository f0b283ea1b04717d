"""Every name of the package that a page mentions exists: pages go stale silently, names do not."""

import importlib
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")])
DOTTED = re.compile(r"`(metamorph(?:\.\w+)+)`")
FILES = re.compile(r"`((?:src|tests|benchmarks|examples|docs)/[\w./-]+)`")
ABSENT = re.compile(r"^(runs|build)/")


def resolve(name: str) -> object:
    """The module, class, function or method of a dotted name."""
    parts = name.split(".")
    for length in range(len(parts), 0, -1):
        try:
            found: object = importlib.import_module(".".join(parts[:length]))
        except ModuleNotFoundError:
            continue
        for part in parts[length:]:
            fields = getattr(found, "__annotations__", {})  # a field of a dataclass without a default is no attribute of its class
            found = fields[part] if part in fields and not hasattr(found, part) else getattr(found, part)
        return found
    raise AssertionError(name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_and_files_on_a_page_exist(page):
    text = page.read_text(encoding="utf-8")
    for name in sorted(set(DOTTED.findall(text))):
        resolve(name)
    if page.name not in ("LAB_LOG.md", "architecture.md"):  # one is history, the other names what is still to be built
        missing = [name for name in sorted(set(FILES.findall(text))) if not ABSENT.match(name) and not (ROOT / name).exists()]
        assert not missing
