"""What the tests of other packages' functions share."""

import sys

import pytest

import fastattn.compat


@pytest.fixture
def absent(request, monkeypatch):
    """The package named by the test module's PACKAGE is not there, whether or not this machine has it."""
    package = request.module.PACKAGE
    for name in [name for name in sys.modules if name.partition(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    find = fastattn.compat.importlib.util.find_spec
    monkeypatch.setattr(
        fastattn.compat.importlib.util, "find_spec", lambda name: None if name == package else find(name)
    )
    yield
    fastattn.compat.uninstall()
