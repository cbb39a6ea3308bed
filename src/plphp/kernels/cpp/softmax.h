// SPDX-License-Identifier: Apache-2.0
// The softmax of N query rows side by side.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>
#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include "tables.h"
#include "vectors.h"

namespace {

// e to the x <= 0, as `exp_of` gives it, in half the time.
inline Floats weight_of(Floats x) {
#ifdef __AVX512F__
  // 2 to whole and rest: a polynomial in the rest, whose largest relative error is 7e-8.
  const __m512 e = _mm512_set1_ps(1.44269504f), own = (__m512)x;
  const __mmask16 normal = _mm512_cmp_ps_mask(own, _mm512_set1_ps(-87.0f), _CMP_NLT_UQ);
  const __m512 whole = _mm512_roundscale_ps(_mm512_mul_ps(own, e), 0), rest = _mm512_fmsub_ps(own, e, whole);
  __m512 sum = _mm512_set1_ps(1.3276466634e-3f);
  for (float term : {9.675540961e-3f, 5.550713465e-2f, 0.2402212024f, 0.6931469440f, 1.0f})
    sum = _mm512_fmadd_ps(sum, rest, _mm512_set1_ps(term));
  return (Floats)_mm512_maskz_scalef_ps(normal, sum, whole);
#else
  return exp_of(x);
#endif
}

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
      const Floats weight = weight_of(load(flat + at + i * LANES) - tops[i]);
      store(flat + at + i * LANES, weight);
      sums[i] += weight;
    }
  total = Row<N>{};
  for (int i = 0; i < rows; ++i) total += ((Row<N>*)sums)[i];
}

}  // namespace
