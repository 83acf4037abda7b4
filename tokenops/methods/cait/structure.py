"""What a compressed model looks like: its merges and widths, their JSON file, and what they cost."""

import json
from dataclasses import asdict, dataclass, fields
from os import PathLike
from pathlib import Path
from typing import Any, cast

import torch
from safetensors.torch import load_file, save_file
from timm.layers import Mlp as TimmMlp
from timm.layers import PatchEmbed
from torch import nn

from ...nn import compact_channels
from ...nn.neighbour_merging import AXES, KINDS, LAYOUTS
from ...patching import apply_patch
from ...patching.as_json import check_keys, read_json
from ...patching.dressing import dress_as
from ..lvvit import ConvStem
from .blocks import MASKS, Mlp, check_model, keep_hidden, prunable
from .merging import CAIT, commutes, merge_points, merges_of, order_of

FORMAT = "tokenops.cait"
VERSION = 1
STRUCTURE_FILE, WEIGHTS_FILE = "structure.json", "model.safetensors"


@dataclass(frozen=True)
class Merge:
    """Tokens merged behind a block.

    Args:
        block: which, from 0.
        axis: "horizontal" or "vertical".
        kind: of the weights, as in `tokenops.nn.NeighbourMerging`.

    Raises:
        ValueError: one of them is something else.
    """

    block: int
    axis: str
    kind: str = "average"

    def __post_init__(self) -> None:
        if type(self.block) is not int or self.block < 0:
            raise ValueError(f"Merge: block must be an int from 0, but got {self.block!r}")
        _option("Merge", "axis", self.axis, AXES)
        _option("Merge", "kind", self.kind, KINDS)


@dataclass(frozen=True)
class Widths:
    """Channels that a block has.

    Args:
        qk: of q and k in every head.
        v: of v in every head.
        hidden: of the MLP's hidden layer; None where the MLP is not timm's and stays as it is.

    Raises:
        ValueError: one of them is no int above 0.
    """

    qk: int
    v: int
    hidden: int | None

    def __post_init__(self) -> None:
        for name, value in asdict(self).items():
            if (type(value) is not int or value < 1) and not (name == "hidden" and value is None):
                raise ValueError(f"Widths: {name} must be an int above 0, but got {value!r}")


@dataclass(frozen=True)
class Structure:
    """Where a model merges its tokens and how wide its blocks are.

    Args:
        merges: in the order of the blocks, at most one behind each.
        layout: of the patches, "raster" or "block", as `CAIT` takes it.
        widths: one a block, or None for those of the dense model.

    Raises:
        ValueError: something else is given, or the merges do not fit the layout.

    >>> structure = Structure((Merge(3, "horizontal"), Merge(7, "vertical", "channel")))
    >>> Structure.from_json(structure.to_json()) == structure
    True
    """

    merges: tuple[Merge, ...] = ()
    layout: str = "raster"
    widths: tuple[Widths, ...] | None = None

    def __post_init__(self) -> None:
        for name, kind in (("merges", Merge), ("widths", Widths)):
            given = getattr(self, name)
            if given is None and name == "widths":
                continue
            if not isinstance(given, (tuple, list)) or not all(isinstance(one, kind) for one in given):
                raise ValueError(f"Structure: {name} must be a tuple of {kind.__name__}, but got {given!r}")
            object.__setattr__(self, name, tuple(given))
        _option("Structure", "layout", self.layout, LAYOUTS)
        places = [merge.block for merge in self.merges]
        if places != sorted(set(places)):
            raise ValueError(f"Structure: merges must be behind ascending blocks, but got {places}")
        axes = tuple(merge.axis for merge in self.merges)
        if self.layout == "block" and (not axes or axes[:2] != ("horizontal", "vertical")[: len(axes)]):
            raise ValueError(f"Structure: layout='block' merges horizontally, then vertically, but merges are {axes}")
        if self.widths is not None and (not self.widths or len(self.widths) <= max(places, default=0)):
            raise ValueError(f"Structure: widths has {len(self.widths)} blocks, but merges are behind {places}")

    @classmethod
    def of(cls, model: Any) -> "Structure":
        """The structure of a timm VisionTransformer. A masked model that is not compacted has full widths.

        Raises:
            TypeError: the model is another one, or behind another method than "cait".
        """
        check_model("Structure.of", model)
        merges = tuple(Merge(i, m.axis, m.kind) for i, m in enumerate(merges_of(model)) if m is not None)
        layout = "raster" if order_of(model) is None else "block"
        return cls(merges, layout, tuple(_widths(block) for block in model.blocks))

    def to_json(self) -> str:
        """The text that :meth:`from_json` reads."""
        head = {"format": FORMAT, "version": VERSION, "layout": self.layout}
        lists = []
        for name in ("merges", "widths"):
            given = getattr(self, name)
            rows = ",\n".join(f"    {json.dumps(asdict(one))}" for one in given or ())
            lists.append(f'"{name}": null' if given is None else f'"{name}": [\n{rows}\n]' if rows else f'"{name}": []')
        return f"{json.dumps(head)[:-1]}, {', '.join(lists)}}}\n"

    @classmethod
    def from_json(cls, text: str) -> "Structure":
        """Read what :meth:`to_json` wrote. ValueError says what is wrong with anything else."""
        found = read_json(text, "CAIT structure", FORMAT, VERSION)
        check_keys("the structure", found, {"format", "version", *(field.name for field in fields(cls))})
        lists: dict[str, Any] = {}
        for name, kind in (("merges", Merge), ("widths", Widths)):
            given = found[name]
            if given is None and name == "widths":
                lists[name] = None
                continue
            if not isinstance(given, list):
                raise ValueError(f"the structure's {name} must be a list, but got {given!r}")
            for i, one in enumerate(given):
                check_keys(f"the structure's {name}[{i}]", one, {field.name for field in fields(kind)})
            lists[name] = tuple(kind(**one) for one in given)
        return cls(lists["merges"], found["layout"], lists["widths"])

    def save(self, path: str | PathLike[str]) -> None:
        """Write the JSON file that :meth:`load` reads."""
        Path(path).write_text(self.to_json(), encoding="utf-8")

    @classmethod
    def load(cls, path: str | PathLike[str]) -> "Structure":
        """Read a file of :meth:`save`: FileNotFoundError without one, ValueError for anything but a valid structure."""
        return cls.from_json(Path(path).read_text(encoding="utf-8"))


