"""tokenops.visualize: exact pixels of hand-made traces, what real patches give, and errors in words."""

import numpy as np
import pytest
import torch

pytest.importorskip("PIL")
from PIL import Image

import tokenops
from support.patched_models import METHODS, images, patched
from tokenops.patching import Step, Trace
from tokenops.patching.visualize import BORDER, CAPTION, COLUMNS, GAP, SHADE, TINT, hatched, palette

CELL = 10
GRID = (2, 3)
HEIGHT, WIDTH = 20, 30
COLOURS = np.array([[(200, 0, 0), (0, 200, 0), (0, 0, 200)], [(100, 100, 100), (0, 40, 80), (255, 255, 255)]])


@pytest.fixture
def image():
    """Every patch in a colour of its own."""
    return COLOURS.astype(np.uint8).repeat(CELL, axis=0).repeat(CELL, axis=1)


def trace(*rows, grid=GRID, block=4, tokens=5):
    return Trace("tome", grid, [Step(block + i, tokens, torch.tensor([row])) for i, row in enumerate(rows)])


def weighted(weights, grid=GRID):
    return Trace("sit", grid, [Step(0, 1 + len(weights), None, torch.tensor([weights]))])


def panel(sheet, i, height=HEIGHT, width=WIDTH, columns=COLUMNS):
    x, y = GAP + i % columns * (width + GAP), GAP + i // columns * (height + CAPTION + GAP)
    return np.asarray(sheet)[y : y + height, x : x + width]


def inner(pixels, row, column):
    """A patch without the pixels that may be its border."""
    top, left = row * CELL, column * CELL
    return pixels[top + 1 : top + CELL, left + 1 : left + CELL]


def test_tokens_have_the_mean_colour_of_all_their_patches(image):
    sheet = tokenops.visualize(image, trace([0, 1, 0, 0, 1, 2]))
    drawn = panel(sheet, 1)
    for row, column, colour in [
        (0, 0, (100, 33, 100)),  # of red, blue and grey, wherever they are
        (0, 2, (100, 33, 100)),
        (1, 0, (100, 33, 100)),
        (0, 1, (0, 120, 40)),
        (1, 1, (0, 120, 40)),
        (1, 2, (255, 255, 255)),
    ]:
        assert (inner(drawn, row, column) == colour).all(), (row, column)
    np.testing.assert_array_equal(panel(sheet, 0), image)


def test_a_thin_line_lies_between_tokens_and_nowhere_else(image):
    white = np.full_like(image, 255)
    drawn = panel(tokenops.visualize(white, trace([0, 0, 1, 2, 2, 1])), 1)
    line = np.zeros((HEIGHT, WIDTH), dtype=bool)
    line[:, 2 * CELL] = True  # left of token 1
    line[CELL, : 2 * CELL] = True  # above token 2
    np.testing.assert_array_equal(drawn, np.where(line, round(255 * BORDER), 255)[..., None].repeat(3, axis=2))


def test_where_nothing_merged_the_patches_stay_and_the_dropped_are_grey(image):
    image[3, 4] = (1, 2, 3)  # a detail of a patch that stays
    drawn = panel(tokenops.visualize(image, trace([0, -1, 1, 2, -1, 3])), 1)
    stays = np.ones((HEIGHT, WIDTH), dtype=bool)
    stays[:, CELL : 2 * CELL] = False
    np.testing.assert_array_equal(drawn[stays], image[stays])
    grey = np.rint(255 * hatched(image / 255)).astype(np.uint8)
    np.testing.assert_array_equal(drawn[~stays], grey[~stays])


def test_dropped_patches_have_no_part_in_the_colours_of_merged_ones(image):
    drawn = panel(tokenops.visualize(image, trace([0, 0, -1, -1, -1, -1])), 1)
    assert (inner(drawn, 0, 0) == (100, 100, 0)).all() and (inner(drawn, 0, 1) == (100, 100, 0)).all()


