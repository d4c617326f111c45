"""Triton device code and its launchers. Imported as ``fastattn.kernels``, never as ``kernels``."""

# A Python started in the repository root also sees this folder under its bare name. That import would make a
# second copy of every module, with JIT functions of its own, and hide an installed package of that name.
if __name__ != "fastattn.kernels":
    raise ImportError(
        f"expected the import name 'fastattn.kernels', got {__name__!r}: write `import fastattn.kernels`. If another "
        "package asked for its own `kernels`, as transformers does, start Python outside this checkout or with -P"
    )
