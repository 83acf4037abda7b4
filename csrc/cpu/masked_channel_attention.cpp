// masked_channel_attention on a CPU, forward and backward: one head after the other, its keys and values packed once,
// never more than a block of queries' probabilities in memory (attention_variant.h). An operator is one call from
// Python: what it takes is brought into shape here, and all that it gives is made here.
#include "../common.h"

#include <algorithm>
#include <atomic>
#include <memory>
#include <optional>
#include <string>
#include <vector>

#include "attention.h"

namespace tokenops {
namespace {

using attention::Gradients;
using attention::Problem;
using attention::Rows;
using attention::Variant;
using torch::headeronly::ScalarType;
using Maybe = std::optional<Tensor>;

attention::Type type_of(const Tensor& x) {
  if (x.scalar_type() == ScalarType::Float) return attention::Type::Float;
  if (x.scalar_type() == ScalarType::BFloat16) return attention::Type::BFloat16;
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::Half, "attention takes float16, bfloat16 and float32");
  return attention::Type::Half;
}

Tensor as(const Tensor& x, ScalarType type) {
  return x.scalar_type() == type && x.is_contiguous() ? x : torch::stable::contiguous(torch::stable::to(x, type));
}

Rows rows_of(const char* name, const Tensor& x, const Tensor& q, int64_t rows, int64_t channels) {
  STD_TORCH_CHECK(!x.is_cuda() && x.dim() == 4 && x.scalar_type() == q.scalar_type(), name,
                  " must be (B, H, N, D) like q");
  STD_TORCH_CHECK(x.size(0) == q.size(0) && x.size(1) == q.size(1) && x.size(2) == rows && x.size(3) == channels, name,
                  " has the wrong shape");
  return {static_cast<char*>(x.data_ptr()), x.stride(0), x.stride(1), x.stride(2)};
}

// The heads of q, k and v that lie side by side, (B, N, H * (2 Dk + Dv)).
void unpack(const Tensor& qkv, const Problem& p, Rows& q, Rows& k, Rows& v) {
  const int64_t size = p.size_of_element(), deep = p.H * p.DK;
  char* data = static_cast<char*>(qkv.data_ptr());
  q = {data, qkv.stride(0), p.DK, qkv.stride(1)};
  k = {data + deep * size, qkv.stride(0), p.DK, qkv.stride(1)};
  v = {data + 2 * deep * size, qkv.stride(0), p.DV, qkv.stride(1)};
}

// A (B,H,N,D) tensor that lies in memory as (B,N,H,D), as every backend makes it.
Tensor heads_inside(const Tensor& like, int64_t B, int64_t H, int64_t N, int64_t D) {
  const int64_t sizes[] = {B, H, N, D}, strides[] = {N * H * D, D, H * D, 1};
  return new_tensor(like, sizes, strides, 4, std::nullopt);
}

const float* floats(const Tensor& x) { return static_cast<const float*>(x.data_ptr()); }
float* filled(const Tensor& x) { return static_cast<float*>(x.data_ptr()); }

// The rows of a sequence, of queries and of keys.
struct Sequence {
  int64_t m, m_end, n, n_end;
};

// What both passes take: checked, and with the tensors that the pointers lead into.
struct Call {
  Tensor q;
  Maybe k, v, qk_mask, v_mask, bias, lengths;
  int64_t B;
  Problem p{};
  std::vector<Sequence> sequences;  // of the one image, if it is packed
  bool packed;

