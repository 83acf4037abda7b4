"""Mutants of the CUDA kernels, noticed by their emulation on the host: what they are made of, see run.py."""

from mutants import of_file

MUTANTS = [
    *of_file(
        "csrc/cuda/choose.cuh",
        (
            "    __syncthreads();  // the partial sums of the tile before have been read\n",
            "",
            "compaction does not wait for what was read",
        ),
        ("(level && equal_here < wanted)", "(level && equal_here <= wanted)", "one of equals too many is kept"),
    ),
    *of_file(
        "csrc/cuda/companions.cuh",
        (
            "from ? *reinterpret_cast<const int16_t*>(from) : 0",
            "from ? *reinterpret_cast<const int16_t*>(from) : 1",
            "2 bytes of no source are no zero",
        ),
    ),
    *of_file(
        "csrc/cuda/match_bipartite.cuh",
        (
            "(likeness == other && place < other_place)",
            "(likeness == other && place > other_place)",
            "of equal goals the last is taken",
        ),
        ("1 / (norm < smallest ? smallest : norm)", "1 / norm", "a vector of no length gives NaN"),
        ("  if (far) {\n", "  if (false) {\n", "the norm of a row far from 1 overflows or vanishes"),
        ("      if (!far) continue;\n", "      continue;\n", "a row far from 1 is multiplied as it is"),
        (": W(NAN);", ": W(0);", "rows that are not there are odd ones"),
        ("number ? target[i] : 0;", "target[i];", "a row with an infinity has a goal"),
        (
            "[upper + lane % 16][k + 2 * i + lane / 16]",
            "[upper + lane / 16 * 8 + lane % 8][k + 2 * i + lane / 8 % 2]",
            "two matrices of a left operand change places",
        ),
        (
            "threadIdx.x % 4 * 2 + j / 2 * 8 + j % 2",
            "threadIdx.x % 4 + j / 2 * 8 + j % 2 * 4",
            "columns of other lanes",
        ),
    ),
    *of_file(
        "csrc/cuda/merge_bipartite.cuh",
        ("if (size == 0 && row >= p.prefix) {", "if (size == 0) {", "a row of the prefix whose size is 0 is lost"),
        ("n <= origin.last && p.index", "n < origin.last && p.index", "the last of many is not summed"),
    ),
    *of_file(
        "csrc/cuda/merge_neighbours.cuh",
        ("s.b - p.prefix, -slope)", "s.b - p.prefix, slope)", "a logit's gradient has the wrong sign"),
    ),
    *of_file(
        "csrc/cuda/mma.cuh",
        ("a[i / 2 + k / 4 * 2]", "a[i / 2 * 2 + k / 4]", "without tensor cores two words stand for each other"),
        ("8 * i + lane / 4)", "i + lane / 4 * 4)", "without tensor cores a load takes rows of other matrices"),
    ),
    *of_file(
        "csrc/cuda/numbers.cuh", ("(bits + 0x7fffu + (bits >> 16 & 1u)) >> 16", "bits >> 16", "bfloat16 is cut off")
    ),
    *of_file(
        "csrc/cuda/pairs.cuh",
        ("2 * y + 1 < p.height", "2 * y + 1 <= p.height", "the last row of an odd height has a neighbour"),
    ),
    *of_file(
        "csrc/cuda/restore_tokens.cuh",
        ("if (before >= 0) lost", "if (before > 0) lost", "token 0 that loses its place keeps its gradient"),
    ),
    *of_file(
        "csrc/cuda/rows.cuh",
        ("    if (rows > 1) addresses |= t->stride_n;\n", "", "rows need not be aligned to accesses"),
        ("(widen(y.of[i]) - mean) * deviation", "widen(y.of[i]) * deviation", "a norm leaves the mean in"),
    ),
    *of_file(
        "csrc/cuda/sum_rows.cuh",
        ("i = begin + parts * PART; i", "i = begin; i", "rows of whole parts are added twice", ""),
        ("goes = m >= 0 && m < p.given", "goes = m >= 0 && m <= p.given", "a row behind the last is read", ""),
    ),
    *of_file(
        "csrc/cuda/select_tokens.cuh",
        (
            "    __syncthreads();  // the sums of the units before have been read\n",
            "",
            "sums are overwritten while they are read",
        ),
        ("(sum - through_sum) / divisor", "sum / divisor", "a score's gradient loses the sum's"),
    ),
]
