"""The documentation: its code runs, its pictures show what the code does, and nothing public is missing."""

import dataclasses
import importlib.util
import inspect
import re
import sys
from pathlib import Path

import pytest
import torch

import fastattn
import fastattn.compat
import fastattn.distributed
from fastattn import testing
from fastattn.integrations import diffusers, huggingface, huggingface_weights
from tests.support import code_blocks

DOCS = Path(__file__).resolve().parents[2] / "docs"
PAGES = sorted(DOCS.glob("*.md"))
WITH_CODE = [page for page in PAGES if code_blocks.blocks(page)]


READ_IN_TURN = [page for page in WITH_CODE if page.stem != "integrations"]  # that has a test for each block


@pytest.mark.parametrize("page", READ_IN_TURN, ids=[page.stem for page in READ_IN_TURN])
def test_code(page, monkeypatch):
    """One reader, one session: the blocks of a page share their names."""
    if page.stem == "huggingface":
        pytest.importorskip("transformers", reason="transformers is not installed: pip install 'fastattn[hf]'")
    if page.stem == "checkpoints":
        pytest.importorskip("safetensors", reason="safetensors is not installed: pip install 'fastattn[checkpoints]'")
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as a reader's environment is
    names = {}
    for block in code_blocks.blocks(page):
        block.run(names)


def test_pages_about_functions_have_code():
    stems = {page.stem for page in WITH_CODE}
    assert stems >= {
        "index", "getting-started", "operator", "backends", "masks", "packed", "kv-cache", "layers", "huggingface",
        "numerics", "limits", "migration", "choose-a-mask", "faq", "lora", "tutorial", "checkpoints",
    }  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=[page.stem for page in PAGES])
def test_links_and_pictures_lead_somewhere(page):
    """From the file itself, as a reader of the repository follows them; the site is built strictly."""
    for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", page.read_text()):
        if not target.startswith("http"):
            assert (page.parent / target).exists(), target


def test_every_file_that_is_named_exists():
    """What contributors are sent to, and the sources that the pages and the README name."""
    for page in (*PAGES, DOCS.parent / "README.md", DOCS.parent / "CONTRIBUTING.md"):
        folders = "fastattn|kernels|csrc|tests|benchmarks|docs|examples"
        for path in re.findall(rf"`((?:{folders})/[\w./-]*\w(?:\.\w+|/))`", page.read_text()):
            assert (DOCS.parent / path).exists(), f"{page.name}: {path}"


# The tables of CONTRIBUTING.md


def contributing_table(first_column):
    """Rows of the table of CONTRIBUTING.md whose first column has this heading: what each column has."""
    lines = (DOCS.parent / "CONTRIBUTING.md").read_text().splitlines()
    start = next(i for i, line in enumerate(lines) if line.startswith(f"| {first_column} |"))
    end = next(i for i, line in enumerate(lines[start:], start) if not line.startswith("|"))
    head, _, *rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[start:end]]
    return [dict(zip(head, row, strict=True)) for row in rows]


def files_of(cell):
    """The files that a cell names, each of which exists; nothing else stands in the cell."""
    files = re.findall(r"`([^`]+)`", cell)
    assert files and ", ".join(f"`{file}`" for file in files) == cell, cell
    for file in files:
        assert (DOCS.parent / file).is_file(), file
    return files


ROOMS = {
    "kernel": "kernels", "operator": "fastattn/ops", "function": "fastattn", "layer or model": "fastattn/nn",
    "test": "tests", "benchmark": "benchmarks/suites",
}  # fmt: skip


def test_each_operation_leads_to_files_that_exist():
    """From the kernel to the benchmark: a cell repeats the one above, or says that there is nothing."""
    rows = contributing_table("operation")
    for above, row in zip([{}, *rows], rows, strict=False):
        assert list(row) == ["operation", *ROOMS] and row["operation"]
        for column, room in ROOMS.items():
            if row[column] == "the same":
                row[column] = above[column]
            if row[column] != "none":
                assert all(file.startswith(f"{room}/") for file in files_of(row[column])), row
        assert "none" not in (row["function"], row["test"]), row