def restructure(model: Any, structure: Structure) -> Any:
    """Give a dense model a structure, in place; afterwards the weights of any model of that structure load.

    The new, smaller parameters are the first channels of the dense ones: initialised as these were.

    Args:
        model: a timm VisionTransformer.
        structure: what it becomes.

    Returns:
        The model.

    Raises:
        TypeError: an argument is of another kind, or the model's blocks are.
        ValueError: the structure is for another depth or wider than the model, or its tokens are merged already.
    """
    if not isinstance(structure, Structure):
        raise TypeError(f"restructure: structure must be a Structure, but got {type(structure).__name__}")
    prunable(model)
    if structure.merges and any(merge is not None for merge in merges_of(model)):
        raise ValueError("restructure: the model's tokens are merged already")
    depth = len(model.blocks)
    if structure.widths is not None and len(structure.widths) != depth:
        raise ValueError(f"restructure: the structure has {len(structure.widths)} blocks, but the model has {depth}")
    parts = []
    for i, (block, widths) in enumerate(zip(model.blocks, structure.widths or ())):
        has = _widths(block)
        for name, wide in asdict(has).items():
            narrow = getattr(widths, name)
            if (narrow is None) != (wide is None) or (narrow is not None and narrow > wide):
                raise ValueError(f"restructure: {name}={narrow} in block {i}, but the model has {wide} there")
        keep = {
            f"keep_{name}": torch.arange(getattr(widths, name), device="cpu").expand(block.attn.num_heads, -1)
            for name in ("qk", "v")
            if getattr(widths, name) != getattr(has, name)
        }
        mlp = block.mlp
        if has.hidden != widths.hidden:
            mlp = Mlp.from_timm(mlp)
            mlp.mask = None
            keep_hidden(mlp, torch.arange(widths.hidden or 0, device="cpu"))
        parts.append((compact_channels(block.attn, **keep) if keep else block.attn, mlp))
    if structure.merges:
        points = {merge.block: merge.axis for merge in structure.merges}
        apply_patch(model, CAIT(points, [merge.kind for merge in structure.merges], structure.layout))
    for block, (attn, mlp) in zip(model.blocks, parts):
        block.attn, block.mlp = dress_as(attn, block.attn), mlp
    return model


