"""Four processes on gloo that a session of tests shares: started once, then fed with functions of this package.

They are forked from a server that has imported everything, so that the imports are paid for once.
"""

import contextlib
import datetime
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback

import pytest
import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh

WORLD = 4
PATIENCE = 60.0  # seconds that a test waits for its processes: far beyond what any needs


def _serve(rank, rendezvous, connection):
    """Run what comes in as (function, sizes of the mesh, arguments) until there is no more."""
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True, warn_only=True)
    dist.init_process_group(
        "gloo", init_method=f"file://{rendezvous}", rank=rank, world_size=WORLD,
        timeout=datetime.timedelta(seconds=PATIENCE / 2),
    )  # fmt: skip
    meshes = {n: DeviceMesh("cpu", list(range(n)), mesh_dim_names=("cp",)) for n in range(1, WORLD + 1)}
    meshes["2x2"] = DeviceMesh("cpu", [[0, 1], [2, 3]], mesh_dim_names=("ring", "heads"))
    while (request := connection.recv_bytes()) != b"":
        function, ranks, arguments = pickle.loads(request)
        try:
            torch.manual_seed(0)
            mesh = meshes[ranks]
            answer = (True, function(mesh, *arguments)) if rank < mesh.size() else (True, None)
        except BaseException as error:
            answer = (False, f"{type(error).__name__}: {error}\n{traceback.format_exc()}")
        connection.send_bytes(pickle.dumps(answer))
    os._exit(0)  # a group whose ranks were made to fail does not close in order


class Ranks:
    """The processes, as a test sees them."""

    def __init__(self):
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["fastattn.distributed", "fastattn.testing", "tests.support.ranks_models"])
        self._folder = tempfile.TemporaryDirectory()
        self._processes, self._connections = [], []
        for rank in range(WORLD):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_serve, args=(rank, os.path.join(self._folder.name, "rendezvous"), theirs), daemon=True
            )
            process.start()
            theirs.close()
            self._processes.append(process)
            self._connections.append(ours)

    def answers(self, function, *arguments, ranks=WORLD):
        """(whether it went well, result or error text) of each of the first ranks, called with their mesh.

        ``ranks``: how many, or "2x2" for a mesh of two dimensions.
        """
        request, deadline = pickle.dumps((function, ranks, arguments)), time.monotonic() + PATIENCE
        for connection in self._connections:
            connection.send_bytes(request)
        found = []
        for rank, connection in enumerate(self._connections):
            if not connection.poll(max(0.0, deadline - time.monotonic())):
                self.stop()
                pytest.fail(f"rank {rank} hangs in {function.__name__}{arguments}")
            found.append(pickle.loads(connection.recv_bytes()))
        return found if ranks == "2x2" else found[:ranks]

    def run(self, function, *arguments, ranks=WORLD):
        """The results, where all go well."""
        found = self.answers(function, *arguments, ranks=ranks)
        assert all(good for good, _ in found), "\n".join(str(x) for good, x in found if not good)
        return [x for _, x in found]

    def stop(self):
        for process, connection in zip(self._processes, self._connections, strict=True):
            with contextlib.suppress(OSError):
                connection.send_bytes(b"")
            process.join(5)
            process.kill()
        self._folder.cleanup()