  Call(Tensor q_, Maybe k_, Maybe v_, Maybe qk_mask_, Maybe v_mask_, Maybe bias_, Maybe lengths_, int64_t heads,
       int64_t channels, double scale, const Maybe& cu_q, const Maybe& cu_k)
      : q(dense(q_)), B(q.dim() ? q.size(0) : 0) {
    p.type = type_of(q), p.scale = static_cast<float>(scale), p.splits = 1;
    STD_TORCH_CHECK(!q.is_cuda(), "q must be on the CPU");
    STD_TORCH_CHECK(k_.has_value() == v_.has_value(), "k and v are given both, or both in q");
    if (k_) {
      k = dense(*k_), v = dense(*v_);
      STD_TORCH_CHECK(q.dim() == 4 && k->dim() == 4 && v->dim() == 4, "q, k and v must be (B, H, N, D)");
      p.H = q.size(1), p.M = q.size(2), p.N = k->size(2), p.DK = q.size(3), p.DV = v->size(3);
      p.q = rows_of("q", q, q, p.M, p.DK), p.k = rows_of("k", *k, q, p.N, p.DK), p.v = rows_of("v", *v, q, p.N, p.DV);
    } else {
      STD_TORCH_CHECK(q.dim() == 3 && heads > 0 && channels > 0 && q.size(2) % heads == 0, "q must hold q, k and v");
      p.H = heads, p.M = p.N = q.size(1), p.DK = channels, p.DV = q.size(2) / heads - 2 * channels;
      unpack(q, p, p.q, p.k, p.v);
    }
    STD_TORCH_CHECK(0 < p.DK && p.DK <= WIDEST && 0 < p.DV && p.DV <= WIDEST, "heads must have 1 to 128 channels");
    p.qk_mask = mask("qk_mask", qk_mask_, qk_mask, p.DK), p.v_mask = mask("v_mask", v_mask_, v_mask, p.DV);
    if (bias_) {
      STD_TORCH_CHECK(!bias_->is_cuda() && bias_->dim() == 3 && bias_->size(0) == B && bias_->size(1) == p.H &&
                          bias_->size(2) == p.N,
                      "bias must be (B, H, Nk)");
      check_float("bias", *bias_);
      bias = bias_->scalar_type() == ScalarType::Float ? *bias_ : torch::stable::to(*bias_, ScalarType::Float);
      p.bias = floats(*bias), p.bias_b = bias->stride(0), p.bias_h = bias->stride(1), p.bias_n = bias->stride(2);
    }
    if (lengths_) {
      STD_TORCH_CHECK(!lengths_->is_cuda() && lengths_->dim() == 1 && lengths_->size(0) == B, "lengths must be (B,)");
      lengths = as(*lengths_, ScalarType::Long);
      p.lengths = static_cast<const int64_t*>(lengths->data_ptr());
      for (int64_t b = 0; b < B; ++b) {
        STD_TORCH_CHECK(p.lengths[b] >= 0 && p.lengths[b] <= p.N, "key_lengths has ", p.lengths[b],
                        ", but it must be between 0 and the ", p.N, " keys there are");
      }
    }
    p.across_m = p.M, p.across_n = p.N;
    packed = cu_q.has_value();
    if (packed) read_boundaries(*cu_q, cu_k);
  }

  void read_boundaries(const Tensor& cu_q, const Maybe& cu_k) {
    STD_TORCH_CHECK(B == 1 && !lengths && cu_k, "boundaries are of queries and of keys, of one image without lengths");
    const auto ends = [](const char* name, const Tensor& cu, int64_t rows) {
      STD_TORCH_CHECK(!cu.is_cuda() && cu.dim() == 1 && cu.size(0) > 0 && cu.scalar_type() == ScalarType::Int, name,
                      " must be int32 (S+1,)");
      std::vector<int64_t> found(cu.size(0));
      const int32_t* at = static_cast<const int32_t*>(cu.data_ptr());
      for (size_t i = 0; i < found.size(); ++i) {
        found[i] = at[i * cu.stride(0)];
        STD_TORCH_CHECK(found[i] >= (i ? found[i - 1] : 0) && found[i] <= rows && (i || found[i] == 0), name,
                        " must begin with 0, not fall, and end within the rows");
      }
      return found;
    };
    const std::vector<int64_t> of_q = ends("cu_q", cu_q, p.M), of_k = ends("cu_k", *cu_k, p.N);
    STD_TORCH_CHECK(of_q.size() == of_k.size(), "cu_q and cu_k must be of as many sequences");
    for (size_t i = 0; i + 1 < of_q.size(); ++i) sequences.push_back({of_q[i], of_q[i + 1], of_k[i], of_k[i + 1]});
  }

  // The sequence as a problem of its own.
  Problem alone(const Sequence& s) const {
    Problem own = p;
    const int64_t size = p.size_of_element();
    own.M = s.m_end - s.m, own.N = s.n_end - s.n;
    own.q.data += s.m * p.q.stride_n * size, own.k.data += s.n * p.k.stride_n * size;
    own.v.data += s.n * p.v.stride_n * size;
    if (p.out.data) own.out.data += s.m * p.out.stride_n * size;
    if (p.bias) own.bias += s.n * p.bias_n;
    if (p.lse) own.lse += s.m;
    if (p.scores) own.scores += s.n;
    return own;
  }

  const float* mask(const char* name, const Maybe& given, Maybe& kept, int64_t channels) {
    if (!given) return nullptr;
    STD_TORCH_CHECK(!given->is_cuda() && given->dim() == 2 && given->size(0) == p.H && given->size(1) == channels, name,
                    " must be (H, D)");
    check_float(name, *given);
    kept = as(*given, ScalarType::Float);
    return floats(*kept);
  }

