"""Find, check and load the CPU library, which `fastattn.backends.cpu` calls. `csrc/cpu/interface.h` declares it.

This module imports the standard library only: `setup.py` takes `source_digest` from it where PyTorch is missing.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
from pathlib import Path

ABI = 7
BUILD = "make ext-cpu, or install again where a C++ compiler is found"

_PACKAGE = Path(__file__).resolve().parents[2]
_LIBRARY = _PACKAGE / "libfastattn_cpu.so"  # the only place: no search path, no environment variable
PRESENT = _LIBRARY.is_file()
"""A constant, because a trace cannot look for files."""
MISSING = f"not compiled: {BUILD}"
_SOURCES = _PACKAGE.parent / "csrc" / "cpu"  # in a checkout
_BAD_ARGUMENT = 1


def source_digest(folder: Path) -> str:
    """The digest of the C++ sources in ``folder``, names and contents. The library contains it too."""
    hasher = hashlib.sha256()
    for path in sorted((*folder.glob("*.cpp"), *folder.glob("*.h"))):
        hasher.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return hasher.hexdigest()[:12]


@functools.cache
def load(path: Path = _LIBRARY) -> ctypes.CDLL:
    """The library at ``path``, with the types of its functions.

    Raises:
        OSError: the library is missing or does not load.
        ValueError: it has another version, or other sources than this checkout.
    """
    library = ctypes.CDLL(str(path))  # releases the GIL during calls
    try:
        abi = library.fastattn_cpu_abi()
        if abi != ABI:
            raise ValueError(f"{path.name}: expected ABI {ABI}, got {abi}; build it again: {BUILD}")
        for name in ("digest", "last_error", "variant"):
            getattr(library, f"fastattn_cpu_{name}").restype = ctypes.c_char_p
        library.fastattn_cpu_use_variant.argtypes = [ctypes.c_char_p]
        for name in (
            "forward", "backward", "decode", "append", "linear", "norm", "rotate", "dropout", "rms_norm", "gate",
        ):  # fmt: skip
            structs = {"forward": 2, "backward": 3}.get(name, 1)
            getattr(library, f"fastattn_cpu_{name}").argtypes = [ctypes.c_char_p] * structs  # bytes, or None
        library.fastattn_cpu_run.argtypes = [ctypes.c_char_p, ctypes.c_int64]
    except AttributeError as error:
        raise ValueError(f"{path.name}: expected the functions of csrc/cpu/interface.h: {error}") from None
    if (_SOURCES / "interface.h").is_file():
        built, current = library.fastattn_cpu_digest().decode(), source_digest(_SOURCES)
        if built != current:
            raise ValueError(f"{path.name}: expected sources {current}, built from {built}; build it again: {BUILD}")
    return library


@functools.cache
def problem() -> str | None:
    """Why there is no library to call; None if there is one. It looks once per process."""
    if not _LIBRARY.is_file():
        return MISSING
    try:
        load()
    except (OSError, ValueError) as error:
        return str(error)
    return None


def check(status: int) -> None:
    """Raise the error that a function of the library reports.

    Raises:
        ValueError: the library refuses an argument.
        MemoryError: memory ran out.
    """
    if status:
        text = f"fastattn: {load().fastattn_cpu_last_error().decode()}"
        raise ValueError(text) if status == _BAD_ARGUMENT else MemoryError(text)


_OWN_PROCESS = True


def _after_fork() -> None:
    global _OWN_PROCESS
    _OWN_PROCESS = False


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_after_fork)


@functools.cache
def parallel_address() -> int:
    """The address of PyTorch's own `GOMP_parallel`. 0 if there is none: each call then starts threads."""
    try:
        function = ctypes.CDLL(None).GOMP_parallel  # PyTorch has loaded its OpenMP runtime globally
    except (AttributeError, OSError, TypeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def forked() -> bool:
    """Whether this process is a fork. It lacks the threads of the OpenMP runtime, so entering the runtime would
    hang."""
    return not _OWN_PROCESS
