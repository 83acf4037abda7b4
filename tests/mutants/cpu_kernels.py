"""Mutants of the C++ kernels for CPUs: what they are made of, see run.py."""

from mutants import of_file

MUTANTS = [
    *of_file(
        "csrc/cpu/aggregation_weights.cpp",
        (
            "return w == NONE ? w : w * scale;",
            "return w * scale;",
            "-inf times a scale of 0 or below",
            "minus_infinity",
        ),
        (
            "(read(da + i * stride) - delta)",
            "read(da + i * stride)",
            "dS loses the mean of dA",
            "as_good_as_plain and plain and float32",
        ),
    ),
    *of_file(
        "csrc/cpu/soft_aggregate_panels.h",
        (
            "_mm512_mask_mul_ps(s, _mm512_cmp_ps_mask(s, none, _CMP_NEQ_UQ), s, factor)",
            "_mm512_mul_ps(s, factor)",
            "-inf times a scale of 0 or below, on AVX-512",
            "minus_infinity and native",
        ),
        (
            "_mm512_sub_ps(_mm512_load_ps(da + WIDTH * n + 16 * c), delta[c])",
            "_mm512_load_ps(da + WIDTH * n + 16 * c)",
            "dS loses the mean of dA, on AVX-512",
            "as_good_as_plain and native",
        ),
    ),
    *of_file(
        "csrc/cpu/token_mlp_tiles.cpp",
        (
            "db1[r + i] += _mm512_reduce_add_ps(sums[i]);",
            "db1[r + i] = _mm512_reduce_add_ps(sums[i]);",
            "db1 of the last image alone",
            "as_good_as_plain and native",
        ),
    ),
    *of_file(
        "csrc/cpu/attention.h",
        (
            "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16",
            "bits >> 16",
            "bfloat16 is cut off",
            "rounded_to_nearest",
        ),
    ),
    *of_file(
        "csrc/cpu/attention_forward.h",
        ("lane < static_cast<int32_t>(count) ? share : Floats{}", "share", "queries behind the last count", "add_up"),
        (
            "        if (__builtin_expect(add == NONE, 0)) c[r][v] = Floats{} + NONE;  // the product may be NaN\n",
            "",
            "keys that the bias leaves out spoil a row",
            "may_be_nan",
        ),
    ),
    *of_file(
        "csrc/cpu/attention_backward.h",
        (
            "      for (int64_t d = 0; d < channels; ++d) row[d] *= mask[d];\n",
            "",
            "dv is not masked",
            "everything_as and B2-H3",
        ),
    ),
    *of_file(
        "csrc/cpu/attention_variant.h",
        (
            "start < N; start += CHUNK) {\n    Floats more",
            "start + CHUNK < N; start += CHUNK) {\n    Floats more",
            "the last keys are not summed",
            "test_as_good_as_plain and N300 and float32",
        ),
    ),
    *of_file(
        "csrc/cpu/masked_channel_attention.cpp",
        (
            "p.bias_h = bias->stride(1)",
            "p.bias_h = bias->stride(0)",
            "strides of the bias are swapped",
            "left_out_by_the_bias",
        ),
    ),
    *of_file(
        "csrc/cpu/choice.h",
        ("keys[i] = score != score ? 0 : bits;", "keys[i] = bits;", "NaN is the best of all", "test_table"),
        (
            "ties -= keys[i] == last;",
            "",
            "all that are level with the last of the best are taken",
            "test_table",
        ),
    ),
    *of_file(
        "csrc/cpu/match_bipartite.cpp",
        (
            "best[i] = least, places[i] = 0;",
            "best[i] = least;",
            "an infinite token goes where its products say",
            "test_matching",
        ),
        (
            "std::numeric_limits<Wide>::quiet_NaN()",
            "Wide{0}",
            "rows that are none are at a right angle to all",
            "test_matching and not any_numbers",
        ),
        (
            "better = likeness > top[v];",
            "better = likeness >= top[v];",
            "of equal goals the last is taken",
            "test_matching or far_apart",
        ),
    ),
    *of_file(
        "csrc/cpu/match_tiles.h",
        ("_CMP_GT_OQ", "_CMP_GE_OQ", "of equal goals the last is taken", "test_matching or far_apart"),
        (
            "if (const float power = Powers<float>::of(squares); power != 1) {",
            "if (const float power = 1; power != 1) {",
            "squares overflow and vanish",
            "lengths_do_not_count",
        ),
    ),
    *of_file(
        "csrc/cpu/merge_bipartite.cpp",
        ("        if (total == 0) {\n", "        if (merged.size() == 0) {\n", "sizes of 0 give NaN", "test_merging"),
        (
            "for (int64_t n = N - 1; n >= 0; --n) found",
            "for (int64_t n = 0; n < N; ++n) found",
            "sums are in the opposite order",
            "order_of_the_tokens",
        ),
    ),
    *of_file(
        "csrc/cpu/merge_neighbours.cpp",
        (
            "put(out.dlogits, b, pair.b, -through)",
            "put(out.dlogits, b, pair.b, through)",
            "a logit's gradient has the wrong sign",
            "gradcheck",
        ),
        (
            "const uint32_t even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;",
            "const uint32_t even = (bits + 0x8000u) >> 16;",
            "ties of bfloat16 go up, not to even",
            "ties_are",
        ),
    ),
    *of_file(
        "csrc/cpu/restore_tokens.cpp",
        (
            "      row.zero(to_tokens + (b * given + carried + j) * C * row.bytes);\n",
            "",
            "the gradient of a token that goes nowhere is not written",
            "nowhere",
        ),
    ),
    *of_file(
        "csrc/cpu/rows.h",
        (
            "const uint32_t even = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;",
            "const uint32_t even = (bits + 0x8000u) >> 16;",
            "ties of bfloat16 go up, not to even",
            "ties_are",
        ),
    ),
    *of_file(
        "csrc/cpu/select_tokens.cpp",
        (
            "double weight = 1.0 / std::max<int64_t>(1, N - count), by",
            "double weight = 1.0 / std::max<int64_t>(1, N - k), by",
            "the mean's gradient is of N - k, whatever the counts",
            "forward_and_backward and B3",
        ),
    ),
    *of_file(
        "csrc/cpu/vector_math.h",
        (
            "return x < -87.0f ? Floats{} : p * (Floats)power;",
            "return p * (Floats)power;",
            "exp of what is far below is no number",
            "huge_logits or mask and float32",
        ),
    ),
    *of_file(
        "csrc/cpu/vector_rows.h",
        (
            "  if (i < n) total += tail(a + i, n - i) * tail(b + i, n - i);\n",
            "",
            "the last channels are not in a product",
            "gradcheck",
        ),
    ),
]
