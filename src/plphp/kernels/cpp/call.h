// SPDX-License-Identifier: Apache-2.0
// What is asked of decode.cpp, and how its work is cut.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

// As _decode_cpp.py fills it, which has the same fields in the same order. Strides are those of batch, head and
// position, in numbers; dims are contiguous.
struct Call {
  const void *query, *prefix_keys, *prefix_values, *tail_keys, *tail_values;
  const int64_t* index;  // [2, batch, kv_heads]: first entry and number of entries in the prefix
  const float* bias;     // over the tail, or null
  void* out;             // [batch, length, q_heads, value_dim]
  float* lse;            // [batch, q_heads, length], or null
  int64_t batch, kv_heads, group, length, dim, value_dim, tail;
  int64_t query_strides[3], key_strides[3], value_strides[3], bias_strides[3];
  int64_t threads;
  double scaling;

  // Heads are the KV heads of all rows of the batch, one after the other; rows are the query rows of one of them.
  int heads() const { return int(batch * kv_heads); }
  int rows() const { return int(group * length); }
  int64_t batch_row(int head) const { return head / kv_heads; }
  int64_t kv_head(int head) const { return head % kv_heads; }
  int64_t q_head(int head, int row) const { return kv_head(head) * group + row / length; }

  template <class T>
  const T* query_row(int head, int row) const {
    return (const T*)query + batch_row(head) * query_strides[0] + q_head(head, row) * query_strides[1] +
           row % length * query_strides[2];
  }
  template <class T>
  T* out_row(int head, int row) const {
    return (T*)out + ((batch_row(head) * length + row % length) * kv_heads * group + q_head(head, row)) * value_dim;
  }
  float* lse_of(int head, int row) const { return lse + head * group * length + row; }
  const float* bias_row(int head, int row) const {
    return bias + batch_row(head) * bias_strides[0] + q_head(head, row) * bias_strides[1] +
           row % length * bias_strides[2];
  }
};

// Some entries of a head, of its prefix or its tail, never of both: keys are stored as K, values as V.
template <class K, class V = K>
struct Piece {
  const K* keys;
  const V* values;
  int64_t key_stride, value_stride;
  int head;
  int64_t biased;  // place of the first entry in the tail; -1 in the prefix
  int entries;

  // Up to `size` entries from `at` on.
  Piece part(int64_t at, int64_t size) const {
    Piece result = *this;
    result.keys += at * key_stride;
    result.values += at * value_stride;
    result.biased += biased < 0 ? 0 : at;
    result.entries = int(std::min(size, entries - at));
    return result;
  }
};

// Pieces of all heads, and the first of each head. Several for each thread, so that none waits long for the last; but
// large pieces, as each has to be merged.
template <class K, class V>
std::vector<Piece<K, V>> pieces_of(const Call& call, int64_t block, std::vector<size_t>& first) {
  const int heads = call.heads();
  const int64_t *starts = call.index, *counts = call.index + heads;
  int64_t entries = heads * call.tail;
  for (int head = 0; head < heads; ++head) entries += counts[head];
  const int64_t size = std::max<int64_t>(4, entries / (8 * call.threads * block) + 1) * block;
  std::vector<Piece<K, V>> pieces;
  const auto cut = [&](const Piece<K, V>& whole) {
    for (int64_t at = 0; at < whole.entries; at += size) pieces.push_back(whole.part(at, size));
  };
  for (int head = 0; head < heads; ++head) {
    first.push_back(pieces.size());
    const int64_t row = call.batch_row(head), own = call.kv_head(head);
    cut({(const K*)call.prefix_keys + starts[head] * call.dim,
         (const V*)call.prefix_values + starts[head] * call.value_dim, call.dim, call.value_dim, head, -1,
         int(counts[head])});
    cut({(const K*)call.tail_keys + row * call.key_strides[0] + own * call.key_strides[1],
         (const V*)call.tail_values + row * call.value_strides[0] + own * call.value_strides[1], call.key_strides[2],
         call.value_strides[2], head, 0, int(call.tail)});
  }
  first.push_back(pieces.size());
  return pieces;
}

}  // namespace