  static constexpr int64_t WIDEST = 128;
};

// Calls body(scratch, begin, end) for tasks in parallel, each thread with scratch of so many words.
template <typename F>
void for_tasks(int64_t tasks, int64_t words, const F& body) {
  torch::stable::parallel_for(0, tasks, 1, [&](int64_t begin, int64_t end) {
    constexpr int64_t align = 64;
    std::unique_ptr<char[]> memory(new char[4 * words + align]);
    char* base = memory.get() + (align - reinterpret_cast<uintptr_t>(memory.get()) % align);
    body(reinterpret_cast<int32_t*>(base), begin, end);
  });
}

// A sequence's tasks are its heads, or parts of them. Those of few logits are dealt out together.
constexpr int64_t TOGETHER = 1 << 18;

// Calls body(i, scratch, begin, end) for tasks of the i-th problem in parallel: who is done takes the next ones, as
// sequences are of unequal length.
template <typename F>
void for_sequences(const std::vector<Problem>& problems, int64_t words, const F& body) {
  struct Share {
    size_t problem;
    int64_t begin, end;
  };
  std::vector<Share> shares;
  for (size_t i = 0; i < problems.size(); ++i) {
    const Problem& p = problems[i];
    const int64_t tasks = p.H * p.splits, logits = std::max<int64_t>(1, p.M * p.N / p.splits);
    const int64_t step = std::max<int64_t>(1, TOGETHER / logits);
    for (int64_t at = 0; at < tasks; at += step) shares.push_back({i, at, std::min(tasks, at + step)});
  }
  std::atomic<size_t> next{0};
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), shares.size());
  for_tasks(workers, words, [&](int32_t* scratch, int64_t, int64_t) {
    for (size_t i; (i = next.fetch_add(1)) < shares.size();) {
      body(shares[i].problem, scratch, shares[i].begin, shares[i].end);
    }
  });
}

template <typename F>
int64_t most_words(const std::vector<Problem>& problems, const F& words) {
  int64_t most = 0;
  for (const Problem& p : problems) most = std::max(most, words(p));
  return most;
}

void zero(const Tensor& x) { std::memset(x.data_ptr(), 0, x.numel() * x.element_size()); }

// (B,H,N) to the mean over the heads, (B,N)
void mean_over_heads(const float* each, int64_t B, int64_t H, int64_t N, float* mean) {
  for (int64_t b = 0; b < B; ++b, mean += N) {
    std::fill(mean, mean + N, 0.0f);
    for (int64_t h = 0; h < H; ++h, each += N)
      for (int64_t n = 0; n < N; ++n) mean[n] += each[n];
    for (int64_t n = 0; n < N; ++n) mean[n] /= static_cast<float>(H);
  }
}