def test_all_dropped_is_a_pale_hatched_picture(image):
    drawn = panel(tokenops.visualize(image, trace([-1] * 6, tokens=1)), 1).astype(int)
    assert (np.ptp(drawn, axis=2) == 0).all() and drawn.min() > 140, "grey, and bright whatever is below"
    lines = (np.indices((HEIGHT, WIDTH)).sum(axis=0)) % 6 == 0
    first = np.zeros_like(lines)
    first[:CELL, :CELL] = True
    on, off = (drawn[..., 0][first & where] for where in (lines, ~lines))
    assert len(set(on)) == len(set(off)) == 1 and on[0] < off[0] - 10
    assert drawn[1, 1, 0] < drawn[HEIGHT - 2, WIDTH - 2, 0], "a little of the image is left"


def test_soft_tokens_colour_what_they_draw_on_most_by_how_much():
    black = np.zeros((HEIGHT, WIDTH, 3), dtype=np.uint8)
    weights = [[0.4, 0.1, 0.1, 0.4, 0.0, 0.0], [0.0, 0.2, 0.2, 0.0, 0.2, 0.4]]
    drawn = panel(tokenops.visualize(black, weighted(weights)), 1)
    colours = 255 * TINT * SHADE * palette(2)
    for row, column, token, strength in [(0, 0, 0, 1), (1, 0, 0, 1), (0, 1, 1, 0.5), (1, 1, 1, 0.5), (1, 2, 1, 1)]:
        assert (inner(drawn, row, column) == np.rint(strength * colours[token])).all(), (row, column)
    # a line between the two tokens, none between patches of one
    np.testing.assert_array_equal(drawn[:, CELL], np.rint(BORDER * 0.5 * colours[1])[None].repeat(HEIGHT, axis=0))
    np.testing.assert_array_equal(drawn[1:CELL, 2 * CELL], drawn[1:CELL, 2 * CELL + 1])


def test_soft_tokens_leave_alone_what_none_draws_on(image):
    drawn = panel(tokenops.visualize(image, weighted([[0.0, 0.0, 1.0, 0.0, 0.0, 0.0]])), 1)
    np.testing.assert_array_equal(drawn[:, : 2 * CELL], image[:, : 2 * CELL])
    assert (drawn[:CELL, 2 * CELL :] != image[:CELL, 2 * CELL :]).any(axis=2).all()


def test_weights_in_half_precision_and_zeros(image):
    for weights in (torch.ones(1, 2, 6, dtype=torch.bfloat16) / 6, torch.zeros(1, 2, 6)):
        sheet = tokenops.visualize(image, Trace("sit", GRID, [Step(0, 3, None, weights)]))
        changed = (panel(sheet, 1) != image).any()
        assert changed == bool(weights.any())


def test_colours_of_many_tokens_differ():
    colours = np.rint(255 * palette(98))
    assert len(np.unique(colours, axis=0)) == 98 and colours.min() >= 0 and colours.max() <= 255
    assert np.abs(np.diff(colours, axis=0)).max(axis=1).min() > 60, "neighbours can be told apart"


@pytest.mark.parametrize(
    ("steps", "columns", "rows"), [(0, 1, 1), (1, 2, 1), (6, 7, 1), (7, 4, 2), (12, 7, 2), (24, 7, 4)]
)
def test_panels_stand_in_rows(image, steps, columns, rows):
    sheet = tokenops.visualize(image, trace(*[[0, 0, 1, 1, 2, 2]] * steps))
    assert sheet.mode == "RGB"
    assert sheet.size == (GAP + columns * (WIDTH + GAP), GAP + rows * (HEIGHT + CAPTION + GAP))
    for i in range(1, 1 + steps):
        assert (inner(panel(sheet, i, columns=columns), 0, 0) == (100, 100, 0)).all(), f"panel {i} is not in its place"


def test_captions_say_block_and_tokens(image, monkeypatch):
    from PIL import ImageDraw

    said = []
    monkeypatch.setattr(
        ImageDraw.ImageDraw, "text", lambda self, place, text, **kwargs: said.append((text, place, kwargs["anchor"]))
    )
    tokenops.visualize(
        image, Trace("evit", GRID, [Step(3, 5, torch.arange(6)[None]), Step(7, 1, -torch.ones(1, 6).long())])
    )
    assert [text for text, _, _ in said] == ["image", "block 3: 5 tokens", "block 7: 1 token"]
    assert said[1][1:] == ((GAP + WIDTH + GAP + WIDTH / 2, GAP + HEIGHT + CAPTION / 2), "mm")
    monkeypatch.undo()
    below = np.asarray(tokenops.visualize(image, trace([0] * 6)))[GAP + HEIGHT : -1]
    assert below.min() < 100, "there are letters"


