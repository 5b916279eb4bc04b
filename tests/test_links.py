"""Links and pictures of the documents lead to files and headings that exist."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
FOLDERS = ("", "improved_ldm", "training", "model_cards", "tests")
LINK = re.compile(r"\[[^\]]*\]\(\s*([^)\s]+)\s*\)")
FENCE = re.compile(r"^```.*?^```", re.MULTILINE | re.DOTALL)


def documents() -> list[Path]:
    found = {file for folder in FOLDERS for file in (ROOT / folder).glob("**/*.md" if folder else "*.md")}
    return sorted(file for file in found if "runs" not in file.parts and "template" not in file.name)


def anchors(text: str) -> set[str]:
    """The anchors that GitHub gives the headings of a document."""
    headings = re.findall(r"^#+ (.+)$", FENCE.sub("", text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", documents(), ids=lambda file: file.relative_to(ROOT).as_posix())
def test_local_links_exist(document):
    text = FENCE.sub("", document.read_text(encoding="utf-8"))
    missing = []
    for link in LINK.findall(text):
        if "://" in link or link.startswith("mailto:"):
            continue
        name, _, anchor = link.partition("#")
        target = (document.parent / name) if name else document
        if not target.exists() or (anchor and anchor not in anchors(target.read_text(encoding="utf-8"))):
            missing.append(link)
    assert not missing
