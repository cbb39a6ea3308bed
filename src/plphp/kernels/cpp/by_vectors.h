// SPDX-License-Identifier: Apache-2.0
// A piece by vectors of any width, in float32 and bf16; keys may be stored as K and values as V.
#pragma once
#include <algorithm>
#include <cmath>
#include <type_traits>

#include "call.h"
#include "vectors.h"

namespace {

// ---- sums for a tile of query rows

template <int ROWS>
inline void fetch(const float* from, int64_t stride, Floats (&sums)[ROWS][2]) {
  for (int row = 0; row < ROWS; ++row)
    for (int half = 0; half < 2; ++half) sums[row][half] = load(from + row * stride + half * LANES);
}
template <int ROWS>
inline void keep(float* to, int64_t stride, const Floats (&sums)[ROWS][2]) {
  for (int row = 0; row < ROWS; ++row)
    for (int half = 0; half < 2; ++half) store(to + row * stride + half * LANES, sums[row][half]);
}

template <int ROWS>
inline void add_logits(const float* query, int64_t width, const Floats* keys, float* logits) {
  Floats sums[ROWS][2];
  fetch<ROWS>(logits, BLOCK, sums);
  for (int dim = 0; dim < GROUP; ++dim)
    for (int row = 0; row < ROWS; ++row)
      for (int half = 0; half < 2; ++half) sums[row][half] += query[row * width + dim] * keys[2 * dim + half];
  keep<ROWS>(logits, BLOCK, sums);
}

// `ahead` are entries that are needed next.
template <int ROWS, class K, class V>
inline void add_values(const float* weights, const V* values, int64_t stride, int entries, float* out, int64_t width,
                       const K* ahead, int64_t ahead_stride) {
  Floats sums[ROWS][2];
  fetch<ROWS>(out, width, sums);
  for (int entry = 0; entry < entries; ++entry) {
    __builtin_prefetch(ahead + entry * ahead_stride);
    Floats value[2];
    get(values + entry * stride, value);
    for (int row = 0; row < ROWS; ++row)
      for (int half = 0; half < 2; ++half) sums[row][half] += weights[row * BLOCK + entry] * value[half];
  }
  keep<ROWS>(out, width, sums);
}

// Call work(first row, number of rows as a constant) for tiles of rows.
template <int ROWS = TILE, class Work>
inline void by_tiles(int begin, int end, Work work) {
  for (; begin + ROWS <= end; begin += ROWS) work(begin, std::integral_constant<int, ROWS>());
  if constexpr (ROWS > 1)
    if (begin < end) by_tiles<ROWS - 1>(begin, end, work);
}

// Logits of a block become weights; what was summed before shrinks to the new maximum (online softmax). Behind the
// entries a logit of -inf is a weight of 0, so that whole vectors can be taken.
inline void reweigh(float* logits, int entries, float* out, int64_t width, float& top, float& total) {
  const int padded = (entries + LANES - 1) / LANES * LANES;
  std::fill(logits + entries, logits + padded, -INFINITY);
  Floats largest = all(top);
  for (int i = 0; i < padded; i += LANES) {
    const Floats here = load(logits + i);
    largest = here > largest ? here : largest;
  }
  float most = top;
  for (int lane = 0; lane < LANES; ++lane) most = std::max(most, largest[lane]);
  if (most > top) {
    const float shrink = std::exp(top - most);
    for (int64_t i = 0; i < width; i += LANES) store(out + i, load(out + i) * shrink);
    total *= shrink;
    top = most;
  }
  Floats sum = all(0.0f);
  for (int i = 0; i < padded; i += LANES) {
    const Floats weight = exp_of(load(logits + i) - top);
    store(logits + i, weight);
    sum += weight;
  }
  for (int lane = 0; lane < LANES; ++lane) total += sum[lane];
}

// ---- the work of a thread

constexpr int MOST_ROWS = 64;  // query rows at once: their logits are on the stack

template <class K, class V = K>
class ByVectors {
  const Call& call;
  const int key_groups, value_groups;
  const int64_t query_width, width;
  int rows = 0, first = 0;  // of those that are attended with now; the first of them
  alignas(64) float logits[MOST_ROWS * BLOCK];