@pytest.mark.parametrize(
    ("size", "grid", "cell"),
    [((30, 20), (2, 3), 10), ((31, 29), (2, 3), 14), ((640, 427), (14, 14), 24), ((16, 16), (4, 4), 8)],
)
def test_the_image_is_resized_to_a_multiple_of_the_grid(size, grid, cell):
    photograph = Image.new("L", size, 128)
    sheet = tokenops.visualize(photograph, trace([0] * (grid[0] * grid[1]), grid=grid))
    height, width = grid[0] * cell, grid[1] * cell
    assert sheet.size == (GAP + 2 * (width + GAP), GAP + height + CAPTION + GAP)
    for i in (0, 1):
        assert (panel(sheet, i, height, width) == 128).all()


def test_which_picks_the_image_of_a_batch(image):
    sources = torch.tensor([[0, 0, 0, 0, 0, 0], [0, 0, 1, 2, 3, 4]])
    batch = Trace("tome", GRID, [Step(0, 2, sources)])
    alone = Trace("tome", GRID, [Step(0, 2, sources[1:])])
    second = np.asarray(tokenops.visualize(image, batch, which=1))
    np.testing.assert_array_equal(second, np.asarray(tokenops.visualize(image, alone)))
    assert (second != np.asarray(tokenops.visualize(image, batch))).any()


SOURCES = torch.zeros(2, 6, dtype=torch.int64)


@pytest.mark.parametrize(
    ("given", "steps", "which", "error", "words"),
    [
        ("photo.png", [], 0, TypeError, "must be a PIL image or a numpy array, but is str"),
        (torch.zeros(3, 20, 30), [], 0, TypeError, "but is Tensor"),
        (np.zeros((20, 30, 3)), [], 0, ValueError, r"must be \(H, W, 3\) uint8, but is \(20, 30, 3\) float64"),
        (np.zeros((20, 30), np.uint8), [], 0, ValueError, r"but is \(20, 30\) uint8"),
        (None, [], -1, ValueError, "which=-1, but it must be at least 0"),
        (None, [Step(0, 2, SOURCES)], 2, ValueError, "which=2, but the trace is of 2 images: 0 to 1"),
        (None, [Step(0, 2, SOURCES)], -1, ValueError, "which=-1"),
        (None, [Step(5, 2, SOURCES[:, :5])], 0, ValueError, r"block 5 must be \(B, N\) with N=6, but is \(2, 5\)"),
        (None, [Step(5, 2, SOURCES[0])], 0, ValueError, r"must be \(B, N\) with N=6, but is \(6,\)"),
        (None, [Step(5, 2, None, SOURCES)], 0, ValueError, r"must be \(B, M, N\) with N=6, but is \(2, 6\)"),
        (
            None,
            [Step(5, 2, SOURCES.float())],
            0,
            ValueError,
            "sources of block 5 must be integers, but are torch.float32",
        ),
        (None, [Step(5, 2, None, None)], 0, ValueError, "block 5 must have sources or weights, but has 0"),
        (None, [Step(5, 2, SOURCES, torch.ones(2, 1, 6))], 0, ValueError, "must have sources or weights, but has 2"),
    ],
)
def test_errors_in_words(image, given, steps, which, error, words):
    with pytest.raises(error, match=words):
        tokenops.visualize(image if given is None else given, Trace("tome", GRID, steps), which)


@pytest.mark.parametrize("method", METHODS)
def test_traces_of_patched_models_can_be_drawn(method):
    model = patched(method)
    found = tokenops.trace(model, images())
    picture = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    sheet = tokenops.visualize(picture, found, which=1)
    assert found.steps and sheet.size[0] == GAP + (1 + len(found.steps)) * (64 + GAP)
    drawn = panel(sheet, len(found.steps), 64, 64)
    assert (drawn != panel(sheet, 0, 64, 64)).any()
    if method in ("tome", "cait"):  # as many colours as tokens, besides the lines
        insides = drawn.reshape(4, 16, 4, 16, 3)[:, 1:, :, 1:].transpose(0, 2, 1, 3, 4).reshape(16, -1, 3)
        assert (insides == insides[:, :1]).all()
        assert len(np.unique(insides[:, 0], axis=0)) == found.steps[-1].tokens - 1
