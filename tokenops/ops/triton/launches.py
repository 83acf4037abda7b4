"""Launch configurations that a sweep on a GPU found faster than the launchers' own.

launches.json holds them, one a line, as benchmarks/gpu/sweep.py makes it. A name says where an entry counts:
"sm_90 soft_aggregate_fwd bfloat16 many N256 M128 C512 mask" is this kernel on compute capability 9.0, for bf16 tokens,
MANY images or more (few: up to FEW), sizes up to these powers of two (and over half of them), and with a mask. What it
may change is how work is cut and scheduled, never what is computed. Interpreted kernels have no table.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
import triton

from .common import INTERPRETED
from .launch import forget

TABLE = Path(__file__).with_suffix(".json")
FEW, MANY = 4, 64  # images that do not fill a large GPU, and that fill it several times: between them nothing is known
DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float16, torch.bfloat16, torch.float32)}


class Kernel(NamedTuple):
    """The sizes its entries are named by, the tiles they may set, and the optional arguments that they tell apart."""

    sizes: tuple[str, ...]
    tiles: tuple[str, ...]
    optional: tuple[str, ...] = ()


_AGGREGATE = Kernel(("N", "M", "C"), ("BLOCK_N", "BLOCK_M", "BLOCK_C"), ("mask",))
_MLP = Kernel(("M", "R", "C"), ("BLOCK_M", "BLOCK_R", "BLOCK_C"))
# a tile holds all channels of a head
_ATTENTION = Kernel(("M", "N", "DK", "DV"), ("BLOCK_M", "BLOCK_N"), ("qk_mask", "v_mask", "bias", "lengths"))
_GRADIENT = _ATTENTION._replace(optional=(*_ATTENTION.optional, "received"))

KERNELS = {
    "soft_aggregate_fwd": _AGGREGATE,
    "soft_aggregate_bwd": _AGGREGATE._replace(tiles=(*_AGGREGATE.tiles, "BLOCK_T", "BLOCK_S")),
    "token_mlp_fwd": _MLP,
    "token_mlp_bwd": _MLP,
    "masked_channel_attention_fwd": _ATTENTION,
    "masked_channel_attention_received": _ATTENTION,
    "masked_channel_attention_bwd_q": _GRADIENT,
    "masked_channel_attention_bwd_kv": _GRADIENT,
}

Config = dict[str, Any]
#: a kernel's entries by what `_key` says of a call; None is the key of one that counts for every call
Entries = dict[str, dict[tuple | None, Config]]


def overlaid(
    kernel: str, dtype: torch.dtype, images: int, sizes: tuple[int, ...], default: Config, given: tuple[bool, ...] = ()
) -> Config:
    """A launcher's configuration with what the table says of such a call.

    Args:
        kernel: of KERNELS.
        dtype: the tokens'.
        images: B.
        sizes: those of KERNELS.
        default: the launcher's own configuration.
        given: which of the optional arguments of KERNELS there are.
    """
    if kernel not in _entries:
        return default
    device = None if INTERPRETED else triton.runtime.driver.active.get_current_device()
    config = _found(kernel, device, dtype, images, sizes, given)
    return default if config is None else {**default, **config}


@lru_cache(1024)
def _found(
    kernel: str, device: int | None, dtype: torch.dtype, images: int, sizes: tuple[int, ...], given: tuple[bool, ...]
) -> Config | None:
    """What the table says of a call on the current device; kept, because a call at B=1 takes as long as its launch."""
    gpu = None if device is None else triton.runtime.driver.active.get_current_target().arch
    entries = _entries[kernel]
    return entries.get(_key(gpu, dtype, images, sizes, given)) or entries.get(None)


@contextmanager
def using(entries: Mapping[str, Config]) -> Iterator[None]:
    """In the block these entries are the table, of all threads: not to be entered or left while an operator runs.

    A name may be a kernel's alone: that entry counts for every call of it, interpreted ones too.
    """
    before = _entries
    _use(parsed(entries))
    try:
        yield
    finally:
        _use(before)


def _use(entries: Entries) -> None:
    global _entries
    _entries = entries
    _found.cache_clear()
    forget()


def name(
    gpu: int, kernel: str, dtype: torch.dtype, images: int, sizes: tuple[int, ...], given: tuple[str, ...] = ()
) -> str:
    """Of the entry for such calls on a GPU, 90 for compute capability 9.0; optional arguments by their names."""
    if FEW < images < MANY:
        raise ValueError(f"{images} images are neither few nor many")
    buckets = [f"{size}{1 << _bucket(value)}" for size, value in zip(KERNELS[kernel].sizes, sizes, strict=True)]
    return " ".join((f"sm_{gpu}", kernel, str(dtype)[6:], "few" if images <= FEW else "many", *buckets, *given))


def parsed(entries: Mapping[str, Config], source: str = "launches") -> Entries:
    """The entries by kernel and key; a ValueError names the one that is wrong."""
    table: Entries = {}
    for text, config in entries.items():
        try:
            kernel, key = _parsed_name(text)
            table.setdefault(kernel, {})[key] = _checked(KERNELS[kernel], config)
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{source}: {text!r}: {error}") from None
    return table


def _parsed_name(text: str) -> tuple[str, tuple | None]:
    if text in KERNELS:
        return text, None
    gpu, kernel, dtype, images, *words = text.split()
    if kernel not in KERNELS:
        raise ValueError(f"the kernels are {', '.join(KERNELS)}")
    if not gpu.startswith("sm_"):
        raise ValueError(f"a GPU is sm_90, not {gpu}")
    if images not in ("few", "many"):
        raise ValueError(f"images are few or many, not {images}")
    if dtype not in DTYPES:
        raise ValueError(f"dtypes are {', '.join(DTYPES)}, not {dtype}")
    known = KERNELS[kernel]
    sizes = tuple(int(word.removeprefix(size)) for size, word in zip(known.sizes, words))
    given = tuple(words[len(sizes) :])
    number, count = int(gpu.removeprefix("sm_")), FEW if images == "few" else MANY
    if text != name(number, kernel, DTYPES[dtype], count, sizes, given):
        raise ValueError(f"a name of {kernel} ends with {', '.join(known.sizes)}, each with a power of two")
    if [word for word in known.optional if word in given] != list(given):
        raise ValueError(f"optional arguments of {kernel} are, in this order: {', '.join(known.optional) or 'none'}")
    return kernel, _key(number, DTYPES[dtype], count, sizes, tuple(word in given for word in known.optional))


def _checked(kernel: Kernel, config: Config) -> Config:
    """The configuration, if it sets what may be set, to what a launch can have."""
    allowed = {
        **dict.fromkeys(kernel.tiles, (16, 32, 64, 128, 256)),  # a dot needs 16
        "num_warps": (1, 2, 4, 8, 16),
        "num_stages": range(1, 8),
        "maxnreg": range(32, 256),
    }
    if not config:
        raise ValueError("it sets nothing")
    for setting, value in config.items():
        if setting not in allowed:
            raise ValueError(f"{setting} cannot be set, but {', '.join(allowed)}")
        if type(value) is not int or value not in allowed[setting]:
            raise ValueError(f"{setting} cannot be {value!r}")
    return dict(config)


def _bucket(size: int) -> int:
    """The exponent of the power of two that covers it."""
    return (max(size, 1) - 1).bit_length()


def _key(gpu: int | None, dtype: torch.dtype, images: int, sizes: tuple[int, ...], given: tuple[bool, ...]) -> tuple:
    return gpu, dtype, images <= FEW, images >= MANY, tuple(map(_bucket, sizes)), given


def _committed() -> Entries:
    return {} if INTERPRETED else parsed(json.loads(TABLE.read_text()), TABLE.name)


_entries = _committed()
