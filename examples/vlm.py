"""`python examples/vlm.py`: a small Qwen2.5-VL of random weights reads two photographs, with fewer and fewer tokens.

Makes a prompt as Qwen's processor does, keeps the image tokens that the tower's attention looks at, and prints how many
places the images have, how long the prompt is, and what its prefill costs: of the language model alone, and with the
tower that runs before it. What such a model says means nothing; its tokens and times are those of any weights. About a
minute on two CPU cores; needs the packages transformers and scikit-learn.
"""

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import transformers
from sklearn.datasets import load_sample_images
from torch import Tensor

from tokenops.cli import CommandError, columns, paragraph
from tokenops.cli.models import at_least, check_seed
from tokenops.cli.running import Running, backends, quartiles, running
from tokenops.measuring.timing import Spread, clock, interleaved, ratio, recorded_kernels
from tokenops.vlm import compress, placeholder_counts

IMAGE, VIDEO, START, END = range(4)  # words that are no words
WORDS = 256  # of the vocabulary
QUESTION = 24  # words behind the images
SCALES = (1.0, 0.5)  # pixels of the photographs, as a part of --tokens: they are of unequal size


def parser() -> argparse.ArgumentParser:
    found = argparse.ArgumentParser(prog="vlm.py", description=" ".join((__doc__ or "").split("\n\n")[1].split()))
    add = found.add_argument
    add("--keep", type=float, nargs="+", default=[0.5, 0.25], metavar="PART", help="image tokens (default: 0.5 0.25)")
    add("--tokens", type=int, default=400, metavar="N", help="about so many of the larger image (default: %(default)s)")
    add("--rounds", type=int, default=9, metavar="N", help="of timing (default: %(default)s)")
    add("--seed", type=int, default=0, metavar="N", help="of weights and words (default: %(default)s)")
    add("--device", choices=("cpu", "cuda"), help="default: cuda where there is a GPU, else cpu")
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """The exit code: 2 when what was asked for cannot be done."""
    try:
        run(parser().parse_args(arguments))
    except CommandError as error:
        print(f"vlm.py: {error}", file=sys.stderr)
        return 2
    return 0


@torch.inference_mode()
def run(args: argparse.Namespace) -> None:
    """Makes, reduces, measures, prints. Raises CommandError for what cannot be done."""
    how = checked(args)
    torch.manual_seed(args.seed)
    model = how.placed(small_model().eval())
    inputs = prompt(args.tokens, how.device)
    with recorded_kernels() as kernels:
        reduced = {rate: compress(model, inputs, rate) for rate in (1.0, *args.keep)}
    counts = {rate: placeholder_counts(inputs["image_grid_thw"], rate) for rate in reduced}
    for rate, short in reduced.items():  # what was told before the tower ran is what there is
        assert int((short["input_ids"] == IMAGE).sum()) == sum(counts[rate])

    words = timed({rate: lambda short=short: prefill(model, short) for rate, short in reduced.items()}, args, how)
    calls = {rate: lambda rate=rate: prefill(model, compress(model, inputs, rate)) for rate in args.keep}
    whole = timed({1.0: lambda: prefill(model, inputs), **calls}, args, how)

    lines = [
        ("", lambda rate: "dense" if rate == 1 else f"keep {rate:g}"),
        ("image tokens", lambda rate: " + ".join(map(str, counts[rate]))),
        ("tokens of the prompt", lambda rate: f"{reduced[rate]['input_ids'].shape[1]}"),
        ("prefill, ms", lambda rate: milliseconds(words[rate])),
        ("speed-up", lambda rate: quartiles(ratio(words[1.0], words[rate]), 2)),
        ("with the tower, ms", lambda rate: milliseconds(whole[rate])),
        ("speed-up", lambda rate: quartiles(ratio(whole[1.0], whole[rate]), 2)),
    ]
    shapes = " and ".join(f"{rows} x {columns}" for _, rows, columns in inputs["image_grid_thw"].tolist())
    print(paragraph(f"Two photographs of {shapes} patches, and {QUESTION} words"))
    print(f"{paragraph(how.where())}\n")
    print(columns([(name, *(shown(rate) for rate in reduced)) for name, shown in lines]))
    print(f"\nMedians of {args.rounds} interleaved rounds, quartiles in brackets.")
    print(paragraph(f"Backends of the choice: {backends(kernels)}"))


def checked(args: argparse.Namespace) -> Running:
    """Where it runs; the options are in range."""
    at_least(16, tokens=args.tokens)
    at_least(1, rounds=args.rounds)
    check_seed(args.seed)
    for part in args.keep:
        if not 0 < part < 1:
            raise CommandError(f"--keep={part}, but it must be above 0 and below 1")
    return running(argparse.Namespace(device=args.device, amp=False, channels_last=False))


def small_model() -> Any:
    """Qwen2.5-VL with heads as wide as the published ones (80 and 128), but few, in few blocks.

    Its multiply-adds are shared between tower and language model about as those of the one with 7 billion weights.
    """
    vision = dict(
        depth=2, hidden_size=320, num_heads=4, intermediate_size=640, out_hidden_size=512, fullatt_block_indexes=[1]
    )
    words = dict(
        vocab_size=WORDS,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=12,
        num_attention_heads=4,
        num_key_value_heads=1,
        bos_token_id=None,
        eos_token_id=None,
        rope_parameters=dict(rope_type="default", rope_theta=1e6, mrope_section=[16, 24, 24]),
    )
    config = transformers.Qwen2_5_VLConfig(
        vision_config=vision,
        text_config=words,
        image_token_id=IMAGE,
        video_token_id=VIDEO,
        vision_start_token_id=START,
        vision_end_token_id=END,
    )
    return transformers.Qwen2_5_VLForConditionalGeneration(config)


def prompt(tokens: int, device: torch.device) -> dict[str, Tensor]:
    """Two photographs and some words behind them, as a processor would put them together."""
    grids, patches = [], []
    for photograph, scale in zip(load_sample_images().images, SCALES):
        pixels = round(scale * tokens) * 28 * 28
        made = transformers.Qwen2VLImageProcessor(min_pixels=pixels, max_pixels=round(1.2 * pixels))
        found = made(images=[photograph.copy()], return_tensors="pt")
        grids.append(found["image_grid_thw"])
        patches.append(found["pixel_values"])
    grid = torch.cat(grids)
    ids = []
    for count in placeholder_counts(grid, 1):
        ids += [START, *[IMAGE] * count, END]
    ids += torch.randint(END + 1, WORDS, (QUESTION,)).tolist()
    row = torch.tensor([ids], device=device)
    return dict(
        input_ids=row,
        attention_mask=torch.ones_like(row),
        mm_token_type_ids=(row == IMAGE).long(),
        pixel_values=torch.cat(patches).to(device),
        image_grid_thw=grid.to(device),
    )


def prefill(model: Any, inputs: Mapping[str, Any]) -> Tensor:
    """The logits of the first word of an answer."""
    return model(**inputs, logits_to_keep=1).logits


def timed(calls: Mapping[float, Callable[[], Any]], args: argparse.Namespace, how: Running) -> dict[float, list[float]]:
    """Seconds of each call in interleaved rounds."""
    sides = {str(rate): call for rate, call in calls.items()}
    for call in sides.values():
        call()
    found = interleaved(sides, args.rounds, clock(how.device.type))
    return {float(rate): times for rate, times in found.items()}


def milliseconds(seconds: Sequence[float]) -> str:
    return quartiles(Spread.of([1e3 * one for one in seconds]))


if __name__ == "__main__":
    sys.exit(main())
