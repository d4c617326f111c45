"""Parameters that a plan has made DTensors, as layers that compute on plain tensors see them."""

from torch import Tensor

from fastattn.spec import is_dtensor


def own_part(parameter: Tensor | None) -> Tensor | None:
    """This rank's part of a parameter that is divided by heads; any other as it is."""
    if parameter is None or not is_dtensor(parameter):
        return parameter
    return parameter.to_local()  # pyright: ignore[reportAttributeAccessIssue]


def for_own_heads(parameter: Tensor) -> Tensor:
    """A parameter that every rank has and applies to its own heads, so that its gradient is the sum of all ranks'."""
    if not is_dtensor(parameter):
        return parameter
    from torch.distributed.tensor import DTensor, Partial

    assert isinstance(parameter, DTensor)
    mesh = parameter.device_mesh
    return parameter.redistribute(mesh, parameter.placements).to_local(grad_placements=[Partial()] * mesh.ndim)
