"""Intermediate features of a patched timm model: tokens as they are, or maps where the tokens still cover the grid."""

from typing import Any

from timm.models._features import feature_take_indices

from ..merge_bipartite import unmerge_bipartite


class FeatureMaps:
    """Stands on a patched model for its ``forward_intermediates``, which would take fewer tokens for fewer channels."""

    def __init__(self, patch: Any) -> None:
        self.patch = patch

    def __call__(
        self,
        x: Any,
        indices: int | list[int] | None = None,
        return_prefix_tokens: bool = False,
        norm: bool = False,
        stop_early: bool = False,
        output_fmt: str = "NCHW",
        intermediates_only: bool = False,
        **kwargs: Any,
    ) -> Any:
        """Outputs of chosen blocks as timm's models give them, with its arguments.

        "NLC" gives the tokens as they are behind a block. "NCHW" gives maps of the full grid, in which patches that
        were merged have the same values.

        Raises:
            ValueError: ``output_fmt`` is neither, or "NCHW" where patches were dropped, fused or mixed.
        """
        if output_fmt not in ("NCHW", "NLC"):
            raise ValueError(f"output_fmt={output_fmt!r}, but it must be 'NCHW' or 'NLC'")
        patch, owner = self.patch, self.patch.owner
        original = type(owner).forward_intermediates
        with patch.traced():
            out = original(
                owner, x, indices, return_prefix_tokens, norm, stop_early, "NLC", intermediates_only, **kwargs
            )
            steps = patch.steps if patch.state is None else patch.state.steps
        if output_fmt == "NLC":
            return out
        found = out["image_intermediates"] if isinstance(out, dict) else out if intermediates_only else out[1]
        grid = patch.grid_of(x)
        for j, i in enumerate(sorted(feature_take_indices(len(patch.blocks), indices)[0])):
            tokens, *others = found[j] if isinstance(found[j], tuple) else (found[j],)
            done = [step for step in steps if step.block <= i]
            if done and not patch.method.merges:
                raise ValueError(
                    f"block {i} gives {tokens.shape[1]} tokens that are not the grid's {grid[0]} x {grid[1]} patches"
                    f" ({patch.method.name}): use output_fmt='NLC'"
                )
            if done and tokens.shape[1] != grid[0] * grid[1]:
                tokens = unmerge_bipartite(tokens, done[-1].sources, prefix=0)
            y = tokens.transpose(1, 2).unflatten(2, grid).contiguous()
            found[j] = (y, *others) if others else y
        return out
