"""What the documentation says can be done: commands parse, settings exist, Python runs, links lead
somewhere.

Every line of a ``bash`` block, and every command in a sentence, is parsed by the command line's own
parser; ``hubpath fit`` resolves its settings too. ``python`` blocks of a page run in order, as one
program, on tiny networks with random weights, so that nothing is downloaded or trained.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import re
import shlex
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
import typer
from support.command import shown

import hubpath_fast
from bench import gpu_goals, gpu_rows, jsonl
from bench.records import RESULTS
from hubpath_fast.cli import app

ROOT = Path(__file__).parents[2]
PAGES = [*(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "bench/README.md")),
         *sorted((ROOT / "docs").glob("*.md"))]  # fmt: skip
GONE = {"hubpath demo --seed S --single-lr 2e-3"}  # of older commits, which the page names
PLACEHOLDERS = {"S": "0", "N": "2", "FILE": "out.jsonl"}
TINY = {
    "resnet50.a1_in1k": "test_resnet",
    "convnext_tiny.fb_in1k": "test_efficientnet",
    "swin_tiny_patch4_window7_224.ms_in1k": "test_byobnet",
}


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.DOTALL | re.MULTILINE)


def commands(page: Path) -> list[str]:
    """Command lines of a page, without what stands before them: variables, other commands."""
    lines = [line for block in blocks(page, "bash") for line in block.splitlines()]
    outside = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    lines += re.findall(r"`([^`\n]+)`", outside)
    parts = [part.strip() for line in lines for part in line.split("&&")]
    parts = [re.sub(r"^(\w+=\S+ )+", "", part).replace("\\|", "|") for part in parts]
    parts = [re.sub(r"^torchrun .*?-m hubpath_fast ", "hubpath ", part) for part in parts]
    return [part for part in parts if part.startswith(("hubpath ", "python -m ", "pytest "))]


def words_of(command: str) -> list[str]:
    """As a shell gives them; what is optional counts as given, and placeholders have a value."""
    words = shlex.split(re.sub(r"[\[\]]|\.\.\.", "", command), comments=True)
    return [PLACEHOLDERS.get(word, word) for word in words]


@functools.cache
def every_command():
    return typer.main.get_command(app)


def parse(words: list[str]) -> None:
    """By the command line's own parser, which raises for what a command does not know."""
    command = every_command()
    while len(words) > 1 and hasattr(command, "commands"):
        command, words = command.commands[words[1]], words[1:]
    command.make_context(words[0], words[1:])


EVERY = [(page, command) for page in PAGES for command in dict.fromkeys(commands(page))]
HUBPATH = [(p, c) for p, c in EVERY if c.startswith("hubpath ") and c not in GONE]
MODULES = [(p, c) for p, c in EVERY if c.startswith("python -m ")]


def test_the_pages_have_commands():
    assert len(HUBPATH) > 25
    assert len(MODULES) > 15
    for wrong in ("fit --no-such-flag", "evaluate", "hub shw tiny"):
        with pytest.raises(Exception, match=r"No such option|Missing|shw"):
            parse(["hubpath", *wrong.split()])


each_command = functools.partial(
    pytest.mark.parametrize, ("page", "command"), ids=lambda value: getattr(value, "stem", value)
)


@each_command(HUBPATH)
def test_a_command_parses(page, command):
    parse(words_of(command))


@each_command([(p, c) for p, c in HUBPATH if re.match(r"hubpath fit .*(--hub|--preset)", c)])
def test_the_settings_of_a_run_exist(page, command):
    """Presets, hubs, models' names and options, and every ``--set``."""
    assert shown(*words_of(command)[2:])["hub"]


