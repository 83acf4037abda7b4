"""Mutants of the C++ kernels for CPUs: what they are made of, see run.py."""

from mutants import of_file

MUTANTS = [
    *of_file(
        "csrc/cpu/soft_aggregate.cpp",
        (
            "if (!mask.image(i / z.N)[i % z.N * mask.stride_n]) std::memset(data + i * bytes, 0, bytes);",
            "",
            "what is in tokens that do not count is read",
            "no_token_counts and native and float32",
        ),
        ("usable(Isa::Amx)", "usable(Isa::Amx) && false", "tiles are not used", "on_tiles"),
        (
            "  clear(rows_of(dx, 1, ends.back(), rows));  // slack\n",
            "",
            "rows behind the last packed sequence have no gradient written",
            "packed_is_a_loop and native and float32",
        ),
        (
            "  clear(dw);\n",
            "",
            "logits of a packed prefix have no gradient written",
            "packed_is_a_loop and native and float32",
        ),
        (
            "  stable::copy_(first, stable::narrow(x, 1, 0, prefix));\n",
            "",
            "the prefix is not written where tiles are not used",
            "as_good_as_plain and plain and float32 and native",
        ),
        (
            "weights[i] = logits[i] == none ? 0 : weights[i];",
            "weights[i] = weights[i];",
            "a slot without a token is NaN, by torch's softmax",
            "no_token_counts and composed and float32",
        ),
        (
            "logits[i] = logits[i] == none ? none : logits[i] * factor;",
            "logits[i] *= factor;",
            "-inf times a scale of 0 or below, by torch's softmax",
            "minus_infinity and composed",
        ),
        (
            "gradients[i] == 0 ? 0 : image[i];",
            "image[i];",
            "logits that do not count reach the scale's gradient",
            "minus_infinity and composed",
        ),
    ),
    *of_file(
        "csrc/cpu/soft_aggregate_avx512.cpp",
        (
            "      if (slots > 16) _mm512_store_ps(panel + 16, _mm512_mul_ps(by[1], _mm512_load_ps(panel + 16)));\n",
            "",
            "weights of the slots behind the 16th do not add up to one",
            "as_good_as_plain and plain and float32 and native",
        ),
        (
            "partial + b * z.M + m, sums",
            "partial + m, sums",
            "the scale's gradient is of the last image alone, on AVX-512",
            "dscale_is and float32 and native",
        ),
    ),
    *of_file(
        "csrc/cpu/soft_aggregate.h",
        (
            "data ? data + b * stride_b : nullptr",
            "data",
            "the first image's mask is that of all",
            "as_good_as_plain and mask and native",
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
        "csrc/cpu/soft_aggregate_tiles.cpp",
        (
            "    else std::memset(to + n * z.C, 0, 2 * z.C);\n",
            "    else std::memcpy(to + n * z.C, rows + n * x.stride_n, 2 * z.C);\n",
            "what is in tokens that do not count is read, on tiles",
            "no_token_counts and native and bfloat16",
        ),
        (
            "    if (part == 0) copy_prefix(z, 2, dy, dx, b);\n",
            "",
            "the prefix's gradient is not written",
            "as_good_as_plain and plain and bfloat16 and native",
        ),
        (
            "partial + b * z.M + m, block",
            "partial + m, block",
            "the scale's gradient is of the last image alone, on tiles",
            "dscale_is and bfloat16 and native",
        ),
    ),
    *of_file(
        "csrc/cpu/tile_products.h",
        (
            "const __mmask32 inside = WHOLE ? ~0u : first_of_32(depth - k);",
            "const __mmask32 inside = WHOLE ? ~0u : first_of_32((depth - k) & ~1);",
            "the last of an odd number of channels is not in the logits",
            "every_width",
        ),
        (
            "        if (!RIGHT) transpose_words(r);\n",
            "",
            "a left operand whose rows are not contiguous is not turned",
            "scatter and bfloat16 and native",
        ),
        (
            "(left_steps ? left_steps : steps) * tile",
            "steps * tile",
            "the second 16 rows of a part of a deeper operand are of another part",
            "many_threads",
        ),
        (
            "if (ROWS == 2 && COLUMNS == 2) TILE_LOAD(3, below + 16, bytes);",
            "if (ROWS == 2 && COLUMNS == 2) TILE_ZERO(3);",
            "a quarter of a block forgets what it is added to",
            "as_good_as_plain and bfloat16 and native",
        ),
    ),
    *of_file(
        "csrc/cpu/tiles.h",
        ("    restore(before);\n", "", "tiles are left as a call has them", "tiles_are_given_back"),
        (
            "    restore(before);\n    __builtin_ia32_ldmxcsr(control);\n",
            "    restore(before);\n",
            "denormal floats stay zeros",
            "tiles_are_given_back",
        ),
    ),
    *of_file(
        "csrc/cpu/avx512.h",
        (
            "2.401644453e-01f",
            "2.4e-01f",
            "powers of two have four digits",
            "as_good_as_plain and plain and float32 and native",
        ),
        ("6.958335398e-01f", "5e-01f", "powers of two where no sum is kept have one digit", "every_width"),
        (
            "n >= 16 ? 0xffff : n <= 0 ? 0 : (1u << n) - 1",
            "n >= 16 || n <= 0 ? 0xffff : (1u << n) - 1",
            "where no lane is left all count",
            "as_good_as_plain and native",
        ),
    ),
    *of_file(
        "csrc/cpu/isa.cpp",
        ("most().exchange(place)", "most().load()", "what is allowed stays as it was", "is_one_there_is"),
        ("place >= best.load", "place > best.load", "what is named is not allowed itself", "that_the_machine_has"),
        (
            "!= static_cast<int>(Isa::Avx512Bf16)",
            ">= 0",
            "pairs are slow where they are what was named, too",
            "that_the_machine_has",
        ),
    ),
    *of_file(
        "csrc/cpu/isa.h",
        ("Avx512, Avx2,", "Avx2, Avx512,", "instruction sets are not in order", "that_the_machine_has"),
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
        "csrc/cpu/bfloat16.h",
        (
            "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16",
            "bits >> 16",
            "bfloat16 is cut off",
            "rounded_to_nearest or instruction_set and bfloat16",
        ),
        (
            "(bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16",
            "(bits + 0x8000u) >> 16",
            "ties of bfloat16 go up, not to even",
            "ties_are",
        ),
    ),
    *of_file(
        "csrc/cpu/attention_amx.h",
        (
            "return n < count ? _mm512_permutexvar",
            "return n < padded(count, DEEP) ? _mm512_permutexvar",
            "values beyond a length are read",
            "beyond_a_length",
        ),
        (
            "  e = _mm512_mask_add_ps(e, halved, e, _mm512_set1_ps(1.0f));\n",
            "",
            "half the log-sum-exps lack a log of 2",
            "every_count",
        ),
    ),
    *of_file(
        "csrc/cpu/attention_amx_forward.h",
        (
            "      low &= _mm512_cmp_ps_mask(add_low, _mm512_set1_ps(NONE), _CMP_NEQ_UQ);\n",
            "",
            "keys that the bias leaves out spoil a row, on tiles",
            "left_out_keys",
        ),
        (
            "  if (__builtin_expect(!fair, 0)) do_carefully(p, s, block);\n",
            "",
            "powers that overflow are not made again",
            "far_from_zero",
        ),
        ("steps.add = chunk.n != 0;", "steps.add = false;", "the result is of the last chunk of keys", "every_count"),
    ),
    *of_file(
        "csrc/cpu/attention_amx_backward.h",
        (
            "call(ds, queries, blocks, p.DK, !first, dk, width_k);",
            "call(ds, queries, blocks, p.DK, false, dk, width_k);",
            "dk is of the last queries alone",
            "as_good_as_plain and M300",
        ),
        (
            "    base[v] = _mm512_mask_mov_ps(base[v], empty, _mm512_setzero_ps());\n",
            "",
            "queries without a key give NaN",
            "without_a_key",
        ),
        (
            "some_out = p.bias || N - n < rows;",
            "some_out = p.bias;",
            "the zeros behind the last key have a weight",
            "far_below_zero",
        ),
    ),
    *of_file(
        "csrc/cpu/attention_variants.cpp",
        (
            "if (halves && usable(Isa::Amx))",
            "if (usable(Isa::Amx))",
            "floats are taken for bfloat16",
            "instruction_set",
        ),
        (
            "return TOKENOPS_VARIANT(avx2, avx2);",
            "return TOKENOPS_VARIANT(baseline, baseline);",
            "AVX2 is not used",
            "that_the_machine_has",
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
        (
            "return x < -87.0f ? Floats{} : p * (Floats)power;",
            "return p * (Floats)power;",
            "exp of what is far below is no number",
            "huge_logits and float32",
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
        ("ties -= keys[i] == last;", "", "all that are level with the last of the best are taken", "test_table"),
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
        (
            "= first + sides.odd(edges.places[i]);",
            "= sequence.begin + sides.odd(edges.places[i]);",
            "of packed sequences the prefix does not count",
            "test_table",
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
            "every_operator and gradcheck and merge_neighbours",
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
        ("if (++n == rows) n = 0, ++b;", "if (++n == rows) n = 0;", "rows of the first image alone", "forward"),
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
        "csrc/cpu/sum_rows.cpp",
        ("first + parts.of(m) * PART, last", "first, last", "rows of whole parts are added twice", ""),
        ("if (m < 0 || m >= M) {", "if (m >= M) {", "what goes nowhere has a gradient", ""),
    ),
    *of_file(
        "csrc/cpu/vector_rows.h",
        (
            "  if (i < n) total += tail(a + i, n - i) * tail(b + i, n - i);\n",
            "",
            "the last channels are not in a product",
            "every_operator and gradcheck and merge_neighbours",
        ),
    ),
]
