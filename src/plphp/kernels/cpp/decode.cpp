// SPDX-License-Identifier: Apache-2.0
// Attention of a few query rows over a ragged prefix and a dense tail on a CPU: `decode_attention` in decode.py says
// what, _decode_cpp.py calls it.
//
// Every key and value is read once for all query rows of its KV head. Entries are cut into pieces, which threads take
// in turn; a piece has a softmax of its own, and pieces are merged by their maxima and sums. Sums are float32.
#include <algorithm>
#include <cmath>
#include <exception>
#include <vector>

#include "by_vectors.h"
#include "call.h"
#include "vectors.h"
#ifdef __AMX_BF16__
#include "by_amx.h"
#endif

namespace {

// The softmax of each piece: weighted values [rows, width], and maxima and sums of the weights [rows].
struct Partials {
  std::vector<float> outs, tops, totals;
};

// The output of a head, from its pieces `begins` to `ends`: weights of a piece are relative to its own maximum, and are
// brought to the largest of all before they are added. A piece in which all logits are -inf has LOWEST for a maximum,
// and its share is exp of something far below 0: 0, and no NaN as -inf - -inf would be.
template <class K, class V>
void merge(const Call& call, int head, size_t begins, size_t ends, const Partials& partials) {
  const int rows = call.rows(), value_groups = groups(call.value_dim);
  for (int row = 0; row < rows; ++row) {
    float top = LOWEST, total = 0;
    for (size_t piece = begins; piece < ends; ++piece) top = std::max(top, partials.tops[piece * rows + row]);
    for (size_t piece = begins; piece < ends; ++piece)
      total += partials.totals[piece * rows + row] * std::exp(partials.tops[piece * rows + row] - top);
    if (call.lse) *call.lse_of(head, row) = top + std::log(total);
    for (int group = 0; group < value_groups; ++group) {
      Floats sums[2] = {};
      for (size_t piece = begins; piece < ends; ++piece) {
        const float share = std::exp(partials.tops[piece * rows + row] - top) / total;
        const float* out = &partials.outs[((piece * rows + row) * value_groups + group) * GROUP];
        for (int half = 0; half < 2; ++half) sums[half] += load(out + half * LANES) * share;
      }
      put_sums<V>(call.out_row<K>(head, row) + begin(group, call.value_dim), sums);
    }
  }
}

template <class K, class V, class Way>
void attend(const Call& call) {
  std::vector<size_t> first;
  const std::vector<Piece<K, V>> pieces = pieces_of<K, V>(call, BLOCK, first);
  const int64_t rows = call.rows(), size = rows * groups(call.value_dim) * GROUP, query_size = Way::query_size(call);
  std::vector<float> queries(call.heads() * query_size);
  Partials partials{std::vector<float>(pieces.size() * size), std::vector<float>(pieces.size() * rows),
              std::vector<float>(pieces.size() * rows)};
// As many threads as torch has: gcc's OpenMP ends those that a smaller team leaves over, and torch would start them
// anew. All queries are fetched before a piece is attended to, and all pieces are done before a head is merged: each
// loop ends in a barrier, as none has `nowait`.
#pragma omp parallel num_threads(int(call.threads))
  {
    Way way(call);  // takes no memory but the stack, so that nothing is thrown here
#pragma omp for
    for (int head = 0; head < call.heads(); ++head) way.fetch_query(head, &queries[head * query_size]);
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < pieces.size(); ++i)
      way.attend(pieces[i], &queries[pieces[i].head * query_size], &partials.outs[i * size], &partials.tops[i * rows],
                 &partials.totals[i * rows]);
#pragma omp for
    for (int head = 0; head < call.heads(); ++head) merge<K, V>(call, head, first[head], first[head + 1], partials);
  }
}

// 0, or 1 where there is no memory: no exception may leave a function that C calls.
int tried(void (*way)(const Call&), const Call& call) {
  try {
    way(call);
  } catch (const std::exception&) {  // of vectors, which take no memory but here
    return 1;
  }
  return 0;
}

}  // namespace

extern "C" int attend_float32(const Call* call) { return tried(attend<float, float, ByVectors<float>>, *call); }

// Keys in float32 and values in bf16, as under autocast in models whose rotary embedding is float32.
extern "C" int attend_float32_bfloat16(const Call* call) {
  return tried(attend<float, bf16, ByVectors<float, bf16>>, *call);
}

extern "C" int attend_bfloat16(const Call* call) {
#ifdef __AMX_BF16__
  if (ByAmx::can(*call)) return tried(attend<bf16, bf16, ByAmx>, *call);
#endif
  return tried(attend<bf16, bf16, ByVectors<bf16>>, *call);
}
