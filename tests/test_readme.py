"""The README's code blocks run as they stand, and print what it says they print."""

import contextlib
import io
import re
from pathlib import Path

import pytest

README = Path(__file__).parent.parent / "README.md"
BLOCKS = re.findall(r"```python\n(.*?)```(?:\n+```text\n(.*?)```)?", README.read_text(), re.S)


@pytest.mark.parametrize(("code", "printed"), BLOCKS, ids=[code.strip().splitlines()[-1][:50] for code, _ in BLOCKS])
def test_block(code, printed, monkeypatch):
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)  # as a reader's environment is
    output = io.StringIO()
    with contextlib.redirect_stdout(output):
        exec(compile(code, str(README), "exec"), {})
    if printed:
        assert output.getvalue().rstrip() == printed.rstrip()


def test_has_blocks_for_function_layer_and_conversion():
    text = "".join(code for code, _ in BLOCKS)
    for name in ("scaled_dot_product_attention", "fastattn.attention", "fastattn.nn.", "fastattn.convert", "explain"):
        assert name in text


def test_links_lead_somewhere():
    for target in re.findall(r"\]\(([^)#]+)\)", README.read_text()):
        if not target.startswith("http"):
            assert (README.parent / target).exists(), target
