// SPDX-License-Identifier: Apache-2.0
// The entries with the largest mass.
#pragma once
#include <algorithm>
#include <cstdint>

#include "tables.h"

namespace {

// The mass of what is no number: more than any other, so that it is chosen first, as it is by the order of torch.
constexpr int32_t NO_NUMBER = 0x7f800001;

// Where a choice ends: what has more mass than `mass` is chosen, and what has as much before entry `end`. Masses are the
// bits of floats from 0 on, which are in the order of the floats, up to NO_NUMBER.
struct Choice {
  int32_t mass;
  int end;
  int has(int32_t own, int entry) const { return (own > mass) | ((own == mass) & (entry < end)); }  // no branches
};

inline int count_above(const int32_t* masses, int held, int32_t mass) {
  int count = 0;
  for (int i = 0; i < held; ++i) count += masses[i] > mass;
  return count;
}

// The `wanted` largest of `held` masses, at least 1 and fewer than held; of equal ones the first. By halving: a look at
// all masses takes less than putting them in order.
inline Choice choose(const int32_t* masses, int held, int wanted) {
  int32_t most = 0;
  for (int i = 0; i < held; ++i) most = std::max(most, masses[i]);
  // More than `wanted` are above `low`, and no more than that above `high`.
  int32_t low = -1, high = most;
  int above = 0;
  while (high - low > 1 && above < wanted) {
    const int32_t middle = low + (high - low) / 2;
    const int count = count_above(masses, held, middle);
    if (count <= wanted) above = count;
    (count <= wanted ? high : low) = middle;
  }
  int end = 0;
  for (int equal = wanted - above; equal > 0; ++end) equal -= masses[end] == high;
  return {high, end};
}

// The sums over the lanes of N rows.
template <int N, int COUNT, int... LANE>
inline void fold(Row<N>* rows, std::integer_sequence<int, LANE...> lanes) {
  for (int i = 0; i < COUNT; ++i)
    rows[i] = __builtin_shufflevector(rows[2 * i], rows[2 * i + 1], (2 * LANE)...) +
              __builtin_shufflevector(rows[2 * i], rows[2 * i + 1], (2 * LANE + 1)...);
  if constexpr (COUNT > 1) fold<N, COUNT / 2>(rows, lanes);
}

// Of every entry the mean of its weights, each over the total of its row: `shares` are one over these, and 0 for a lane
// that is no row. Whole vectors are taken, from weights and to masses.
template <int N>
inline void weigh(const Row<N>* weights, int held, Row<N> shares, int32_t* masses) {
  typedef int32_t Bits __attribute__((vector_size(4 * N)));
  for (int i = 0; i < held; i += N) {
    Row<N> rows[N];
    for (int j = 0; j < N; ++j) rows[j] = weights[i + j] * shares;
    fold<N, N / 2>(rows, std::make_integer_sequence<int, N>());
    *(Bits*)(masses + i) = (Bits)rows[0] & 0x7fffffff;  // NaN may have a sign, and any payload
    for (int j = i; j < i + N; ++j) masses[j] = std::min(masses[j], NO_NUMBER);
  }
}

}  // namespace
