"""torch's FLOP counter knows every operator, and what it says of a model does not depend on what was counted before."""

import subprocess
import sys

import pytest
import torch
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode, flop_registry

import tokenops
from tokenops.ops.schemas import KERNELS

timm = pytest.importorskip("timm")


ORDERS = ("tokenops", "torch.utils.flop_counter"), ("torch.utils.flop_counter", "tokenops")


def counted(function, *arguments):
    with FlopCounterMode(display=False) as counter:
        function(*arguments)
    return counter.get_total_flops()


def dense(**options):
    return timm.create_model("deit_tiny_patch16_224", img_size=64, depth=2, num_classes=10, **options).eval()


def by_hand(tokens, width, depth, patches, classes):
    """Two FLOPs a multiply-add: the patches, and of each block qkv, both products of attention, projection and MLP."""
    block = tokens * width * (3 + 1 + 8) * width + 2 * tokens * tokens * width
    return 2 * (patches * 3 * 16 * 16 * width + depth * block + width * classes)


@pytest.mark.parametrize("first, second", ORDERS)
def test_whichever_is_imported_first(first, second):
    code = f"import {first}, {second}; from torch.utils.flop_counter import flop_registry as known"
    code += "; print(sum(str(op).startswith('tokenops.') for op in known))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == str(len({name for name, _ in KERNELS})), done.stderr


def test_every_operator_is_known():
    assert {name for name, _ in KERNELS} <= {str(op).removeprefix("tokenops.") for op in flop_registry}


@torch.no_grad()
def test_a_dense_model_counts_the_same_before_and_after_a_patch():
    model, image = dense(), torch.randn(1, 3, 64, 64)
    right = by_hand(tokens=17, width=192, depth=2, patches=16, classes=10)
    assert counted(model, image) == right
    patched = dense()
    tokenops.apply_patch(patched, "tome", r=4)
    slim = counted(patched, image)
    assert counted(model, image) == right and slim < right
    tokenops.remove_patch(patched)
    assert counted(patched, image) == right


def test_training_counts_three_times_the_products():
    """Of each product of the forward pass there are two in the backward pass, in attention two and a half."""
    q, k, v = torch.randn(3, 1, 2, 8, 16, requires_grad=True).unbind(0)
    product = 2 * 2 * 8 * 8 * 16

    def step(attention):
        attention(q, k, v).sum().backward()

    assert counted(step, torch.nn.functional.scaled_dot_product_attention) == (2 + 5) * product
    assert counted(step, tokenops.masked_channel_attention) == (2 + 5) * product


@pytest.mark.parametrize(
    "call, products",
    (
        (lambda x, w: tokenops.soft_aggregate(x, w), 1),
        (lambda x, w: tokenops.select_tokens(x, w[..., 0], 3, prefix=0), 0),
        (lambda x, w: tokenops.merge_neighbours(x, (2, 4), "vertical", prefix=0), 0),
        (lambda x, w: tokenops.restore_tokens(x, x[:, :3], torch.tensor([[0, 1, 2]] * 2), prefix=0), 0),
    ),
)
def test_operators_count_their_products(call, products):
    x, w = torch.randn(2, 8, 6), torch.randn(2, 8, 5)
    assert counted(call, x, w) == products * 2 * 2 * 8 * 5 * 6


def test_sequences_count_their_own_pairs():
    q = torch.randn(10, 2, 8, requires_grad=True)
    cu = torch.tensor([0, 3, 3, 9], dtype=torch.int32)
    run = lambda: tokenops.masked_channel_attention(q, q, q, cu_seqlens=cu, max_seqlen=6)  # noqa: E731
    pairs = 3 * 3 + 6 * 6
    assert counted(run) == 2 * 2 * pairs * 2 * 8
    assert counted(lambda: run().sum().backward()) == 2 * 2 * pairs * (2 + 5) * 8
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        fake, bounds = mode.from_tensor(q.detach()), mode.from_tensor(cu)
        options = dict(cu_seqlens=bounds, max_seqlen=6)
        at_most = counted(lambda: tokenops.masked_channel_attention(fake, fake, fake, **options))
        assert at_most == 2 * 2 * 10 * 6 * 2 * 8
