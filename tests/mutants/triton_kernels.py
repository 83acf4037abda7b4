"""Mutants of the Triton kernels: what they are made of, see run.py."""

from mutants import of_file

MUTANTS = [
    *of_file(
        "tokenops/_triton/common.py",
        (
            "(c < C)[None, :], other=0.0).to(DOT)",
            "(c < C)[None, :], other=1.0).to(DOT)",
            "rows that are not there are ones",
            "test_as_good_as_plain and M5-N5 and float32",
        ),
        (
            "accumulator = tl.float64 if torch.float64 in dtypes else tl.float32",
            "accumulator = tl.float32",
            "float64 is summed in float32",
            "soft_aggregate and gradcheck",
        ),
        (
            "(bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000",
            "bits & -0x10000",
            "bfloat16 is cut off",
            "merge_neighbours and ties_are_rounded_to_even",
        ),
        (
            "(bits + 0x7FFF + ((bits >> 16) & 1)) & -0x10000",
            "(bits + 0x8000) & -0x10000",
            "ties of bfloat16 go up, not to even",
            "merge_neighbours and ties_are_rounded_to_even",
        ),
        ("axis=1) / C + eps)", "axis=1) / C)", "the norm has no eps", "merge_neighbours and norm"),
        (
            "tl.where((c < C)[None, :], wide - mean[:, None], 0.0)",
            "wide - mean[:, None]",
            "channels that are not there count in the variance",
            "merge_neighbours and norm",
        ),
    ),
    *of_file(
        "tokenops/_triton/match_bipartite.py",
        ("here > best", "here >= best", "of equals in two tiles the last is taken", "far_apart"),
        (
            "(j[None, :] < i[:, None])",
            "(j[None, :] > i[:, None])",
            "of equal edges the last is merged",
            "test_matching and not any_numbers",
        ),
        (
            "(cosines == cosines) & (m < N)[None, :]",
            "cosines == cosines",
            "odd rows that are not there are at a right angle to all",
            "test_matching and not any_numbers",
        ),
        (
            "first_a, first_b = P % 2, 1 - P % 2",
            "first_a, first_b = 0, 1",
            "the prefix has no parity",
            "test_matching and not any_numbers",
        ),
    ),
    *of_file(
        "tokenops/_triton/merge_bipartite.py",
        (
            "(n[None, :] > last[:, None])",
            "(n[None, :] >= last[:, None])",
            "one token is summed up again",
            "test_merging",
        ),
        (
            "tl.where(row < P, 1.0, tl.where(some,",
            "tl.where(row < 0, 1.0, tl.where(some,",
            "a row of the prefix whose size is 0 is lost",
            "forward_and_backward and float32 and (N12 or N9 or N2)",
        ),
        ("(m >= 0) & (m < M)", "(m > 0) & (m < M)", "nothing goes into the first", "test_unmerging"),
        (
            "read & ((n < P) | (total != 0))",
            "read & (total != 0)",
            "the gradient of a row of the prefix whose size is 0 is lost",
            "forward_and_backward and float32 and (N12 or N9 or N2)",
        ),
    ),
    *of_file(
        "tokenops/_triton/merge_neighbours.py",
        (
            "second = i + 1 < H",
            "second = i < H",
            "the last row of an odd height has a neighbour",
            "forward_and_backward and B3 and bfloat16",
        ),
        (
            '        largest = tl.where(largest == float("-inf"), 0.0, largest)\n',
            "",
            "two logits of -inf give NaN",
            "test_table",
        ),
        (
            "share_a = tl.where(some, size_a / total, 0.5)",
            "share_a = size_a / total",
            "two sizes of 0 share nothing",
            "test_sizes",
        ),
        ("wide * (x_a - x_b)", "wide * x_a", "a logit's gradient loses the other token", "gradcheck"),
    ),
    *of_file(
        "tokenops/_triton/restore_tokens.py",
        ("(n >= 0) & (n < N), n, N)", "(n > 0) & (n < N), n, N)", "token 0 has no place", "test_table"),
        (
            "j[None, :] > (n - carried)[:, None]",
            "j[None, :] >= (n - carried)[:, None]",
            "a token is later than itself",
            "gradient_goes",
        ),
        (
            "wins = (n < carried) | ((n < given) & (place < N))",
            "wins = (n < carried) | (n < given)",
            "a token that goes nowhere gets a gradient",
            "bad_ones or nowhere",
        ),
    ),
    *of_file(
        "tokenops/_triton/select_tokens.py",
        (
            "tl.where(value != value, -0x80000000, tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits))",
            "tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)",
            "NaN is the best of all",
            "test_table",
        ),
        ("(levels < wanted)", "(levels <= wanted)", "one of equals too many is kept", "test_table"),
        (
            "        level_before += tl.sum(level)\n",
            "",
            "equals in the tiles before are not counted",
            "equals_of_many_tiles",
        ),
        (
            'tl.maximum(N - count, 1).to(ACC)\n        if REST == "norm',
            'tl.maximum(N - k, 1).to(ACC)\n        if REST == "norm',
            "the mean is of N - k, whatever the counts",
            "test_counts",
        ),
        (
            "(dot - through_sum) / divisor",
            "dot / divisor",
            "a score's gradient loses the sum's",
            "gradient_of_the_rest",
        ),
    ),
    *of_file(
        "tokenops/_triton/soft_aggregate.py",
        (
            "total = total * shrink + tl.sum(e, axis=1)",
            "total = total + tl.sum(e, axis=1)",
            "the sum is not brought to a higher maximum",
            "as_good_as_plain and N70 and float32",
        ),
        (
            "weights * (da - delta[None, :])",
            "weights * da",
            "dS loses the mean of dA",
            "as_good_as_plain and N12 and float32",
        ),
        (
            'other=float("-inf")).to(ACC)',
            "other=0.0).to(ACC)",
            "tokens left out have a logit of 0",
            "as_good_as_plain and N33 and mask and float32",
        ),
    ),
    *of_file(
        "tokenops/_triton/token_mlp.py",
        (
            "return _gelu_cdf(x) + x * (0.3989422804014327 * tl.exp(-0.5 * x * x))",
            "return _gelu_cdf(x)",
            "the slope of a GELU loses its second term",
            "as_good_as_plain and B2-M5 and float32",
        ),
        (
            "                stride_w2r, stride_w2n, stride_dyn",
            "                stride_w2n, stride_w2r, stride_dyn",
            "strides of w2 are swapped in dw1",
            "as_good_as_plain and B2-M5 and float32",
        ),
        (
            "B * tiles_c)):",
            "B * tiles_c - 1)):",
            "the last image is not in the weights' gradients",
            "as_good_as_plain and B2-M5 and float32",
        ),
    ),
    *of_file(
        "tokenops/_triton/masked_channel_attention.py",
        (
            'return tl.where(lse == float("-inf"), 0.0, lse)',
            "return lse",
            "no key that counts gives NaN",
            "left_out_by_the_bias or ragged",
        ),
        (
            "counts = (n >= 0) if WHOLE else n < length",
            "counts = (n >= 0) if WHOLE else n <= length",
            "a value behind the length is read",
            "ragged",
        ),
        (
            "acc * shrink[:, None]",
            "acc",
            "sums are not brought to a higher maximum",
            "test_as_good_as_plain and N300 and bfloat16",
        ),
        ("/ (M * heads)", "/ M", "scores are summed over the heads", "everything_as_good and N5 and received-mean"),
    ),
    *of_file(
        "tokenops/_triton/masked_channel_attention_bwd.py",
        ('bias > float("-inf"), DK', "n < length, DK", "keys that the bias leaves out spoil dk", "get_no_gradient"),
        ("delta -= tl.load(dlse_ptr", "delta += tl.load(dlse_ptr", "dlse has the wrong sign", "loss_on_one_result"),
        (
            "tl.where(m == 0, gradient, 0.0)",
            "tl.where(m >= 0, gradient, 0.0)",
            "every query is the class's",
            "test_as_good_as_plain and M5-N5 and float32",
        ),
        (
            "        dv *= _channels(v_mask_ptr, h, cv, DV, ACC)[None, :]\n",
            "",
            "dv is not masked",
            "everything_as and M5-N5 and None",
        ),
    ),
]
