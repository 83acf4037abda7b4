"""Fewer image tokens for an unmodified language model: those that its tower looks at."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import checks
from ..ops.packed import kept_counts
from ..ops.select_tokens import select_tokens
from ..patching.dressing import Patched
from ..patching.site import is_patched
from .prompts import placeholder_counts, shorten, text_positions
from .towers import Speaker, blocks_of, speaker_of

SCORES = ("received", "class")


def compress(
    model: Any,
    inputs: Mapping[str, Any],
    keep_rate: float | None = None,
    *,
    score: str | Tensor | Callable[[tuple[Tensor, ...]], Any] = "received",
    layer: int | None = None,
) -> dict[str, Any]:
    r"""Inputs with the image tokens that a language model's tower looks at, and prompts with places for these alone.

    The tower runs once, as it is. Of each image the :math:`\lceil \mathrm{rate} \cdot n \rceil` of its n tokens with
    the largest scores are kept, in their order, and keep the positions they have in the whole prompt:

    .. math:: s_j = \frac{1}{H N} \sum_{h,i} P^{(h)}_{ij} \quad (\text{"received"}), \qquad
        s_j = \frac{1}{H} \sum_h P^{(h)}_{0j} \quad (\text{"class"})

    of the attention :math:`P` of one block, which is worked out without the matrix. Where a token is made of several
    patches (Qwen's, InternVL's, Gemma 3's) it has the sum of theirs, or as many times less.

    ``model.generate(**compress(...))`` and ``model(**compress(...))`` do what the whole prompt does with the tokens
    that are left out masked as keys; so at ``keep_rate=1`` what the model does (but behind a prompt that ends in an
    image words follow its last kept token). Batches are padded on the left. Beams and ``num_return_sequences`` write
    into the features: compress again before the next call.

    Args:
        model: of transformers 5: LLaVA, PaliGemma, InternVL, Gemma 3, Qwen2-VL, Qwen2.5-VL or Qwen3-VL, not patched; or
            one of Qwen's behind `tokenops.apply_patch`: what its tower leaves is kept.
        inputs: what its processor gives, with images, without videos; ``labels`` are shortened too.
        keep_rate: above 0 and at most 1; `tokenops.kept_counts` says how many that is. Not given with a patched tower,
            whose method says it (`tokenops.patching.image_tokens_left`).
        score: "received"; "class", the class token's attention, of towers that have one (LLaVA's CLIP, InternVL's); one
            number for each image token, ``(T,)``, images one behind the other; or what gives these of the images'
            tokens, a tuple of ``(n, C)``.
        layer: the block whose attention is taken. None is the last whose output the model takes; of Qwen2.5-VL the last
            that sees whole images.

    Returns:
        A dict for ``generate`` and ``forward``: ``input_ids``, ``attention_mask``, ``position_ids``, token types and
        labels shortened, ``mm_encoder_outputs`` with the kept features, which gradients go through, and what else was
        in ``inputs``, without what the tower was given.

    Raises:
        TypeError: the model is none of these; an argument has the wrong type.
        ValueError: the model is patched, and none of Qwen's; there are no images, or videos; there are more or fewer
            places than image tokens; ``keep_rate``, ``score`` or ``layer`` is out of range.

    ``generate`` needs its cache with them (``use_cache``, as it is by default): without it transformers may take gaps
    in positions for the bounds of several sequences. Sliding windows (Gemma 3's) count the tokens that are left.

    Source: scores of class tokens as in VisionZip (Yang et al., CVPR 2025) and FasterVLM (Zhang et al., 2024), the mean
    over queries as VisionZip takes it of towers without one. Neither its merged tokens nor its windows' weights.
    """
    op = "compress"
    speaker, kind = speaker_of(model)
    if is_patched(speaker):
        _refuse_options(op, speaker, keep_rate, score, layer)
        given = _given(op, speaker, inputs)
        output, merge = speaker.get_image_features(**given, return_dict=True), speaker.visual.spatial_merge_size
        _check_places(op, speaker, inputs, sum(placeholder_counts(given["image_grid_thw"], 1, merge)))
        return {**_shortened(speaker, kind, inputs, given, output.kept), "mm_encoder_outputs": {"image": output}}
    if keep_rate is None:
        raise TypeError(f"{op}: keep_rate must be given where the tower is not patched")
    given = _given(op, speaker, inputs)
    kept_counts([], keep_rate)
    asked = _block(op, speaker, kind, given, score, layer)
    states = {} if asked is None else dict(output_hidden_states=[*kind.features(speaker, given), asked])
    output = speaker.get_image_features(**given, **states, return_dict=True)
    tokens = [image.flatten(0, -2) for image in output.pooler_output]
    lengths = [len(image) for image in tokens]
    _check_places(op, speaker, inputs, sum(lengths))
    if asked is None:
        scores = _own(op, score, tokens)
    else:
        with torch.no_grad():
            scores = kind.scores(speaker, output.hidden_states[asked], asked, str(score), given)
    counts = kept_counts(lengths, keep_rate)
    chosen, kept = _chosen(tokens, scores, counts)

    short = _shortened(speaker, kind, inputs, given, kept)
    features: dict[str, Any] = dict(pooler_output=_like(output.pooler_output, chosen, counts))
    if (deep := getattr(output, "deepstack_features", None)) is not None:
        features["deepstack_features"] = [
            _like(layer, torch.cat(list(layer)).index_select(0, kept), counts) for layer in deep
        ]
    return {**short, "mm_encoder_outputs": {"image": type(output)(**features)}}


def _refuse_options(op: str, speaker: Any, keep_rate: Any, score: Any, layer: Any) -> None:
    """ValueError where a patched model cannot be compressed, or not in a way of one's own."""
    if not hasattr(speaker, "visual"):
        raise ValueError(
            f"{op}: the tower is patched and reduces tokens by itself: fit the processor (tokenops.vlm.fit_processor),"
            " or remove the patch (tokenops.remove_patch)"
        )
    if not isinstance(speaker, Patched):
        raise ValueError(f"{op}: the tower alone is patched: remove_patch, and apply_patch to the whole model")
    if keep_rate is not None or layer is not None or not isinstance(score, str) or score != "received":
        raise ValueError(
            f"{op}: keep_rate, score and layer are not taken with a patched tower, which chooses tokens by itself"
        )


def _check_places(op: str, speaker: Any, inputs: Mapping[str, Any], tokens: int) -> None:
    places = int((inputs["input_ids"] == speaker.config.image_token_id).sum())
    if places != tokens:
        raise ValueError(f"{op}: input_ids has {places} places for image tokens, but the images have {tokens}")


def _shortened(
    speaker: Any, kind: Speaker, inputs: Mapping[str, Any], given: dict[str, Any], kept: Tensor
) -> dict[str, Any]:
    """The prompts with the kept places alone, and what else the language model is given."""
    words = {name: value for name, value in inputs.items() if name not in given}
    token_id = speaker.config.image_token_id
    pad = getattr(speaker.config.get_text_config(), "pad_token_id", None)
    pad = next(number for number in (pad, 0, 1) if isinstance(number, int) and number not in (token_id, -1))
    positions = _positions(speaker, kind, inputs)
    return shorten(words, kept, token_id=token_id, position_ids=positions, pad_token_id=pad)


def _given(op: str, speaker: Any, inputs: Any) -> dict[str, Any]:
    """What the tower is given, once `inputs` have all that is needed."""
    if not isinstance(inputs, Mapping):
        raise TypeError(f"{op}: inputs must be a mapping, as a processor gives it, but got {type(inputs).__name__}")
    if inputs.get("input_ids") is None:
        raise ValueError(f"{op}: inputs have no input_ids: give prompts with places for image tokens")
    if inputs.get("mm_encoder_outputs") is not None:
        raise ValueError(f"{op}: inputs have mm_encoder_outputs, so their tokens are made: give images")
    videos = getattr(speaker.config, "video_token_id", None)
    if inputs.get("pixel_values_videos") is not None or (
        videos is not None and bool((inputs["input_ids"] == videos).any())
    ):
        raise ValueError(f"{op}: inputs have videos, but only images can be reduced")
    if inputs.get("pixel_values") is None:
        raise ValueError(f"{op}: inputs have no pixel_values, so there are no image tokens to reduce")
    takes = inspect.signature(speaker.get_image_features).parameters
    return {name: value for name, value in inputs.items() if name in takes and value is not None}


def _block(op: str, speaker: Any, kind: Speaker, given: dict[str, Any], score: Any, layer: Any) -> int | None:
    """Which block's attention scores the tokens; None where they are scored by something else."""
    if isinstance(score, str):
        if score not in SCORES:
            raise ValueError(f"{op}: score={score!r}, but it must be one of {', '.join(map(repr, SCORES))}")
    elif not isinstance(score, Tensor) and not callable(score):
        raise TypeError(f"{op}: score must be a string, a tensor or a function, but got {type(score).__name__}")
    elif layer is not None:
        raise ValueError(f"{op}: layer={layer!r} is not taken with a score of one's own")
    else:
        return None
    if layer is None:
        return kind.block(speaker, given)
    depth = len(blocks_of(getattr(speaker, kind.tower)))
    if isinstance(layer, bool) or not isinstance(layer, int):
        raise TypeError(f"{op}: layer must be an int, but got {layer!r}")
    if not -depth <= layer < depth:
        raise ValueError(f"{op}: layer={layer}, but the tower has {depth} blocks: {-depth} to {depth - 1} is allowed")
    return layer % depth


def _own(op: str, score: Any, tokens: list[Tensor]) -> Tensor:
    """Scores that are given, or made of the images' tokens."""
    found = score if isinstance(score, Tensor) else score(tuple(tokens))
    if isinstance(found, Sequence) and all(isinstance(part, Tensor) for part in found):
        found = torch.cat([part.flatten() for part in found])
    (count,) = checks.tensor(op, "score", found, "T", like=tokens[0])
    if count != (total := sum(map(len, tokens))):
        raise ValueError(f"{op}: score has {count} numbers, but the images have {total} tokens")
    return found


def _chosen(tokens: list[Tensor], scores: Tensor, counts: list[int]) -> tuple[Tensor, Tensor]:
    """Of the images' tokens the best, one image behind the other, in their order; and which these are of all."""
    lengths = torch.tensor([0, *map(len, tokens)], dtype=torch.int32)
    found = select_tokens(
        torch.cat(tokens),
        scores,
        max(counts, default=0),
        prefix=0,
        order="index",
        counts=torch.tensor(counts, device=scores.device),
        cu_seqlens=lengths.cumsum(0, dtype=torch.int32).to(scores.device),
        max_seqlen=int(lengths.max()),
        capacity=sum(counts),
    )
    return found.tokens, found.index


def _like(whole: Any, rows: Tensor, counts: list[int]) -> Any:
    """Rows of all images as the model has them: one tensor, a list or a tuple."""
    if isinstance(whole, Tensor):
        return rows.unflatten(0, (len(counts), -1))
    return type(whole)(rows.split(counts))


def _positions(speaker: Any, kind: Speaker, inputs: Mapping[str, Any]) -> Tensor:
    """Those of the whole prompts."""
    ids, mask = inputs["input_ids"], inputs.get("attention_mask")
    if inputs.get("position_ids") is not None:
        return inputs["position_ids"]
    if mask is not None:
        checks.tensor("compress", "attention_mask", mask, "B,N", like=ids, floating=False)
    if not hasattr(speaker, "get_rope_index"):
        return text_positions(torch.ones_like(ids) if mask is None else mask) + kind.first
    types = inputs.get("mm_token_type_ids")
    types = (ids == speaker.config.image_token_id).int() if types is None else types
    return speaker.get_rope_index(
        ids, mm_token_type_ids=types, image_grid_thw=inputs["image_grid_thw"], attention_mask=mask
    )[0]
