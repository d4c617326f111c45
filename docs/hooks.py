"""What the site does to its pages before they are rendered."""

import re
from typing import Any

_BEYOND_THE_SITE = re.compile(r"\[([^\]]+)\]\(\.\./[^)]+\)")


def on_page_markdown(markdown: str, **_: Any) -> str:
    """A link to a file of the repository that is no page becomes its name: the site does not know where that is."""
    return _BEYOND_THE_SITE.sub(r"`\1`", markdown)