@each_command(MODULES)
def test_a_module_and_its_options_exist(page, command):
    module, *words = words_of(command)[2:]
    spec = importlib.util.find_spec(module)
    assert spec is not None
    source = "".join(path.read_text() for path in Path(spec.origin).parent.glob("*.py"))
    missing = [word for word in words if word.startswith("--") and f'"{word}"' not in source]
    assert not missing


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_the_python_of_a_page_runs(page, monkeypatch, tmp_path):
    if page.stem == "atari":
        pytest.importorskip("ale_py", reason="the Atari emulator is in the extra [atari]")
    monkeypatch.chdir(tmp_path)
    create = functools.partial(hubpath_fast.create_model, pretrained=False, input_size=32)
    if page.name == "README.md":  # it names pre-trained models, which would be downloaded
        monkeypatch.setattr(hubpath_fast, "create_model", create)
    torch.manual_seed(0)
    source = "\n".join(blocks(page, "python"))
    for name, tiny in TINY.items():
        source = source.replace(f'"{name}"', f'"{tiny}"')
    images = torch.randint(0, 256, (6, 3, 32, 32), dtype=torch.uint8)
    namespace = {"images": images, "targets": torch.arange(6), "__name__": page.stem}
    exec(compile(source, str(page), "exec"), namespace)  # a page is as trusted as the code
    if page.name == "README.md":
        gradients = [p.grad for p in namespace["model"].generator.parameters()]
        assert all(torch.isfinite(gradient).all() for gradient in gradients)
    if page.stem == "method":
        assert namespace["out"].expert_outputs.shape == (32, 3)
        assert sum(namespace["out"].routing.counts()) == 32
        assert namespace["clean"].grad.shape == (16, 4)
    if page.stem == "extending":
        assert 0 < namespace["result"].best_metric < 2**0.5 * 2
        assert namespace["timed"].seconds > 0
        assert namespace["losses"].total > namespace["losses"].parts["task"]


def slug(heading: str) -> str:
    """A heading's anchor, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_links_and_pictures_lead_somewhere(page):
    text = page.read_text()
    targets = re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for target in targets:
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        path = (page.parent / name).resolve() if name else page
        assert path.exists(), f"{page.name}: {target}"
        if anchor:
            headings = re.findall(r"^#+ (.*)$", path.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), f"{page.name}: {target}"


def test_the_readme_is_short_and_its_rows_are_the_stored_results():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) < 90
    rows = json.loads((ROOT / "docs/results/demo-accuracy.json").read_text())["rows"]
    assert len(rows) == 6
    for row in rows:
        found = row["accuracies"]
        cells = rf"{row['forwards']} \| \**{mean(found):.3f} ± {stdev(found):.3f}\** \|"
        assert re.search(rf"^\| \**{row['name']}.*\| {cells}$", text, re.MULTILINE), row["name"]


def test_the_readmes_times_are_the_stored_ones():
    text, verdicts, times = (ROOT / "README.md").read_text(), [], []
    for card in ("nvidia-h100-80gb-hbm3", "nvidia-h200"):
        rows = gpu_rows.newest(jsonl.read(RESULTS / card / "gpu.jsonl"))
        step = (rows["speed", "step", name]["p50"] * 1e3 for name in ("dense", "reference"))
        times += [gpu_goals.graphs(rows)[0]["p50"] * 1e3, *step]
        found = [line[3] for line in gpu_goals.lines(rows)]
        verdicts.append((found.count("**missed**"), found.count("not measured")))
    told = (
        "takes {:.1f} ms with captured graphs, {:.0f} ms with every expert on every image, {:.0f} "
        "ms as a plain loop; on an H200 {:.1f}, {:.0f} and {:.0f} ms"
    )
    assert told.format(*times) in text
    assert verdicts == [(6, 4), (6, 3)]
    assert "six of the 15 that were measured on an H200 are missed, six of 14 on an H100" in text


def test_the_times_of_an_agents_step_are_the_stored_ones():
    rows = gpu_rows.newest(jsonl.read(RESULTS / "nvidia-h100-80gb-hbm3" / "gpu.jsonl"))
    times = [
        [rows["speed", "agent", f"{method} {way}"]["p50"] * 1e3 for way in ("captured", "eager")]
        for method in ("scratch", "hub")
    ]
    (one, eagerly), (hub, hub_eagerly) = times
    told = (
        f"takes {one:.2f} ms as captured graphs, {eagerly:.2f} ms without, and {hub:.2f} and "
        f"{hub_eagerly:.2f} ms with a hub"
    )
    assert told in (ROOT / "README.md").read_text()
    page = (ROOT / "docs/atari.md").read_text()
    for name, (captured, eager) in zip(("from scratch", "a hub of two"), times, strict=True):
        row = f"| {name}.* | {eager:.2f} ms | {captured:.2f} ms | {eager / captured:.1f} x"
        assert re.search(row.replace("|", r"\|"), page), row
