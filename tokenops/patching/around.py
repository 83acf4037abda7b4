"""What the modules around blocks become in a patched model, where these alone are not enough."""

from typing import Any

import torch
from torch import Tensor, fx

from .engine import refuse_symbols, tokens_of
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
        if x.dim() == 3 and not hasattr(self, "get_shape"):
            raise ValueError(
                "patches were given as rows, of images of any shape, but the method was fitted to a grid: give images"
            )
        grid = grid_of(self, x.shape)
        if grid != self.tokenops_grid:
            rows, columns = self.tokenops_grid
            raise ValueError(
                f"the images give {grid[0]} x {grid[1]} patches, but the method was fitted to a grid of {rows} x"
                f" {columns}: remove_patch, and apply_patch for the new size"
            )
        return super().forward(*args, **kwargs)  # type: ignore[misc]


class PatchedTail:
    """An encoder of transformers whose tokens behind the patches go before them while it runs: hidden states have them
    there, what comes out of it has them where they were.

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


class PatchedCollector:
    """An encoder of transformers that keeps what its layers hand on, for those who ask for hidden states."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)  # type: ignore[misc]
        if isinstance(out, tuple):  # where no dict is asked for
            return tuple(_tokens(part) for part in out)
        out.hidden_states = _tokens(out.hidden_states)
        return out


def _tokens(states: Any) -> Any:
    return tuple(map(tokens_of, states)) if isinstance(states, tuple) else states


class PatchedModel:
    """A model of transformers, which refuses attention weights. Where it makes a mask of ones as it is traced, one
    without any entry stands for none.

    Attributes:
        tokenops_mask: the place of ``attention_mask`` among its arguments, None without.
        tokenops_biased: whether its layers add a bias of positions to the mask, so that none can be given; and whether
            the model itself does.
    """

    tokenops_mask: int | None
    tokenops_biased: tuple[bool, bool]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        if kwargs.get("output_attentions"):
            raise ValueError("output_attentions was given to a patched model, which has none of all tokens")
        if self.tokenops_mask is None:
            return super().forward(*args, **kwargs)  # type: ignore[misc]
        given = len(args) > self.tokenops_mask or kwargs.get("attention_mask") is not None
        layers, model = self.tokenops_biased
        if given and layers:
            raise ValueError(
                "attention_mask was given to a patched model, whose tokens change between blocks: leave it out"
            )
        if torch.compiler.is_compiling() and not given and not model:
            x = next(value for value in (*args, *kwargs.values()) if isinstance(value, Tensor))
            kwargs["attention_mask"] = x.new_empty((0, 0, 0, 0))
        return super().forward(*args, **kwargs)  # type: ignore[misc]
