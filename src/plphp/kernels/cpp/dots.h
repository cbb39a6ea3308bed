// SPDX-License-Identifier: Apache-2.0
// Bit planes of values by AVX-512's products of pairs of bf16: two entries are decoded side by side, in registers, and
// weighed for several query rows at once. Weights are rounded to bf16, as they are for AMX; codes are exact in it.
#pragma once
#include <immintrin.h>

#include <algorithm>
#include <cstdint>
#include <cstring>

#include "bytes.h"
#include "coded_call.h"
#include "tables.h"

namespace {

constexpr int PAIRS = 32;             // pairs of entries whose weights are made ready at once

// Weights of pairs of entries, [pairs, 16 query rows], two bf16 in a word.
struct Weights {
  alignas(64) uint32_t of_pairs[PAIRS][16];
};

// Those of entries from `first` on, times their scales; 0 behind the last.
template <int N>
inline void pair_up(const Row<N>* weights, int first, int count, const uint16_t* scales, const Bytes& order,
                    Weights& to) {
  for (int pair = 0; pair < PAIRS; ++pair) {
    Row<N> own[2] = {};
    for (int i = 0; i < 2; ++i) {
      const int entry = first + 2 * pair + i;
      if (entry >= count) continue;
      own[i] = weights[entry] * half_number(scales[order.entry(entry)]);
    }
    for (int lane = 0; lane < N; lane += 8) {
      __m256 low, high;
      std::memcpy(&low, (float*)&own[0] + lane, N < 8 ? sizeof(own[0]) : sizeof(low));
      std::memcpy(&high, (float*)&own[1] + lane, N < 8 ? sizeof(own[1]) : sizeof(high));
      const __m256i first_of = _mm256_cvtepu16_epi32((__m128i)_mm256_cvtneps_pbh(low)),
                    second_of = _mm256_cvtepu16_epi32((__m128i)_mm256_cvtneps_pbh(high));
      _mm256_store_si256((__m256i*)&to.of_pairs[pair][lane],
                         _mm256_or_si256(first_of, _mm256_slli_epi32(second_of, 16)));
    }
  }
}

// What bit planes stand for: the distance of the codes from their middle.
template <int PLANES>
struct OfPlanes {
  Bytes bytes[PLANES];
  __m512i numbers;  // of each code, in bf16

  explicit OfPlanes(const Bytes* from) {
    std::copy(from, from + PLANES, bytes);
    alignas(64) uint16_t own[32] = {};
    for (int code = 0; code < 1 << PLANES; ++code) {
      const float number = float(code) - (float(1 << (PLANES - 1)) - 0.5f);
      uint32_t bits;
      std::memcpy(&bits, &number, sizeof(bits));
      own[code] = uint16_t(bits >> 16);  // exact
    }
    numbers = _mm512_load_si512(own);
  }

  template <int VECTORS>
  void decode(int channel, int first, int second, __m512i (&to)[VECTORS]) const {
    for (int i = 0; i < VECTORS; i += 2) {
      __m512i low = _mm512_setzero_si512(), high = low;
      for (int plane = 0; plane < PLANES; ++plane) {
        uint32_t own[2];
        std::memcpy(&own[0], bytes[plane][first] + channel / BYTE + 2 * i, 4);
        std::memcpy(&own[1], bytes[plane][second] + channel / BYTE + 2 * i, 4);
        const uint64_t both = _pdep_u64(own[0], 0x5555555555555555) | _pdep_u64(own[1], 0xaaaaaaaaaaaaaaaa);
        const __m512i bit = _mm512_set1_epi16(1 << (PLANES - 1 - plane));
        low = _mm512_or_si512(low, _mm512_maskz_mov_epi16(__mmask32(both), bit));
        high = _mm512_or_si512(high, _mm512_maskz_mov_epi16(__mmask32(both >> 32), bit));
      }
      to[i] = _mm512_permutexvar_epi16(low, numbers);
      to[i + 1] = _mm512_permutexvar_epi16(high, numbers);
    }
  }
};

// Entries from `first` on are added to sums [rows, width], for ROWS rows from `row` on.
template <int ROWS, int VECTORS, class Values>
inline void add_pairs(const Values& values, const Weights& weights, int first, int count, int channel, int row,
                      float* sums, int width) {
  __m512 own[ROWS][VECTORS];
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) own[i][j] = _mm512_loadu_ps(sums + (row + i) * width + channel + 16 * j);
  for (int pair = 0; pair < PAIRS && first + 2 * pair < count; ++pair) {
    const int entry = first + 2 * pair;
    __m512i decoded[VECTORS];
    values.template decode<VECTORS>(channel, entry, std::min(entry + 1, count - 1), decoded);
    for (int i = 0; i < ROWS; ++i) {
      const __m512i weight = _mm512_set1_epi32(int(weights.of_pairs[pair][row + i]));
      for (int j = 0; j < VECTORS; ++j)
        own[i][j] = _mm512_dpbf16_ps(own[i][j], (__m512bh)weight, (__m512bh)decoded[j]);
    }
  }
  for (int i = 0; i < ROWS; ++i)
    for (int j = 0; j < VECTORS; ++j) _mm512_storeu_ps(sums + (row + i) * width + channel + 16 * j, own[i][j]);
}

template <int VECTORS, class Values>
inline void add_rows(const Values& values, const Weights& weights, int first, int count, int channel, int rows,
                     float* sums, int width) {
  for (int row = 0; row < rows;) {
    const int left = rows - row;
    const auto add = [&](auto constant) {
      add_pairs<constant, VECTORS>(values, weights, first, count, channel, row, sums, width);
      row += constant;
    };
    // Seven rows of four vectors are what fits into registers; two times four go before seven and one.
    if (left == 7 || left > 8) add(std::integral_constant<int, 7>());
    else if (left >= 4) add(std::integral_constant<int, 4>());
    else add(std::integral_constant<int, 1>());
  }
}

// Values of `count` entries, weighed, are added to sums [rows, width]; width is a multiple of 32.
template <int N, class Values>
inline void add_dots(const Values& values, const Row<N>* own, int count, const uint16_t* scales, int rows, float* sums,
                     int width) {
  Weights weights;
  for (int first = 0; first < count; first += 2 * PAIRS) {
    pair_up<N>(own, first, count, scales, values.bytes[0], weights);
    int channel = 0;
    for (; channel + 64 <= width; channel += 64) add_rows<4>(values, weights, first, count, channel, rows, sums, width);
    if (channel < width) add_rows<2>(values, weights, first, count, channel, rows, sums, width);
  }
}

}  // namespace