def uniform_structure(model: Any) -> Structure:
    """The structure of the registered models: default merge points, averages, and the same widths in every block.

    Of a head 3/4 of the channels are left, of an MLP 7/8 of its hidden ones, rounded up to multiples of 16 and 128,
    which vector and matrix units take whole. These are ours: `ChannelPruner` finds which channels, and other widths
    of the same cost.

    Args:
        model: a dense timm VisionTransformer.

    Raises:
        ValueError: it has fewer than 3 blocks.
    """

    def part(channels: Any, eighths: int, multiple: int) -> int:
        return min(channels, -(-channels * eighths // (8 * multiple)) * multiple)

    widths = []
    for has in map(_widths, model.blocks):
        hidden = None if has.hidden is None else part(has.hidden, 7, 128)
        widths.append(Widths(part(has.qk, 6, 16), part(has.v, 6, 16), hidden))
    points = merge_points(None, len(model.blocks))
    return Structure(tuple(Merge(block, axis) for block, axis in points.items()), widths=tuple(widths))


def token_counts(model: Any) -> list[tuple[int, int]]:
    """Tokens, prefix included, that go into the attention and into fc2 of every block of a model in evaluation mode.

    Raises:
        TypeError: the model is not a timm VisionTransformer, or behind another method than "cait".
    """
    check_model("token_counts", model)
    counts = []
    n = model.num_prefix_tokens + _area(model.patch_embed.grid_size)
    for block, merge in zip(model.blocks, merges_of(model)):
        behind = n if merge is None else model.num_prefix_tokens + _area(merge.merged_grid)
        counts.append((n, behind if commutes(block) else n))
        n = behind
    return counts


def macs(model: Any) -> int:
    """Multiply-adds of one image in all matrix products and convolutions, as torch's FLOP counter counts them (halved).

    Args:
        model: a timm VisionTransformer, dense or compressed. Masked channels count, compacted ones do not.

    Raises:
        TypeError: it is another model, or its patch embedding neither timm's ``PatchEmbed`` nor LV-ViT's.
        ValueError: it classifies by another pooling than that of tokens (``global_pool`` "map" or "prr").
    """
    if getattr(model, "attn_pool", None) is not None:
        raise ValueError(f"macs cannot count global_pool={model.global_pool!r}")
    counts = token_counts(model)
    total = _embedding_macs(model)
    for block, (n, n2) in zip(model.blocks, counts):
        total += sum(block_macs(block, n, n2))
    heads = [getattr(model, name, None) for name in ("head", "head_dist")]
    rows = 1 if getattr(model, "global_pool", "token") else _behind(model, counts)
    return total + rows * sum(head.weight.numel() for head in heads if isinstance(head, nn.Linear))


def block_macs(block: Any, n: int, n2: int) -> tuple[int, int, int]:
    """Multiply-adds of a block's attention, MLP and merge, with n tokens into the attention and n2 into fc2."""
    attn, mlp = block.attn, block.mlp
    v_head_dim = getattr(attn, "v_head_dim", attn.head_dim)
    attention = n * _weights(attn) + attn.num_heads * n * n * (attn.head_dim + v_head_dim)
    last = mlp.fc2.weight.numel() if isinstance(mlp, TimmMlp) else 0
    merge, merging = getattr(block, "merge", None), 0
    if merge is not None and merge.kind == "linear":
        merging = (_area(merge.grid) - _area(merge.merged_grid)) * _weights(merge)  # a lone token is passed through
    elif merge is not None and merge.kind == "content":
        merging = _area(merge.grid) * _weights(merge)
    return attention, n * (_weights(mlp) - last) + n2 * last, merging


def save_compressed(model: Any, folder: str | PathLike[str]) -> None:
    """Save a model as an ordinary state dict (``model.safetensors``) and its `Structure` (``structure.json``).

    Raises:
        TypeError: see `Structure.of`.
    """
    structure, folder = Structure.of(model), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_file({name: value.contiguous() for name, value in model.state_dict().items()}, folder / WEIGHTS_FILE)
    structure.save(folder / STRUCTURE_FILE)


def load_compressed(model: Any, folder: str | PathLike[str]) -> Any:
    """Make a dense model the compressed one that `save_compressed` saved, in place.

    Args:
        model: made as the model was that has been compressed.
        folder: where it was saved.

    Returns:
        The model.

    Raises:
        FileNotFoundError: a file is not there.
        TypeError, ValueError: see `restructure` and `Structure.from_json`.
        RuntimeError: the weights are of another model.
    """
    weights = load_file(Path(folder) / WEIGHTS_FILE)
    restructure(model, Structure.load(Path(folder) / STRUCTURE_FILE))
    for i, block in enumerate(model.blocks):
        for part, name in MASKS.values():  # of a model that was masked, not compacted
            value = weights.get(f"blocks.{i}.{part}.{name}")
            if value is not None:
                setattr(getattr(block, part), name, torch.ones_like(value, device=block.norm1.weight.device))
    model.load_state_dict(weights)
    return model


def _widths(block: Any) -> Widths:
    attn, mlp = block.attn, block.mlp
    hidden = mlp.fc1.out_features if type(mlp) in (TimmMlp, Mlp) else None
    return Widths(attn.head_dim, getattr(attn, "v_head_dim", attn.head_dim), hidden)


def _weights(module: nn.Module) -> int:
    """Weights of all linear layers within: the multiply-adds of one token."""
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _area(grid: tuple[int, int]) -> int:
    return grid[0] * grid[1]


def _behind(model: Any, counts: list[tuple[int, int]]) -> int:
    """Tokens behind the last block."""
    merge = merges_of(model)[-1]
    return counts[-1][0] if merge is None else model.num_prefix_tokens + _area(merge.merged_grid)


def _embedding_macs(model: Any) -> int:
    embed = model.patch_embed
    if not isinstance(embed, (PatchEmbed, ConvStem)):
        raise TypeError(f"macs knows timm's PatchEmbed and LV-ViT's, but got {type(embed).__name__}")
    total, size = 0, list(embed.img_size)
    for conv in (m for m in embed.modules() if isinstance(m, nn.Conv2d)):
        for i, (kernel, stride, padding) in enumerate(
            zip(conv.kernel_size, conv.stride, cast(tuple[int, ...], conv.padding))
        ):
            size[i] = (size[i] + 2 * padding - kernel) // stride + 1
        total += size[0] * size[1] * conv.weight.numel()
    return total


def _option(op: str, name: str, value: Any, allowed: tuple[str, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{op}: {name}={value!r}, but it must be one of {', '.join(map(repr, allowed))}")
