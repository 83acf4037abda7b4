"""Launches that are kept: they are the ones that Triton would make, seldom need a new kernel, and can be made ahead."""

import json

import pytest
import torch
from torch import nn

import tokenops
from support.process import python

pytest.importorskip("triton")

import triton.language as tl

from tokenops.ops.triton import launch, launches
from tokenops.ops.triton.common import dot_options


def found(check):
    """What support/launched.py finds, in a process that does not interpret."""
    pytest.importorskip("timm") if check == "ahead" else None
    return json.loads(python("-m", "support.launched", check))


def test_kept_launches_are_tritons_own():
    """Kernel, grid and arguments, for any sizes, strides, dtypes and addresses."""
    direct = found("of_random_calls")
    assert len(direct) == 10 and all(direct.values())


@pytest.mark.slow
def test_launches_of_real_models_are_tritons_own():
    direct = found("of_cases")
    assert len(direct) > 10 and all(direct.values())


def test_other_lengths_compile_nothing_again():
    counts = found("of_lengths")
    of_tails = {name for name in counts if name.startswith("masked_channel_attention")}  # 16, 32 or 64 keys behind
    assert {counts[name] for name in of_tails} == {3} and len(of_tails) == 3
    assert counts.pop("select_tokens_fwd_kernel") == 2  # whose block holds all scores: 128 or 256
    assert {counts[name] for name in {*counts} - of_tails} == {1}


def test_what_looks_at_tritons_launches_sees_them():
    seen = found("hooks_and_tools")
    assert seen["direct"] == [True] and seen["hooks"] == [False, False]
    assert seen["hooked"] == [True, True, True] and seen["metadata"] == "gather_rows_kernel"
    assert seen["replaced"] == [0, 1]
    assert seen["debug"] == seen["elsewhere"] == [False]
    assert seen["without memory"] == 0


# Plans are kept for what they depend on, and no longer.


def asked():
    """A plan of one tensor and one option, and how often it was made."""
    made = []

    @launch.planned
    def plan(x, option):
        made.append((x, option))
        return dot_options(x.dtype)["PRECISION"], x.shape, x.stride(), x.dtype, option

    return plan, made


def test_a_plan_is_made_once_a_layout():
    plan, made = asked()
    x = torch.zeros(4, 6)
    for tensor in (x, torch.ones(4, 6), x, x.half(), x[:2], x.t(), x[:, ::2], x.t().contiguous()):
        assert plan(tensor, "a")[1:4] == (tensor.shape, tensor.stride(), tensor.dtype)
    assert len(made) == 6 and plan(x, "b")[4] == "b" and plan(x, "a")[4] == "a" and len(made) == 7


def test_a_triton_plan_follows_the_precision_and_the_table():
    plan, made = asked()
    x, before = torch.zeros(2, 2), torch.backends.cuda.matmul.fp32_precision
    try:
        for precision, expected in (("ieee", "tf32x3"), ("tf32", "tf32"), ("ieee", "tf32x3")):
            torch.backends.cuda.matmul.fp32_precision = precision
            assert plan(x, None)[0] == expected
    finally:
        torch.backends.cuda.matmul.fp32_precision = before
    count = len(made)
    with launches.using({}):
        plan(x, None)
    plan(x, None)
    assert len(made) == count + 2


def test_a_launch_without_programs_is_none():
    launch.launch(None, launch.Launch(0, (1,), {"ACC": tl.float32}), (torch.zeros(0),))


# warm_up.


def test_warm_up_foresees_what_a_model_launches_on_triton():
    seen = found("ahead")
    assert seen["ready"] == seen["launched"] > 5 and seen["later"] == 0
    assert seen["unforeseen"] is None and seen["random"]


class Halting(nn.Module):
    """Its path depends on data, and it changes with every call."""

    def __init__(self):
        super().__init__()
        self.norm, self.dropout = nn.BatchNorm1d(4), nn.Dropout()

    def forward(self, x):
        return self.dropout(self.norm(x)) if x.sum().item() > 0 else x


def test_warm_up_leaves_a_model_as_it_was():
    model, x = Halting(), torch.rand(8, 4)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    random = torch.random.get_rng_state()
    warm = tokenops.warm_up(model, x)
    assert warm.kernels == 0 and warm.seconds > 0 and "scalar" in warm.unforeseen
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert torch.equal(random, torch.random.get_rng_state())
    assert all(p.grad is None for p in model.parameters()) and model.training


def test_warm_up_runs_a_model_once_and_its_backward_where_asked():
    for training, backward, expected in ((False, None, 0), (True, None, 1), (False, True, 1), (True, False, 0)):
        calls, backwards = [], []

        class Seen(nn.Linear):
            def forward(self, x):
                y = super().forward(x)
                if type(y) is torch.Tensor:
                    calls.append(1)
                    if y.requires_grad:
                        y.register_hook(lambda _: backwards.append(1))
                return {"y": [y, None, 3]}

        assert tokenops.warm_up(Seen(3, 2).train(training), torch.ones(1, 3), backward=backward).unforeseen is None
        assert (len(calls), len(backwards)) == (1, expected)


def test_what_a_model_raises_is_raised():
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        tokenops.warm_up(nn.Linear(3, 2), torch.ones(1, 4))


@pytest.mark.parametrize(
    "arguments, error, words",
    (
        ((3,), TypeError, "model must be callable, but got int"),
        ((abs, torch.ones(1), dict(backward=1)), TypeError, "backward must be a bool or None, but got 1"),
        ((abs, torch.ones(1), dict(workers=True)), TypeError, "workers must be an int or None, but got True"),
        ((abs, torch.ones(1), dict(workers=0)), ValueError, "workers=0, but it must be at least 1"),
    ),
)
def test_warm_up_says_what_is_wrong(arguments, error, words):
    *given, options = arguments if isinstance(arguments[-1], dict) else (*arguments, {})
    with pytest.raises(error, match=words):
        tokenops.warm_up(*given, **options)
