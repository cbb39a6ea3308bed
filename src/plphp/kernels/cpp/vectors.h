// SPDX-License-Identifier: Apache-2.0
// Vectors as wide as the machine has them, and what keys and values are stored as; in the notation that gcc and clang
// share.
#pragma once
#if defined(__GNUC__) && !defined(__clang__) && __GNUC__ < 12
#error "plphp needs g++ 12 or newer: install one, or name one with CXX"
#endif
#include <algorithm>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <utility>

namespace {

// LANES floats fill a vector, and the sums of TILE query rows, two vectors each, stay in registers: AVX-512 has 32 of
// them, AVX 16.
#if defined(__AVX512F__)
constexpr int LANES = 16, TILE = 8;
#elif defined(__AVX__)
constexpr int LANES = 8, TILE = 4;
#else
constexpr int LANES = 4, TILE = 8;
#endif
constexpr int GROUP = 2 * LANES;  // dims that are worked on together, and entries

typedef float Floats __attribute__((vector_size(4 * LANES)));
typedef int32_t Words __attribute__((vector_size(4 * LANES)));
typedef Floats AnyFloats __attribute__((aligned(2), may_alias));
typedef Words AnyWords __attribute__((aligned(2), may_alias));

inline Floats all(float x) { return x - Floats{}; }
inline Floats load(const float* from) { return *reinterpret_cast<const AnyFloats*>(from); }
inline void store(float* to, Floats x) { *reinterpret_cast<AnyFloats*>(to) = x; }
inline Words words(const void* from) { return *reinterpret_cast<const AnyWords*>(from); }

// e to the x <= 0; 0 below -87, where normal floats end. Cody and Waite's reduction x = whole * ln 2 + rest, then a
// polynomial in rest, and `whole` as the exponent of a float. NaN is not below, and stays NaN.
inline Floats exp_of(Floats x) {
  const Floats lowest = all(-87.0f), rounder = all(12582912.0f);  // 1.5 * 2^23: adding it rounds to whole numbers
  const Words tiny = x < lowest;
  x = tiny ? lowest : x;
  const Floats whole = (x * 1.44269504f + rounder) - rounder;
  const Floats rest = x - whole * 0.693359375f + whole * 2.12194440e-4f;  // ln 2 in two parts
  Floats sum = rest * (1.0f / 5040) + 1.0f / 720;
  sum = sum * rest + 1.0f / 120;
  sum = sum * rest + 1.0f / 24;
  sum = sum * rest + 1.0f / 6;
  sum = sum * rest + 0.5f;
  sum = sum * rest * rest + rest + 1.0f;
  const Floats exponent = whole > all(-126.0f) ? whole : all(-126.0f);  // of NaN as well: the sum is NaN by itself
  const Words power = (__builtin_convertvector(exponent, Words) + 127) << 23;
  return tiny ? all(0.0f) : sum * (Floats)power;
}

// Squares of STEP x STEP words change places across the diagonal, in pairs of rows. Halving STEP down to 1 transposes.
template <int STEP, int... LANE>
inline void exchange(Words (&rows)[LANES], std::integer_sequence<int, LANE...> lanes) {
  for (int i = 0; i < LANES; ++i) {
    if (i & STEP) continue;
    const Words upper = rows[i], lower = rows[i + STEP];
    rows[i] = __builtin_shufflevector(upper, lower, (LANE & STEP ? LANES + LANE - STEP : LANE)...);
    rows[i + STEP] = __builtin_shufflevector(upper, lower, (LANE & STEP ? LANES + LANE : LANE + STEP)...);
  }
  if constexpr (STEP > 1) exchange<STEP / 2>(rows, lanes);
}

inline void transpose(Words (&rows)[LANES]) {
  exchange<LANES / 2>(rows, std::make_integer_sequence<int, LANES>());
}

// ---- what keys and values are stored as. A GROUP of dims is two vectors: its halves, or its even and its odd dims.

struct bf16 {
  uint16_t bits;
};

inline float number(float x) { return x; }
inline float number(bf16 x) {
  union { uint32_t bits; float value; } wide{uint32_t(x.bits) << 16};
  return wide.value;
}

// Two bf16 lie in a word, the first of them in its lower half.
constexpr int32_t UPPER = int32_t(0xffff0000);
inline Floats first_of(Words pairs) { return (Floats)(pairs << 16); }
inline Floats second_of(Words pairs) { return (Floats)(pairs & UPPER); }

inline void get(const float* from, Floats (&group)[2]) {
  group[0] = load(from);
  group[1] = load(from + LANES);
}
inline void get(const bf16* from, Floats (&group)[2]) {
  const Words pairs = words(from);
  group[0] = first_of(pairs);
  group[1] = second_of(pairs);
}

inline void put(float* to, const Floats (&group)[2]) {
  store(to, group[0]);
  store(to + LANES, group[1]);
}
inline Words rounded(Floats x) {  // to bf16 in the upper halves: the nearest, ties to even
  const Words bits = (Words)x;
  return x != x ? Words{} + 0x7fc00000 : bits + 0x7fff + (bits >> 16 & 1);
}
inline void put(bf16* to, const Floats (&group)[2]) {
  *reinterpret_cast<AnyWords*>(to) = (rounded(group[0]) >> 16 & 0xffff) | (rounded(group[1]) & UPPER);
}

// A GROUP of sums over values that are stored as V, to an output in K.
template <class V, class K>
inline void put_sums(K* to, const Floats (&group)[2]) {
  if constexpr (std::is_same_v<K, V>) {
    put(to, group);
  } else {  // sums over bf16 are those of even and of odd dims
    for (int lane = 0; lane < LANES; ++lane)
      for (int odd = 0; odd < 2; ++odd) to[2 * lane + odd] = group[odd][lane];
  }
}

// A GROUP of dims of LANES entries, to[2 * dim]: one entry a lane. The last entry is taken again where there are fewer.
inline void columns(const float* from, int64_t stride, int entries, Floats* to) {
  for (int half = 0; half < 2; ++half) {
    Words rows[LANES];
    const float* row = from + half * LANES;
    for (int i = 0; i < LANES; ++i, row += i < entries ? stride : 0) rows[i] = words(row);
    transpose(rows);
    for (int i = 0; i < LANES; ++i) to[2 * (half * LANES + i)] = (Floats)rows[i];
  }
}
inline void columns(const bf16* from, int64_t stride, int entries, Floats* to) {
  Words rows[LANES];
  for (int i = 0; i < LANES; ++i, from += i < entries ? stride : 0) rows[i] = words(from);
  transpose(rows);
  for (int i = 0; i < LANES; ++i) {
    to[4 * i] = first_of(rows[i]);
    to[4 * i + 2] = second_of(rows[i]);
  }
}

// Groups cover the dims; the last of them overlaps with the one before it where it has to.
inline int groups(int64_t dim) { return int((dim + GROUP - 1) / GROUP); }
inline int64_t begin(int group, int64_t dim) { return std::min<int64_t>(group * GROUP, dim - GROUP); }

constexpr int BLOCK = 128;  // entries whose logits are held at once

constexpr float LOWEST = std::numeric_limits<float>::lowest();  // where maxima begin: -inf - -inf would be no number

}  // namespace
