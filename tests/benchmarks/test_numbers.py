"""Numbers in texts: written from the data, and checked against it."""

import pytest

from benchmarks.harness import results
from benchmarks.tools import readme, status
from tests.support.benchmark_runs import row


@pytest.fixture
def texts(tmp_path):
    """A repository with one page, and results of one GPU."""
    results.upsert(tmp_path / "results" / "gpu" / "forward.csv", [row(), row("sdpa-flash", "2")])
    (tmp_path / "README.md").write_text(
        "It is <!-- numbers:gpu -->old<!-- end -->\n<!-- numbers:forward -->\n<!-- end -->"
    )
    return tmp_path


def test_numbers_are_written_and_checked(texts):
    data = readme.Data(texts / "results", current="new")
    assert readme.outdated(texts, data) == ["README.md"]
    assert readme.outdated(texts, data, write=True) == ["README.md"]
    text = (texts / "README.md").read_text()
    assert "| D=128, full, bf16, forward | 500 (2.00x) |" in text and "Measured on NVIDIA H100" in text
    assert "older kernels" not in text
    assert readme.outdated(texts, data) == []
    results.upsert(texts / "results" / "gpu" / "forward.csv", [row(p50="0.5")])
    assert readme.outdated(texts, data) == ["README.md"]  # the data changed, the text did not


def test_numbers_of_older_kernels_must_say_so(texts):
    readme.outdated(texts, readme.Data(texts / "results", current="new"), write=True)
    newer = readme.Data(texts / "results", current="newer")
    assert readme.outdated(texts, newer) == ["README.md"]
    readme.outdated(texts, newer, write=True)
    assert "**Some rows are of older kernels than those of this checkout.**" in (texts / "README.md").read_text()
    assert readme.outdated(texts, newer) == []


def test_unknown_numbers_are_an_error(texts):
    (texts / "README.md").write_text("<!-- numbers:speed -->1<!-- end -->")
    with pytest.raises(KeyError, match="numbers:speed: expected one of forward"):
        readme.outdated(texts, readme.Data(texts / "results"))


@pytest.fixture(scope="module")
def filled(dry, tmp_path_factory):
    """Results of every suite, of a GPU and of a CPU."""
    root = tmp_path_factory.mktemp("filled")
    for folder in ("gpu", "cpu-x"):
        for path in dry.glob("*.csv"):
            results.upsert(root / folder / path.name, results.read(path))
    return readme.Data(root)


@pytest.mark.parametrize("name", readme.BLOCKS)
def test_every_block_has_a_text_with_and_without_data(name, filled, tmp_path):
    without = readme.BLOCKS[name](readme.Data(tmp_path))
    assert readme.NO_GPU in without or "not measured yet" in without
    assert readme.BLOCKS[name](filled)


def test_texts_of_this_repository_are_what_the_data_says():
    assert readme.outdated() == [], "python -m benchmarks.tools.readme --write"
    assert status.PAGE.read_text() == status.page(), "python -m benchmarks.tools.status --write"