def test_every_operation_has_its_row():
    """Each kernel that is launched, each operator and each public function of attention, decode and block masks
    included.
    """
    listed = {path for row in contributing_table("operation") for path in re.findall(r"`([^`]+)`", str(row))}

    def defining(room, pattern):
        paths = sorted((DOCS.parent / room).glob("*.py"))
        return {f"{room}/{path.name}" for path in paths if re.search(pattern, path.read_text(), re.M)}

    launched = defining("kernels", r"^def \w+_kernel\(")
    operators = defining("fastattn/ops", r"^[A-Z_]+ = define\(")
    public = [getattr(fastattn.functional, name) for name in fastattn.functional.__all__]
    functions = {f"{thing.__module__.replace('.', '/')}.py" for thing in public if inspect.isfunction(thing)}
    found = launched | operators | functions | {"fastattn/block_mask.py", "fastattn/inference/generate.py"}
    assert min(len(launched), len(operators), len(functions)) >= 2
    assert not found - listed


def test_the_way_of_q_enters_each_file_once():
    rows = contributing_table("stop")
    files = [file for row in rows for file in files_of(row["file"])]
    assert [row["stop"] for row in rows] == [str(i + 1) for i in range(len(rows))] and len(rows) <= 7
    assert len({*files}) == len(files) == len(rows)


def test_every_page_is_in_the_navigation():
    listed = re.findall(r"([\w-]+)\.md$", (DOCS.parent / "mkdocs.yml").read_text(), re.M)
    assert sorted(listed) == [page.stem for page in PAGES]


# The reference is complete


def documented():
    entries = re.findall(r"^::: (\S+)$", (DOCS / "api.md").read_text(), re.M)
    return {re.sub(r"\.(\w+)\.\1$", r".\1", name) for name in entries}  # some modules have the name of their function


def public_names(module):
    """What a module defines itself, under names that a user may use."""
    return [
        name for name, thing in vars(module).items()
        if not name.startswith("_") and getattr(thing, "__module__", None) == module.__name__
    ]  # fmt: skip


def test_every_public_name_is_in_the_reference():
    expected = {f"fastattn.{name}" for name in fastattn.__all__ if name != "nn"}
    expected |= {f"fastattn.nn.{name}" for name in fastattn.nn.__all__}
    expected |= {f"fastattn.testing.{name}" for name in testing.__all__ if name.islower()}
    for room in (fastattn.compat, fastattn.distributed):
        expected |= {f"{room.__name__}.{name}" for name in room.__all__}
    for module in (diffusers, huggingface, huggingface_weights):
        expected |= {f"{module.__name__}.{name}" for name in public_names(module)}
    assert documented() == expected


def arguments_of(function):
    """Names; without the catch-all ``**unknown``, which is there to refuse."""
    return {*inspect.signature(function).parameters} - {"unknown"}


@pytest.mark.parametrize("name", sorted(documented()))
def test_docstrings_name_the_arguments_that_there_are(name):
    thing = fastattn
    for part in name.split(".")[1:]:
        thing = getattr(thing, part)
    members = [m for m in vars(thing).values() if inspect.isroutine(m)] if inspect.isclass(thing) else []
    for function in (thing, *(m.__func__ if isinstance(m, classmethod) else m for m in members)):
        section = re.search(r"\n *Args:\n(.*?)(\n\n|$)", inspect.getdoc(function) or "", re.S)
        if section is None:
            continue
        described = [n for names in re.findall(r"^    (\w[\w, ]*):", section[1], re.M) for n in names.split(", ")]
        arguments = arguments_of(function) - {"self", "cls", "device", "dtype"}  # PyTorch's own
        if dataclasses.is_dataclass(function):  # a base class describes its own fields
            arguments &= {*inspect.get_annotations(function)}
        assert sorted({*described} - {"device", "dtype"}) == sorted(arguments)


