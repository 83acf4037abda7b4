"""Merging neighbours of the token grid with learned weights, and the layout in which the pairs lie side by side."""

from typing import Any

import torch
from torch import Tensor, nn

from ..ops.merge_neighbours import AXES, merge_neighbours, unmerge_neighbours

KINDS = ("average", "scalar", "channel", "linear", "content")
LAYOUTS = ("raster", "block")


def grid_order(grid: tuple[int, int]) -> Tensor:
    """The block layout: which raster patch stands where, when the patches of every 2x2 block follow each other.

    Position t of the order (i, j, dy, dx) holds patch ``grid_order(grid)[t]`` of the raster: row 2i + dy, column
    2j + dx. A horizontal merge and a vertical one behind it then both take the rows 2m and 2m+1.

    Args:
        grid: (H, W), both even.

    Returns:
        ``(H*W,)`` int64.

    Raises:
        ValueError: a side is odd.

    >>> grid_order((2, 4)).tolist()
    [0, 1, 4, 5, 2, 3, 6, 7]
    """
    height, width = grid
    if height % 2 or width % 2:
        raise ValueError(f"grid_order: grid={tuple(grid)}, but 2x2 blocks need even sides")
    places = torch.arange(height * width).reshape(height // 2, 2, width // 2, 2)
    return places.transpose(1, 2).flatten()


def raster_order(grid: tuple[int, int]) -> Tensor:
    """The way back from `grid_order`: where in the block layout each raster patch stands, ``(H*W,)`` int64.

    Raises:
        ValueError: a side is odd.
    """
    return grid_order(grid).argsort()


class NeighbourMerging(nn.Module):
    r"""Halve one axis of the token grid by merging neighbours, with fixed or learned weights.

    A pair (a, b) becomes, by ``kind``:

    - "average": :math:`(a + b) / 2`;
    - "scalar": :math:`\alpha a + \beta b` with two numbers;
    - "channel": :math:`\alpha \odot a + \beta \odot b` with two vectors over the channels;
    - "linear": :math:`W [a; b] + c`;
    - "content": the mean by :math:`\mathrm{softmax}(l_a, l_b)`, :math:`l = w^\top \mathrm{LN}(x)`.

    All begin as the average. The last column or row of an odd axis is passed through as it is.

    Args:
        dim: C, channels of a token.
        axis: "horizontal" merges the columns 2j and 2j+1, "vertical" the rows 2i and 2i+1.
        grid: (H, W) of the tokens that come in.
        kind: one of the above.
        prefix: P, how many leading tokens (class, distillation) are copied.
        layout: "raster" takes the grid row by row. "block" takes it as `grid_order` puts it, which needs an even axis
            (and rows, for "horizontal"): pairs are rows 2m and 2m+1 then.

    Attributes:
        merged_grid: (H, W) of the tokens that come out.
        commutes: whether the weights are scalars, so that a linear map may follow the merge instead of preceding it.

    Shapes:
        ``x`` is ``(B, P+H*W, C)``, the result ``(B, P+M, C)``. Where nothing is learned over the channels ("average",
        "scalar") tokens may have any width.

    Raises:
        ValueError: an option has no such value, or the axis is odd in the block layout.

    Source: asymmetric token merging of CAIT (Wang et al., arXiv 2309.15755), reconstructed from the published
    description: the weights and the layout are ours.

    >>> merge = NeighbourMerging(64, "horizontal", (14, 14), "channel")
    >>> merge(torch.randn(2, 197, 64)).shape, merge.merged_grid
    (torch.Size([2, 99, 64]), (14, 7))
    """

    def __init__(
        self,
        dim: int,
        axis: str,
        grid: tuple[int, int],
        kind: str = "average",
        *,
        prefix: int = 1,
        layout: str = "raster",
    ) -> None:
        super().__init__()
        for name, value, allowed in (("axis", axis, AXES), ("kind", kind, KINDS), ("layout", layout, LAYOUTS)):
            if value not in allowed:
                raise ValueError(
                    f"NeighbourMerging: {name}={value!r}, but it must be one of {', '.join(map(repr, allowed))}"
                )
        height, width = grid
        if layout == "block" and (height % 2 or (axis == "horizontal" and width % 2)):
            raise ValueError(
                f"NeighbourMerging: grid={tuple(grid)} has odd sides, but layout='block' merges whole 2x2 blocks"
            )
        self.dim, self.axis, self.kind, self.prefix, self.layout = dim, axis, kind, prefix, layout
        self.grid = height, width
        self.merged_grid = (height, (width + 1) // 2) if axis == "horizontal" else ((height + 1) // 2, width)
        if kind in ("scalar", "channel"):
            channels = 1 if kind == "scalar" else dim
            self.alpha = nn.Parameter(torch.full((channels,), 0.5))
            self.beta = nn.Parameter(torch.full((channels,), 0.5))
        elif kind == "linear":
            self.linear = nn.Linear(2 * dim, dim)
        elif kind == "content":
            self.norm = nn.LayerNorm(dim)
            self.score = nn.Linear(dim, 1, bias=False)  # a bias is the same for both of a pair
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Back to the average."""
        with torch.no_grad():
            if self.kind in ("scalar", "channel"):
                self.alpha.fill_(0.5)
                self.beta.fill_(0.5)
            elif self.kind == "linear":
                self.linear.weight.copy_(torch.eye(self.dim).div(2).repeat(1, 2))
                self.linear.bias.zero_()
            elif self.kind == "content":
                self.norm.reset_parameters()
                self.score.weight.zero_()

    @property
    def source(self) -> Tensor:
        """Which of the M tokens each of the H*W goes into, ``(H*W,)`` int64."""
        (height, width), columns = self.grid, self.merged_grid[1]
        place = torch.arange(height * width)
        if self.layout == "block":
            return place // 2
        row, column = place // width, place % width
        return row * columns + column // 2 if self.axis == "horizontal" else row // 2 * columns + column

    @property
    def commutes(self) -> bool:
        return self.kind in ("average", "scalar")

    def forward(self, x: Tensor, sizes: Tensor | None = None) -> Any:
        """Tokens to merged tokens.

        Args:
            x: ``(B, P+H*W, C)``.
            sizes: ``(B, H*W)``, how many patches each token stands for, as in :func:`tokenops.merge_neighbours`: tokens
                count by them, before "linear" too.

        Returns:
            ``(B, P+M, C)``, or with sizes a tuple of this and the new sizes ``(B, M)``.

        Raises:
            ValueError: shapes do not fit together.
        """
        grid, axis = self.grid, self.axis
        if self.layout == "block":
            grid, axis = (1, grid[0] * grid[1]), "horizontal"
        if self.kind == "linear":
            return self._linear(x, grid, axis, sizes)
        weights: Any = None
        if self.kind in ("scalar", "channel"):
            weights = self.alpha, self.beta
        elif self.kind == "content":
            weights = self.score(self.norm(x[:, self.prefix :])).squeeze(2)
        return merge_neighbours(x, grid, axis, weights, prefix=self.prefix, sizes=sizes)

    def _linear(self, x, grid, axis, sizes):
        if x.shape[1] != self.prefix + grid[0] * grid[1]:
            raise ValueError(
                f"NeighbourMerging: x has {x.shape[1]} tokens, but the grid {self.grid} and a prefix of {self.prefix}"
                f" make {self.prefix + grid[0] * grid[1]}"
            )
        tokens = weighted = x[:, self.prefix :]
        total = None
        if sizes is not None:
            total = merge_neighbours(sizes.detach().unsqueeze(2), grid, axis, (1.0, 1.0), prefix=0)
            of_pair = unmerge_neighbours(total, grid, (axis,), prefix=0)
            share = (2 * sizes.detach().unsqueeze(2) / of_pair).masked_fill(of_pair == 0, 1.0)
            weighted = (tokens * share).to(x.dtype)
        dim = 2 if axis == "horizontal" else 1
        paired = grid[dim - 1] // 2
        pairs = weighted.unflatten(1, grid).narrow(dim, 0, 2 * paired).unflatten(dim, (paired, 2))
        merged = self.linear(pairs.movedim(dim + 1, -2).flatten(-2)).to(x.dtype)
        lone = tokens.unflatten(1, grid).narrow(dim, 2 * paired, grid[dim - 1] % 2)
        y = torch.cat((x[:, : self.prefix], torch.cat((merged, lone), dim).flatten(1, 2)), dim=1)
        return y if total is None else (y, total.squeeze(2))

    def extra_repr(self) -> str:
        return f"{self.grid} to {self.merged_grid}, {self.kind}, prefix={self.prefix}, layout={self.layout}"
