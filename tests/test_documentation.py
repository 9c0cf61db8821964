"""The pages of the documentation: their code runs, their links and pictures exist, the API reference is complete."""

import importlib
import json
import re
import runpy

import page_snippets
import pytest
import torch
from page_snippets import PAGES, ROOT

DOCS = ROOT / "docs"
FIGURES = DOCS / "figures"
LINKING = [*PAGES, ROOT / "CONTRIBUTING.md", *sorted((ROOT / "examples").glob("*.md"))]
LINK = re.compile(r"\]\((?!https?://)([^)\s#]*)(?:#([\w-]+))?\)")


def name_of(page):
    return str(page.relative_to(ROOT))


@pytest.mark.parametrize("page", [page for page in PAGES[1:] if page_snippets.snippets(page)], ids=name_of)
def test_the_code_of_a_page_runs(page):
    for package in ("open_clip", "timm"):
        pytest.importorskip(package, reason="models of the pages")
    with torch.random.fork_rng():
        page_snippets.run(page)


def contains(lines, chunk, start):
    """Where ``chunk`` ends in ``lines`` from ``start`` on."""
    for at in range(start, len(lines) - len(chunk) + 1):
        if lines[at : at + len(chunk)] == chunk:
            return at + len(chunk)
    raise AssertionError("not in the file, or not in this order:\n" + "\n".join(chunk))


@pytest.mark.parametrize("quote", page_snippets.titled(DOCS / "architecture.md"), ids=lambda quote: quote.title)
def test_the_architecture_quotes_the_code(quote):
    lines, at = (ROOT / quote.title).read_text(encoding="utf-8").splitlines(), 0
    for chunk in re.split(r"^ *\.\.\.\n", quote.text, flags=re.MULTILINE):
        at = contains(lines, chunk.splitlines(), at)


def headings(page):
    """Names that links to a heading of a page use."""
    titles = re.findall(r"^#+ (.*)$", page.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("page", LINKING, ids=name_of)
def test_links_lead_somewhere(page):
    for path, heading in LINK.findall(page.read_text(encoding="utf-8")):
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), path
        assert not heading or heading in headings(target), f"{path}#{heading}"


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"^ +- (\S+\.md)$", (ROOT / "mkdocs.yml").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(listed) == sorted(str(page.relative_to(DOCS)) for page in DOCS.rglob("*.md"))


@pytest.mark.parametrize("module", ["mlip_kernels", "mlip_kernels.functions", "mlip_kernels.nn", "mlip_kernels.models"])
def test_the_reference_has_every_public_name(module):
    if module == "mlip_kernels.models":
        for package in ("open_clip", "timm"):
            pytest.importorskip(package, reason="the models are made of its parts")
    pages = "\n".join(page.read_text(encoding="utf-8") for page in (DOCS / "api").glob("*.md"))
    described = set(re.findall(r"^::: (\S+)$", pages, re.MULTILINE))
    names = importlib.import_module(module).__all__
    assert [name for name in names if f"{module}.{name}" not in described] == []


def test_the_pictures_are_what_their_script_draws():
    pictures = runpy.run_path(str(FIGURES / "draw.py"))["PICTURES"]
    assert pictures
    read = {name: (FIGURES / f"{name}.svg").read_text(encoding="utf-8") for name in pictures}
    outdated = [name for name, draw in pictures.items() if draw().svg() != read[name]]
    assert outdated == [], "run: python docs/figures/draw.py"


def test_the_plot_of_the_speedups_shows_its_figures():
    plot = (FIGURES / "speedups.svg").read_text(encoding="utf-8")
    figures = json.loads((FIGURES / "speedups.json").read_text(encoding="utf-8"))
    for row in figures["rows"]:
        assert f">{row['label']}</text>" in plot
        for ratio in row["ratios"].values():
            assert re.search(rf"> ?{ratio:.3g}</text>", plot)
    assert figures["machine"] in plot


def test_the_plot_is_drawn_of_a_run_of_the_benchmarks(tmp_path, capsys):
    pytest.importorskip("matplotlib", reason="draws the plot")
    script = runpy.run_path(str(ROOT / "benchmarks" / "draw_speedups.py"))
    machine = {"processor": "A", "cpu_capability": "avx2", "gpu": "none", "torch": "2.14", "package": "0.1 in /"}
    notes = {"two matmuls / ours": 2.5, "compiled reference / ours": 1.25, "copies / ours": 0.7}
    group = "dct 14x14 float32, forward + backward, tuned allocator"
    others = {"group": "dct 7x7 float32, forward, tuned allocator", "extra_info": {"two matmuls / ours": 9.0}}
    run = {
        "machine_info": {"mlip_kernels": machine},
        "datetime": "2030-01-02T03:04:05",
        "benchmarks": [others, {"group": group, "extra_info": notes}],
    }
    (tmp_path / "run.json").write_text(json.dumps(run), encoding="utf-8")
    script["main"]([str(tmp_path / "run.json"), "--folder", str(tmp_path)])
    figures = json.loads((tmp_path / "speedups.json").read_text(encoding="utf-8"))
    assert figures["rows"] == [{"label": "dct, 14 × 14 patches", "ratios": {"PyTorch": 2.5, "torch.compile": 1.25}}]
    assert figures["measured"] == "2030-01-02"
    assert "1.25</text>" in (tmp_path / "speedups.svg").read_text(encoding="utf-8")
    assert "left out: token_logits" in capsys.readouterr().out
    with pytest.raises(ValueError, match="run: "):
        script["figures_of"]({**run, "benchmarks": [others]})
