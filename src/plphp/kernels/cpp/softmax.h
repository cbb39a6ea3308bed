// SPDX-License-Identifier: Apache-2.0
// The softmax of N query rows side by side.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "tables.h"
#include "vectors.h"

namespace {

// Logits of so many entries become weights relative to the largest of each row. Whole vectors are taken: behind the
// entries, where there is room for one, a logit of -inf is a weight of 0.
template <int N>
inline void reweigh(Row<N>* logits, int count, Row<N>& top, Row<N>& total) {
  constexpr int WIDE = std::max(N, LANES), VECTORS = WIDE / LANES;  // floats of whole vectors and whole rows
  const int rows = WIDE / N, padded = (count + rows - 1) / rows * rows;
  std::fill(logits + count, logits + padded, Row<N>{} - INFINITY);
  float* const flat = (float*)logits;
  Floats tops[VECTORS], sums[VECTORS] = {};
  std::fill(tops, tops + VECTORS, all(LOWEST));
  for (int64_t at = 0; at < int64_t(padded) * N; at += WIDE)
    for (int i = 0; i < VECTORS; ++i) {
      const Floats here = load(flat + at + i * LANES);
      tops[i] = here > tops[i] ? here : tops[i];
    }
  top = Row<N>{} + LOWEST;
  for (int i = 0; i < rows; ++i) top = ((Row<N>*)tops)[i] > top ? ((Row<N>*)tops)[i] : top;
  for (int i = 0; i < rows; ++i) ((Row<N>*)tops)[i] = top;
  for (int64_t at = 0; at < int64_t(padded) * N; at += WIDE)
    for (int i = 0; i < VECTORS; ++i) {
      const Floats weight = exp_of(load(flat + at + i * LANES) - tops[i]);
      store(flat + at + i * LANES, weight);
      sums[i] += weight;
    }
  total = Row<N>{};
  for (int i = 0; i < rows; ++i) total += ((Row<N>*)sums)[i];
}

}  // namespace
