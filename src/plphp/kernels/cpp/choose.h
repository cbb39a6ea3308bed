// SPDX-License-Identifier: Apache-2.0
// The entries with the largest mass.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <utility>

namespace {

// Where a choice ends: what has more mass than `mass` is chosen, and what has as much up to entry `last`. Masses are the
// bits of floats from 0 on, which are in the order of the floats.
struct Choice {
  uint32_t mass;
  int32_t last;
  bool has(uint32_t own, int32_t entry) const { return own > mass || (own == mass && entry <= last); }
};

// The `wanted` of `held` masses, at least 1 and fewer than held; of equal ones the first. `candidates` has room for all.
inline Choice choose(const uint32_t* masses, int held, int wanted, std::pair<uint32_t, int32_t>* candidates) {
  constexpr int SHIFT = 20, BINS = 1 << (31 - SHIFT);
  int32_t counts[BINS];
  std::memset(counts, 0, sizeof(counts));
  for (int i = 0; i < held; ++i) ++counts[masses[i] >> SHIFT & (BINS - 1)];
  int bin = BINS - 1;
  for (; wanted > counts[bin]; --bin) wanted -= counts[bin];
  int found = 0;
  for (int i = 0; i < held; ++i) {
    candidates[found] = {masses[i], -i};
    found += int(masses[i] >> SHIFT & (BINS - 1)) == bin;
  }
  std::nth_element(candidates, candidates + wanted - 1, candidates + found, std::greater<>());
  return {candidates[wanted - 1].first, -candidates[wanted - 1].second};
}

}  // namespace