def test_every_argument_of_attention_is_explained():
    text = (DOCS / "operator.md").read_text()
    explained = re.findall(r"^#+ `(\w+)`(?:, `(\w+)`)?(?:, `(\w+)`)?", text, re.M)
    assert {name for names in explained for name in names if name} == arguments_of(fastattn.attention)


# The pictures


@pytest.fixture(scope="module")
def draw_masks():
    spec = importlib.util.spec_from_file_location("draw_masks", DOCS / "draw_masks.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules["draw_masks"] = module
    yield (spec.loader.exec_module(module), module)[1]
    del sys.modules["draw_masks"]


def positions(panel):
    return torch.tensor(list(panel.positions))[:, None], torch.arange(panel.data.shape[1])


def test_causal_pictures(draw_masks):
    for panel in draw_masks.causal():
        x, j = positions(panel)
        assert torch.equal(panel.data, j <= x), panel.title
    square, top_left, bottom_right, tall = (panel.data.shape for panel in draw_masks.causal())
    assert (square, top_left, bottom_right, tall) == ((6, 6), (4, 8), (4, 8), (8, 5))
    for panel, start in zip(draw_masks.offsets(), (0, 4, 9), strict=True):
        x, j = positions(panel)
        assert x[0] == start and torch.equal(panel.data, j <= x), panel.title


def test_window_pictures(draw_masks):
    sides = [(2, 2), (3, 0), (100, 2), (5, -2)]
    for panel, (left, right) in zip(draw_masks.windows(), sides, strict=True):
        x, j = positions(panel)
        assert torch.equal(panel.data, (x - left <= j) & (j <= x + right)), panel.title


def test_mask_pictures(draw_masks):
    for panel, length in zip(draw_masks.padding(), (8, 5, 0), strict=True):
        assert torch.equal(panel.data, (torch.arange(8) < length).expand(8, 8)), panel.title
    *parts, whole = (panel.data for panel in draw_masks.combined())
    assert len(parts) == 3 and torch.equal(whole, parts[0] & parts[1] & parts[2])
    assert len({tuple(part.flatten().tolist()) for part in parts}) == 3


def test_packed_pictures(draw_masks):
    document = torch.tensor([0] * 3 + [1] * 5 + [2] * 4)
    same, (i, j) = document[:, None] == document, torch.meshgrid(torch.arange(12), torch.arange(12), indexing="ij")
    full, causal, window = (panel.data for panel in draw_masks.packed())
    assert torch.equal(full, same)
    assert torch.equal(causal, same & (j <= i))
    assert torch.equal(window, same & (j <= i) & (j >= i - 1))


def test_alibi_picture(draw_masks):
    i, j = torch.meshgrid(torch.arange(8), torch.arange(8), indexing="ij")
    for panel, slope in zip(draw_masks.alibi(), (1.0, 0.5, 0.25, 0.125), strict=True):
        expected = torch.where(j <= i, slope * (j - i), -torch.inf)
        assert torch.equal(panel.data.mul(64).round() / 64, expected), panel.title  # slopes are multiples of 1/64


def test_tile_pictures(draw_masks):
    for title, mask in draw_masks.block_masks():
        tiles = mask.to_dense()[0, 0].view(8, 128, 8, 128).transpose(1, 2).flatten(2)
        expected = torch.where(tiles.all(-1), 1, torch.where(tiles.any(-1), 2, 0))
        assert torch.equal(draw_masks.kinds(mask).long(), expected), title
        assert set(expected.unique().tolist()) >= {0, 2}, title


def test_pictures_show_this_data(draw_masks):
    """What the file says it shows is what the package computes now: else run docs/draw_masks.py again."""
    linked = re.findall(r"\]\(images/([\w-]+)\.svg\)", (DOCS / "masks.md").read_text())
    assert sorted(linked) == sorted(draw_masks.NAMES)
    for name in draw_masks.NAMES:
        assert f"data {draw_masks.digest(name)}<" in (DOCS / "images" / f"{name}.svg").read_text(), name