std::tuple<Tensor, Tensor, Tensor, Tensor> forward(Tensor q, Maybe k, Maybe v, Maybe qk_mask, Maybe v_mask, Maybe bias,
                                                   Maybe lengths, double scale, std::string scores, bool mean,
                                                   bool key_mean, int64_t heads, int64_t channels, bool keep,
                                                   Maybe cu_q, Maybe cu_k, int64_t, int64_t) {
  Call call(q, k, v, qk_mask, v_mask, bias, lengths, heads, channels, scale, cu_q, cu_k);
  Problem& p = call.p;
  const Variant chosen = attention::choose(p.type);
  const int64_t B = call.B, of_all = B * p.H;
  const bool scored = scores != "none";
  Tensor out = heads_inside(q, B, p.H, p.M, p.DV);
  Tensor lse = keep ? new_tensor(q, {B, p.H, p.M}, ScalarType::Float) : new_tensor(q, {0}, ScalarType::Float);
  Tensor found = !scored ? new_tensor(q, {0}, ScalarType::Float)
                 : mean  ? new_tensor(q, {B, p.N}, ScalarType::Float)
                         : new_tensor(q, {B, p.H, p.N}, ScalarType::Float);
  std::vector<float> each(scored && mean ? of_all * p.N : 0);
  p.out = rows_of("out", out, out, p.M, p.DV), p.lse = keep ? filled(lse) : nullptr;
  if (scored) p.scores = mean ? each.data() : filled(found), p.received = scores == "received";
  if (call.packed) {
    if (scored && !mean) zero(found);  // keys of no query
    std::vector<Problem> problems;
    for (const Sequence& s : call.sequences) {
      if (s.m_end > s.m) problems.push_back(call.alone(s));
    }
    const int64_t m = call.sequences.empty() ? 0 : call.sequences.back().m_end, size = p.size_of_element();
    char* out_rows = static_cast<char*>(out.data_ptr());
    std::memset(out_rows + m * p.H * p.DV * size, 0, (p.M - m) * p.H * p.DV * size);
    for (int64_t h = 0; keep && h < p.H; ++h) std::fill(p.lse + h * p.M + m, p.lse + (h + 1) * p.M, attention::NONE);
    const int64_t of_heads = problems.size() * p.H, threads = torch::stable::get_num_threads();
    for (Problem& own : problems) {
      const int64_t blocks = (own.M + chosen.width - 1) / chosen.width;
      if (!p.received) own.splits = std::max<int64_t>(1, std::min(blocks, (threads + of_heads - 1) / of_heads));
    }
    for_sequences(problems, most_words(problems, chosen.words),
                  [&](size_t i, int32_t* scratch, int64_t begin, int64_t end) {
                    chosen.attend(problems[i], scratch, begin, end);
                  });
  } else if (of_all * p.M > 0) {
    const int64_t blocks = (p.M + chosen.width - 1) / chosen.width, threads = torch::stable::get_num_threads();
    // few heads: several threads to each, of which every one packs the keys and values
    if (!p.received) p.splits = std::max<int64_t>(1, std::min(blocks, (threads + of_all - 1) / of_all));
    for_tasks(of_all * p.splits, chosen.words(p), [&](int32_t* scratch, int64_t begin, int64_t end) {
      chosen.attend(p, scratch, begin, end);
    });
  }
  if (scored && mean) mean_over_heads(each.data(), B, p.H, p.N, filled(found));
  Tensor keys = key_mean ? new_tensor(q, {B, p.N, p.DK}) : new_tensor(q, {0});
  if (key_mean) {
    char* to = static_cast<char*>(keys.data_ptr());
    const int64_t rows = call.sequences.empty() ? 0 : call.sequences.back().n_end;
    if (call.packed) p.lengths = &rows;
    const auto part = [&](int64_t begin, int64_t end) { chosen.mean_keys(p, to, begin, end); };
    torch::stable::parallel_for(0, B * p.N, 64, part);
  }
  return {out, found, lse, keys};
}

// What a gradient of scores (or of their mean over the heads) gives each query's probabilities, (B,H,Nk).
std::vector<float> of_each_query(const Tensor& dscores, const Call& call, bool mean) {
  const Problem& p = call.p;
  const int64_t B = call.B;
  const Tensor given = as(dscores, ScalarType::Float);
  STD_TORCH_CHECK(given.dim() == (mean ? 2 : 3) && given.numel() == B * p.N * (mean ? 1 : p.H),
                  "dscores has the wrong shape");
  std::vector<float> each(B * p.H * p.N);
  const auto share_out = [&](int64_t queries, int64_t begin, int64_t end) {
    const float share = 1.0f / static_cast<float>((p.received ? queries : 1) * (mean ? p.H : 1));
    for (int64_t bh = 0; bh < B * p.H; ++bh) {
      const float* row = floats(given) + (mean ? bh / p.H : bh) * p.N;
      for (int64_t n = begin; n < end; ++n) each[bh * p.N + n] = row[n] * share;
    }
  };
  if (!call.packed) share_out(p.M, 0, p.N);
  for (const Sequence& s : call.sequences) share_out(s.m_end - s.m, s.n, s.n_end);
  return each;
}

