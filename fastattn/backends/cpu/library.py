"""The CPU library: found, checked, loaded. `csrc/cpu/interface.h` is its other side, `fastattn.backends.cpu` calls it.

Only the standard library is imported here: `setup.py` takes `source_digest` from this file where PyTorch is missing.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
from pathlib import Path

ABI = 6
BUILD = "make ext-cpu, or install again where a C++ compiler is found"

_PACKAGE = Path(__file__).resolve().parents[2]
_LIBRARY = _PACKAGE / "libfastattn_cpu.so"  # nowhere else: no search path, no variable
PRESENT = _LIBRARY.is_file()
"""A constant, because a trace cannot look for files."""
MISSING = f"not compiled: {BUILD}"
_SOURCES = _PACKAGE.parent / "csrc" / "cpu"  # in a checkout
_BAD_ARGUMENT = 1


def source_digest(folder: Path) -> str:
    """Of the C++ sources in ``folder``, names and contents; compiled into the library."""
    hasher = hashlib.sha256()
    for path in sorted((*folder.glob("*.cpp"), *folder.glob("*.h"))):
        hasher.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return hasher.hexdigest()[:12]


@functools.cache
def load(path: Path = _LIBRARY) -> ctypes.CDLL:
    """The library at ``path``, with the types of its functions.

    Raises:
        OSError: it is not there or does not load.
        ValueError: it is another version's, or compiled from other sources than those of this checkout.
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
    """Why there is no library to call; None if there is one. Looked for once in a process."""
    if not _LIBRARY.is_file():
        return MISSING
    try:
        load()
    except (OSError, ValueError) as error:
        return str(error)
    return None


def check(status: int) -> None:
    """Raise what a function of the library reports.

    Raises:
        ValueError: it refuses an argument.
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
    """Of the `GOMP_parallel` that PyTorch itself uses; 0 where there is none: then each call starts threads."""
    try:
        function = ctypes.CDLL(None).GOMP_parallel  # PyTorch has loaded its OpenMP runtime for all to see
    except (AttributeError, OSError, TypeError):
        return 0
    return ctypes.cast(function, ctypes.c_void_p).value or 0


def forked() -> bool:
    """Whether this process is a fork: the threads of an OpenMP runtime stayed behind, entering it would never end."""
    return not _OWN_PROCESS
