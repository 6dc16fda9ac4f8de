"""Help pages as a person opens them: each node has one in both languages, with its picture; nodes show their choices in
words.
"""

import re

import pytest

from launch import ROOT

DOCS = ROOT / "web" / "docs"
LARGEST_PICTURE = 40 * 1024
CHINESE = re.compile("[\u4e00-\u9fff]")


@pytest.fixture(scope="module")
def seen(server, browse, artefacts) -> dict:
    return browse("open_help.mjs", server.url, artefacts)


def test_every_page_belongs_to_a_node(seen) -> None:
    nodes = sorted(seen["en"])
    assert nodes == sorted(seen["zh"]) == sorted(path.stem for path in DOCS.glob("*.md"))
    assert [f"{node}/zh.md" for node in nodes] == sorted(
        path.relative_to(DOCS).as_posix() for path in DOCS.glob("*/*.md")
    )
    for language in ("en", "zh"):
        pictures = sorted((DOCS / "pictures" / language).iterdir())
        assert [picture.name for picture in pictures] == [f"{node}.jpg" for node in nodes]
        assert max(picture.stat().st_size for picture in pictures) <= LARGEST_PICTURE


def test_the_page_opens_under_the_nodes_name_with_its_picture(seen) -> None:
    for language in ("en", "zh"):
        for node, page in seen[language].items():
            assert page["alt"] == page["title"], node
            assert page["src"].endswith(f"/docs/pictures/{language}/{node}.jpg") and page["width"] > 200, node
    assert seen["problems"] == [], "the page reported errors"


def test_nodes_speak_chinese(seen) -> None:
    for node, page in seen["zh"].items():
        assert CHINESE.search(page["title"]), node
        assert not page["inputs"] or page["inputs"] != seen["en"][node]["inputs"], node
    assert seen["zh"]["LiveAvatar_Preset"]["choices"] == {"preset": "标准：688×368，4 步，前 192 秒"}
    assert seen["en"]["LiveAvatar_Preset"]["choices"] == {"preset": "standard: 688*368, 4 steps, first 192 s"}
