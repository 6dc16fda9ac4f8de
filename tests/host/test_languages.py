"""What a person reads, in English and in Chinese: every node, input, output, choice and sentence of the page, exactly.

English stands in the code; locales/en repeats it for translators. LIVEAVATAR_WRITE_ENGLISH=1 writes it anew.
"""

import json
import os
import re
import urllib.request

import pytest

from launch import ROOT

LOCALES = ROOT / "locales"
# Choices that are names of files, beside which only these are the pack's own words.
FILES = {"file": ["use the connected image"], "model_name": [], "lora_name": ["none"]}


def read(path) -> dict:
    return json.loads(path.read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def nodes(server) -> dict[str, dict]:
    with urllib.request.urlopen(f"{server.url}/object_info") as answer:
        return {name: node for name, node in json.load(answer).items() if name.startswith("LiveAvatar_")}


def inputs(node: dict) -> dict[str, dict]:
    """Settings of each input that a person can see, by name."""
    seen = [*node["input"].get("required", {}).items(), *node["input"].get("optional", {}).items()]
    return {name: spec[1] if len(spec) > 1 else {} for name, spec in seen}


def english(node: dict) -> dict:
    """What an entry of nodeDefs.json has to say of a node."""
    outputs = zip(node["output_name"], node["output_tooltips"], strict=True)
    return {
        "display_name": node["display_name"],
        "description": node["description"],
        "inputs": {name: {"name": name, "tooltip": spec["tooltip"]} for name, spec in inputs(node).items()},
        "outputs": {str(slot): {"name": name, "tooltip": tip} for slot, (name, tip) in enumerate(outputs)},
    }


def choices(node: dict) -> dict[str, list[str]]:
    """The words of each list that are the pack's own; lists of them, by input."""
    lists = {name: FILES.get(name, spec["options"]) for name, spec in inputs(node).items() if "options" in spec}
    return {name: words for name, words in lists.items() if words}


def sentences() -> set[str]:
    """What the page's scripts say."""
    said = (re.findall(r"\bsay\('([^']+)'", path.read_text(encoding="utf-8")) for path in (ROOT / "web").glob("*.*js"))
    return {sentence for found in said for sentence in found}


def test_everything_a_node_has_is_explained(nodes) -> None:
    for name, node in nodes.items():
        assert node["description"] and node["search_aliases"], name
        for socket, spec in inputs(node).items():
            assert spec.get("tooltip"), f"{name}.{socket} has no tooltip"
        assert all(node["output_tooltips"]), f"{name} has an output without a tooltip"


def test_english_is_what_the_nodes_say(nodes) -> None:
    path = LOCALES / "en" / "nodeDefs.json"
    wanted = {name: english(node) for name, node in sorted(nodes.items())}
    if "LIVEAVATAR_WRITE_ENGLISH" in os.environ:
        path.write_text(json.dumps(wanted, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    assert read(path) == wanted, "run this test with LIVEAVATAR_WRITE_ENGLISH=1, and see to the other languages"


def test_chinese_says_all_of_it_and_nothing_else(nodes) -> None:
    chinese = read(LOCALES / "zh" / "nodeDefs.json")
    assert set(chinese) == set(nodes)
    for name, node in nodes.items():
        said = {socket: entry.pop("options", {}) for socket, entry in chinese[name]["inputs"].items()}
        wanted = {socket: sorted(words) for socket, words in choices(node).items()}
        assert {socket: sorted(words) for socket, words in said.items() if words} == wanted, name
        assert keys(chinese[name]) == keys(english(node)), name
        for text in [chinese[name]["description"], *(entry["tooltip"] for entry in chinese[name]["inputs"].values())]:
            assert re.search("[\u4e00-\u9fff]", text), f"{name}: {text!r} is not Chinese"


def test_sentences_of_the_page_are_translated() -> None:
    chinese = read(LOCALES / "zh" / "main.json")["liveAvatar"]
    assert set(chinese) == sentences()
    for sentence, said in chinese.items():
        assert set(re.findall(r"\{\w+\}", said)) == set(re.findall(r"\{\w+\}", sentence)), sentence


def test_settings_of_the_page_are_translated_and_known_to_the_server() -> None:
    page = (ROOT / "web" / "settings.mjs").read_text(encoding="utf-8")
    chinese = read(LOCALES / "zh" / "settings.json")
    assert {name.replace("_", ".") for name in chinese} == set(re.findall(r"'(LiveAvatar\.\w+)'", page))
    options = [set(re.findall(r"'([^']+)'", found)) for found in re.findall(r"options: \[(.*)\]", page)]
    assert [set(entry["options"]) for entry in chinese.values() if "options" in entry] == options
    assert all(entry["name"] and entry["tooltip"] for entry in chinese.values())
    server = (ROOT / "nodes" / "settings.py").read_text(encoding="utf-8")
    assert set(re.findall(r'"(LiveAvatar\.\w+)"', server)) < set(re.findall(r"'(LiveAvatar\.\w+)'", page))


def test_the_host_serves_them(server) -> None:
    with urllib.request.urlopen(f"{server.url}/i18n") as answer:
        served = json.load(answer)
    for file in LOCALES.glob("*/*.json"):
        ours, all_packs = read(file), served[file.parent.name]
        theirs = all_packs if file.stem == "main" else all_packs[file.stem]
        assert {name: theirs[name] for name in ours} == ours, file


def keys(tree: object) -> object:
    """A tree's shape: its keys all the way down. An empty text is none."""
    return {key: keys(branch) for key, branch in tree.items()} if isinstance(tree, dict) else bool(tree)
