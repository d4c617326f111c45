"""Modules that tests share."""

from torch import nn


class Call(nn.Module):
    """A function as a module, which is what an exporter takes."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, *args):
        return self.function(*args)