  void score(const Piece<K, V>& block, const float* query) {
    Floats keys[2 * GROUP];
    std::fill(logits, logits + rows * BLOCK, 0.0f);
    for (int i = 0; i < block.entries; i += GROUP) {
      const int here = std::min(GROUP, block.entries - i), later = here > LANES ? LANES : 0;
      for (int group = 0; group < key_groups; ++group) {
        const K* from = block.keys + i * block.key_stride + begin(group, call.dim);
        // Keys are turned so that a lane is an entry: the logits of a vector of entries are added up without a sum
        // across lanes, and are written side by side.
        columns(from, block.key_stride, here, keys);
        columns(from + later * block.key_stride, block.key_stride, here - later, keys + 1);
        const int64_t dim = begin(std::min(group, value_groups - 1), call.value_dim);
        const V* ahead = block.values + i * block.value_stride + dim;
        for (int j = 0; j < here; ++j) __builtin_prefetch(ahead + j * block.value_stride);
        by_tiles(0, rows, [&](int row, auto tile) {
          add_logits<tile>(query + row * query_width + group * GROUP, query_width, keys, logits + row * BLOCK + i);
        });
      }
    }
  }

  void mix(const Piece<K, V>& block, float* out) {
    for (int group = 0; group < value_groups; ++group) {
      const K* ahead = block.keys + BLOCK * block.key_stride + begin(std::min(group, key_groups - 1), call.dim);
      by_tiles(0, rows, [&](int row, auto tile) {
        add_values<tile>(logits + row * BLOCK, block.values + begin(group, call.value_dim), block.value_stride,
                         block.entries, out + row * width + group * GROUP, width, ahead, block.key_stride);
      });
    }
  }

 public:
  explicit ByVectors(const Call& call)
      : call(call), key_groups(groups(call.dim)), value_groups(groups(call.value_dim)),
        query_width(key_groups * GROUP), width(value_groups * GROUP) {}

  static int64_t query_size(const Call& call) { return int64_t(call.rows()) * groups(call.dim) * GROUP; }

  // Query rows of a head, scaled; 0 where a group overlaps with the one before it.
  void fetch_query(int head, float* to) const {
    for (int row = 0; row < call.rows(); ++row) {
      const K* from = call.query_row<K>(head, row);
      for (int group = 0; group < key_groups; ++group)
        for (int64_t dim = begin(group, call.dim), end = dim + GROUP; dim < end; ++dim)
          *to++ = dim < group * GROUP ? 0.0f : number(from[dim]) * float(call.scaling);
    }
  }

  // out [rows, width] is 0 before.
  void attend(const Piece<K, V>& piece, const float* query, float* out, float* tops, float* totals) {
    for (first = 0; first < call.rows(); first += MOST_ROWS) {
      rows = std::min(MOST_ROWS, call.rows() - first);
      attend_now(piece, query + first * query_width, out + first * width, tops + first, totals + first);
    }
  }

 private:
  void attend_now(const Piece<K, V>& piece, const float* query, float* out, float* tops, float* totals) {
    std::fill(tops, tops + rows, LOWEST);
    for (int at = 0; at < piece.entries; at += BLOCK) {
      const Piece<K, V> block = piece.part(at, BLOCK);
      score(block, query);
      for (int row = 0; row < rows; ++row) {
        float* own = logits + row * BLOCK;
        if (call.bias && block.biased >= 0) {
          const float* bias = call.bias_row(block.head, first + row) + block.biased;
          for (int i = 0; i < block.entries; ++i) own[i] += bias[i];
        }
        reweigh(own, block.entries, out + row * width, width, tops[row], totals[row]);
      }
      mix(block, out);
    }
  }
};

}  // namespace
