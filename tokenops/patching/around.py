"""What the modules around blocks become in a patched model, where these alone are not enough."""

from typing import Any

import torch
from torch import Tensor, fx

from .engine import refuse_symbols
from .trunks import grid_of


class PatchedGrid:
    """A patch embedding whose images must have the grid the method was fitted to.

    Attributes:
        tokenops_grid: rows and columns.
    """

    tokenops_grid: tuple[int, int]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        x: Any = next(value for value in (*args, *kwargs.values()) if isinstance(value, (Tensor, fx.Proxy)))
        refuse_symbols(x)
        grid = grid_of(self, x.shape)
        if grid != self.tokenops_grid:
            rows, columns = self.tokenops_grid
            raise ValueError(
                f"the images give {grid[0]} x {grid[1]} patches, but the method was fitted to a grid of {rows} x"
                f" {columns}: remove_patch, and apply_patch for the new size"
            )
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class PatchedTail:
    """An encoder of transformers whose tokens behind the patches go before them while it runs.

    Attributes:
        tokenops_tail: how many.
    """

    tokenops_tail: int

    def forward(self, hidden_states: Tensor, *args: Any, **kwargs: Any) -> Any:
        tail = self.tokenops_tail
        first, patches, last = hidden_states.tensor_split((1, hidden_states.shape[1] - tail), dim=1)
        out = super().forward(torch.cat((first, last, patches), dim=1), *args, **kwargs)  # type: ignore[misc]
        first, last, patches = out.last_hidden_state.tensor_split((1, 1 + tail), dim=1)
        out.last_hidden_state = torch.cat((first, patches, last), dim=1)
        return out


class PatchedMaskless:
    """A model of transformers that makes a mask of ones where it is traced; one without any entry stands for none.

    Attributes:
        tokenops_mask: the place of ``attention_mask`` among its arguments.
    """

    tokenops_mask: int

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        given = len(args) > self.tokenops_mask or kwargs.get("attention_mask") is not None
        if torch.compiler.is_compiling() and not given:
            x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            kwargs["attention_mask"] = x.new_empty((0, 0, 0, 0))
        return super().forward(*args, **kwargs)  # type: ignore[misc]