// The gradient of a mask (H,D): the sum over the images of their own.
Tensor of_mask(const std::vector<float>& each, const Maybe& mask, const Tensor& like) {
  if (!mask) return new_tensor(like, {0});
  Tensor sum = torch::stable::new_zeros(*mask, {mask->size(0), mask->size(1)}, ScalarType::Float);
  const int64_t size = sum.numel();
  for (size_t i = 0; i < each.size(); ++i) filled(sum)[i % size] += each[i];
  return torch::stable::to(sum, mask->scalar_type());
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> backward(
    Tensor dout, Maybe dscores, Maybe dlse, Tensor q, Maybe k, Maybe v, Maybe qk_mask, Maybe v_mask, Maybe bias,
    Maybe lengths, Tensor, Tensor lse, double scale, std::string scores, bool mean, int64_t heads, int64_t channels,
    Maybe cu_q, Maybe cu_k, int64_t, int64_t) {
  Call call(q, k, v, qk_mask, v_mask, bias, lengths, heads, channels, scale, cu_q, cu_k);
  Problem& p = call.p;
  const Variant chosen = attention::choose(p.type);
  const int64_t B = call.B, of_all = B * p.H;
  p.received = scores == "received";
  lse = as(lse, ScalarType::Float);  // what was saved may lie otherwise
  STD_TORCH_CHECK(!lse.is_cuda() && lse.dim() == 3 && lse.numel() == of_all * p.M, "lse has the wrong shape");
  p.lse = filled(lse);
  Gradients g{};
  dout = dense(dout);
  STD_TORCH_CHECK(!dout.is_cuda() && dout.scalar_type() == q.scalar_type() && dout.dim() == 4 && dout.size(0) == B &&
                      dout.size(1) == p.H && dout.size(2) == p.M && dout.size(3) == p.DV,
                  "dout has the wrong shape or dtype");
  g.dout = rows_of("dout", dout, dout, p.M, p.DV);
  std::vector<float> each;
  if (dscores) each = of_each_query(*dscores, call, mean), g.dscores = each.data();
  if (dlse) {
    dlse = as(*dlse, ScalarType::Float);
    STD_TORCH_CHECK(dlse->dim() == 3 && dlse->numel() == of_all * p.M, "dlse has the wrong shape");
    g.dlse = floats(*dlse);
  }
  const auto nothing = [&] { return new_tensor(q, {0}); };
  Tensor dq = k ? heads_inside(q, B, p.H, p.M, p.DK) : new_tensor(q, {B, p.N, q.size(2)});
  Tensor dk = k ? heads_inside(q, B, p.H, p.N, p.DK) : nothing();
  Tensor dv = k ? heads_inside(q, B, p.H, p.N, p.DV) : nothing();
  if (k) {
    g.dq = rows_of("dq", dq, dq, p.M, p.DK), g.dk = rows_of("dk", dk, dk, p.N, p.DK);
    g.dv = rows_of("dv", dv, dv, p.N, p.DV);
  } else {
    unpack(dq, p, g.dq, g.dk, g.dv);
  }
  const int64_t of_masks = call.packed ? call.sequences.size() * p.H : of_all;
  std::vector<float> dqk_mask(qk_mask ? of_masks * p.DK : 0), dv_mask(v_mask ? of_masks * p.DV : 0);
  if (qk_mask) g.dqk_mask = dqk_mask.data();
  if (v_mask) g.dv_mask = dv_mask.data();
  Tensor dbias = bias ? torch::stable::new_zeros(*bias, {B, p.H, p.N}, ScalarType::Float) : nothing();
  if (bias) g.dbias = filled(dbias);
  if (call.packed) {
    zero(dq), zero(dk), zero(dv);  // rows of no sequence, and keys of no query
    std::vector<Problem> problems;
    std::vector<Gradients> gradients;
    for (const Sequence& s : call.sequences) {
      if (s.m_end == s.m) continue;
      Gradients own = g;
      const int64_t size = p.size_of_element(), before = problems.size() * p.H;
      own.dout.data += s.m * g.dout.stride_n * size, own.dq.data += s.m * g.dq.stride_n * size;
      own.dk.data += s.n * g.dk.stride_n * size, own.dv.data += s.n * g.dv.stride_n * size;
      if (g.dscores) own.dscores += s.n;
      if (g.dlse) own.dlse += s.m;
      if (g.dbias) own.dbias += s.n;
      if (g.dqk_mask) own.dqk_mask += before * p.DK;
      if (g.dv_mask) own.dv_mask += before * p.DV;
      problems.push_back(call.alone(s)), gradients.push_back(own);
    }
    for_sequences(problems, most_words(problems, chosen.words_backward),
                  [&](size_t i, int32_t* scratch, int64_t begin, int64_t end) {
                    chosen.attend_backward(problems[i], gradients[i], scratch, begin, end);
                  });
  } else {
    for_tasks(of_all, chosen.words_backward(p), [&](int32_t* scratch, int64_t begin, int64_t end) {
      chosen.attend_backward(p, g, scratch, begin, end);
    });
  }
  if (bias && bias->scalar_type() != ScalarType::Float) dbias = torch::stable::to(dbias, bias->scalar_type());
  return {dq, dk, dv, of_mask(dqk_mask, qk_mask, q), of_mask(dv_mask, v_mask, q), dbias};
}

}  // namespace
}  // namespace tokenops

STABLE_TORCH_LIBRARY_IMPL(tokenops, CPU, m) {
  m.impl("masked_channel_attention_fwd.native", TORCH_BOX(&tokenops::forward));
  m.impl("masked_channel_attention_bwd.native", TORCH_BOX(&tokenops::backward));
}
