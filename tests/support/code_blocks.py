"""The code in Markdown pages: ``python`` blocks run and print what the ``text`` block behind them says."""

import contextlib
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

_BLOCK = re.compile(r"^```python\n(.*?)^```(?:\n+```text\n(.*?)^```)?", re.S | re.M)


class Block(NamedTuple):
    path: Path
    line: int
    code: str
    printed: str
    """"" where no output is given"""

    def run(self, names: dict[str, Any]) -> None:
        """Run with ``names`` as globals, as a program's own; a traceback points into the page."""
        names["__name__"] = "__main__"
        output = io.StringIO()
        with contextlib.redirect_stdout(output):
            exec(compile("\n" * self.line + self.code, str(self.path), "exec"), names)
        if self.printed:
            assert output.getvalue().rstrip() == self.printed.rstrip()


def blocks(path: Path) -> list[Block]:
    """The ``python`` blocks of a page, in order."""
    text = path.read_text()
    return [
        Block(path, text.count("\n", 0, found.start()) + 1, found[1], found[2] or "") for found in _BLOCK.finditer(text)
    ]
