// SPDX-License-Identifier: Apache-2.0
// What is asked of coded.cpp, and how its work is cut.
#pragma once
#include <algorithm>
#include <cstdint>
#include <vector>

namespace {

struct Unit;
constexpr int BOOKS = 3;    // codebooks of a side: fine, residual, coarse
constexpr int STREAMS = 8;  // most streams of a codec
constexpr int MOST_TIERS = 16;
constexpr int CENTROIDS = 256, BYTE = 8;
enum Kind { CENTRED, CHANNEL, TOKEN, KINDS };  // see codecs.py: Centred, and Affine by its axis

// Keys or values of a tier. As _coded_cpp.py fills it, which has the same fields in the same order; so are those below.
struct Side {
  const uint8_t* streams[STREAMS];  // first numbers of centroids, then bit planes from the highest down
  const uint16_t* scales;           // float16 [entries, scales of an entry], or null
  const uint16_t* groups;           // float16 [groups, 2, dim]: lowest numbers and steps, or null
  int64_t kind, books, planes;
  int64_t book[BOOKS];  // the codebook of each of the first streams
  int64_t group;        // entries that share a group, or channels of an entry that share a scale
};

struct Tier {
  Side keys, values;
  const int64_t *starts, *counts, *group_starts;  // [batch * kv_heads]: entries of a head, and its first group of either side
};

struct Call {
  const void* query;  // [batch, q_heads, length, dim]; strides are those of the first three axes, in numbers
  void* out;          // [batch, q_heads, length, value_dim]
  float* lse;         // [batch, q_heads, length]
  // Attention over more keys, which the result is merged with, or null.
  const void* more;       // [batch, q_heads, length, value_dim], see more_strides
  const float* more_lse;  // [batch, q_heads, length]
  const Tier* tiers;
  const uint16_t *key_means, *value_means, *rest_values;  // float16 [pairs, dim], or null
  const uint16_t *key_books[BOOKS], *value_books[BOOKS];  // float16 [kv_heads, parts, 256, channels], or null
  const int64_t* pairs;  // [batch * kv_heads]: of each head its row in the means
  const int64_t* reads;  // [batch * kv_heads]: entries that a query reads; -1 for all, without a look at the index
  const int64_t* rests;  // [batch]: whether what is not read stands in
  int64_t tier_count, batch, kv_heads, group, length, dim, value_dim;
  int64_t query_strides[3], more_strides[3];
  int64_t threads;
  double scaling;

  // Heads are the KV heads of all rows of the batch, one after the other; rows are the query rows of one of them.
  int heads() const { return int(batch * kv_heads); }
  int64_t kv_head(int head) const { return head % kv_heads; }
  int64_t place(const int64_t (&strides)[3], int head, int64_t row) const {
    return head / kv_heads * strides[0] + (kv_head(head) * group + row / length) * strides[1] +
           row % length * strides[2];
  }
  // Of a query row of a unit among those of the result.
  inline int64_t out_at(const Unit& unit, int lane) const;

  int64_t held(int head) const {
    int64_t sum = 0;
    for (int tier = 0; tier < tier_count; ++tier) sum += tiers[tier].counts[head];
    return sum;
  }
};

// Query rows of a head: `rows` from `first` on, one every `step`; and some of the entries of all its tiers, numbered
// tier after tier.
struct Unit {
  int head, rows;
  int64_t first, step, from, to;
};

inline int64_t Call::out_at(const Unit& unit, int lane) const {
  return unit.head * group * length + unit.first + lane * unit.step;
}

constexpr int64_t LEAST = 1024, MOST = 8192;  // entries of a unit: tables have to pay, and logits to stay in caches

// Units of all heads, those of the same rows behind each other. A query that chooses what it reads has a unit to itself
// with all heads that choose together; others share one as far as there are lanes.
inline std::vector<Unit> units_of(const Call& call, int lanes) {
  std::vector<Unit> units;
  const int64_t all_rows = call.group * call.length;
  int64_t work = 0;
  for (int head = 0; head < call.heads(); ++head) work += call.held(head);
  work *= (all_rows + lanes - 1) / lanes;
  const int64_t size = std::clamp(work / (4 * call.threads) + 1, LEAST, MOST);
  for (int head = 0; head < call.heads(); ++head) {
    const int64_t held = call.held(head);
    if (call.reads[head] >= 0) {
      for (int64_t at = 0; at < call.length; ++at)
        units.push_back({head, int(call.group), at, call.length, 0, held});
      continue;
    }
    const int64_t pieces = std::max<int64_t>(1, (held + size - 1) / size);
    for (int64_t row = 0; row < all_rows; row += lanes)
      for (int64_t piece = 0; piece < pieces; ++piece)
        units.push_back({head, int(std::min<int64_t>(lanes, all_rows - row)), row, 1, held * piece / pieces,
                         held * (piece + 1) / pieces});
  }
  return units;
}

inline bool same_rows(const Unit& a, const Unit& b) { return a.head == b.head && a.first == b.first; }

}  // namespace
