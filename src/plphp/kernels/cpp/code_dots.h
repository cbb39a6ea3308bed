// SPDX-License-Identifier: Apache-2.0
// Logits by AVX-512's sums of products of bytes (VNNI): codes of bit planes are small whole numbers, and queries are
// rounded to whole numbers of 16 bits, as two bytes each, so that all sums are exact. Where the steps that are part of
// the query change every few entries, this is cheaper than a table of what each byte adds.
#pragma once
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define PLPHP_CODE_DOTS
#include <immintrin.h>
#endif

#include <cstdint>
#include <cstring>

#include "bytes.h"
#include "coded_call.h"
#include "tables.h"

namespace {

template <int N>
class CodeDots {
  static constexpr int EIGHT = 8, HALVES = (N + EIGHT - 1) / EIGHT;
  static constexpr int TOGETHER = 8;      // entries, which keep the units busy
  static constexpr float MOST = 32639;    // 127 * 256 + 127
  static constexpr int CHANNELS = 4;      // channels in a word
  static constexpr int BLOCK = 64;        // codes in a vector
  const int dim, blocks;
  const bool able;
#ifdef PLPHP_CODE_DOTS
  __m512i* words = nullptr;  // [HALVES, dim / 4]: of eight queries the high bytes of four channels, and the low ones
  uint8_t* codes = nullptr;  // [TOGETHER, blocks * BLOCK]
  float scales[HALVES][EIGHT];
#endif

 public:
  CodeDots(int dim, bool rounds) : dim(dim), blocks((dim + BLOCK - 1) / BLOCK), able(rounds) {}

  bool can() const {
#ifdef PLPHP_CODE_DOTS
    return able;
#else
    return false;
#endif
  }

  template <class Take>
  void lay_out([[maybe_unused]] Take take) {
#ifdef PLPHP_CODE_DOTS
    take(words, HALVES * dim / CHANNELS);
    take(codes, TOGETHER * blocks * BLOCK);
#endif
  }

#ifdef PLPHP_CODE_DOTS
  // Queries [dim].
  void set(const Row<N>* query) {
    for (int half = 0; half < HALVES; ++half) {
      __m256 top = _mm256_setzero_ps(), spoiled = top;
      for (int i = 0; i < dim; ++i) {
        const __m256 own = eight(query[i], half);
        top = _mm256_max_ps(top, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), own));
        spoiled = _mm256_add_ps(spoiled, _mm256_mul_ps(own, _mm256_setzero_ps()));  // NaN where there is NaN or infinity
      }
      const __m256 scale = _mm256_mul_ps(top, _mm256_set1_ps(1 / MOST));
      const __m256 some = _mm256_cmp_ps(scale, _mm256_setzero_ps(), _CMP_GT_OQ);
      const __m256 inverse = _mm256_and_ps(some, _mm256_div_ps(_mm256_set1_ps(1), scale));
      _mm256_storeu_ps(scales[half], _mm256_add_ps(scale, spoiled));
      for (int at = 0; at < dim; at += CHANNELS) {
        __m256i high = _mm256_setzero_si256(), low = high;
        const __m256i byte = _mm256_set1_epi32(255);
        for (int i = 0; i < CHANNELS; ++i) {
          const __m256i number = _mm256_cvtps_epi32(_mm256_mul_ps(eight(query[at + i], half), inverse));
          const __m256i lower = _mm256_srai_epi32(_mm256_slli_epi32(number, 24), 24);  // from -128 to 127
          const __m256i upper = _mm256_srai_epi32(_mm256_sub_epi32(number, lower), 8);
          low = _mm256_or_si256(low, _mm256_slli_epi32(_mm256_and_si256(lower, byte), 8 * i));
          high = _mm256_or_si256(high, _mm256_slli_epi32(_mm256_and_si256(upper, byte), 8 * i));
        }
        words[(half * dim + at) / CHANNELS] = _mm512_inserti64x4(_mm512_castsi256_si512(low), high, 1);
      }
    }
  }

  // Products of the queries with the codes of entries first to before end, times `weight`, on top of `lowest`.
  template <int PLANES>
  void multiply(const Bytes* planes, int first, int end, Row<N> lowest, float weight, Row<N>* to) const {
    for (int from = first; from < end; from += TOGETHER) {
      const int count = std::min(TOGETHER, end - from);
      for (int i = 0; i < count; ++i) decode<PLANES>(planes, from + i, codes + i * blocks * BLOCK);
      for (int half = 0; half < HALVES; ++half) {
        __m512i sums[TOGETHER] = {};
        const __m512i* own = words + half * dim / CHANNELS;
        for (int at = 0; at < dim / CHANNELS; ++at)
          for (int i = 0; i < TOGETHER; ++i) {
            int32_t four;
            std::memcpy(&four, codes + i * blocks * BLOCK + at * CHANNELS, sizeof(four));
            sums[i] = _mm512_dpbusd_epi32(sums[i], _mm512_set1_epi32(four), own[at]);
          }
        const __m256 scale = _mm256_mul_ps(_mm256_loadu_ps(scales[half]), _mm256_set1_ps(weight));
        for (int i = 0; i < count; ++i) {
          const __m256i low = _mm512_castsi512_si256(sums[i]), high = _mm512_extracti64x4_epi64(sums[i], 1);
          const __m256 sum = _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32(high, 8), low));
          const __m256 result = _mm256_fmadd_ps(sum, scale, eight(lowest, half));
          std::memcpy((float*)(to + from + i) + half * EIGHT, &result, std::min<size_t>(sizeof(Row<N>), sizeof(result)));
        }
      }
    }
  }

 private:
  static __m256 eight(const Row<N>& row, int half) {
    __m256 result = _mm256_setzero_ps();
    std::memcpy(&result, (const float*)&row + half * EIGHT, std::min<size_t>(sizeof(row), sizeof(result)));
    return result;
  }

  template <int PLANES>
  void decode(const Bytes* planes, int entry, uint8_t* to) const {
    const int bytes = dim / BYTE;
    for (int block = 0; block < blocks; ++block) {
      __m512i own = _mm512_setzero_si512();
      for (int plane = 0; plane < PLANES; ++plane) {
        uint64_t bits = 0;
        const int left = std::min<int>(sizeof(bits), bytes - block * int(sizeof(bits)));
        const uint8_t* from = planes[plane][entry] + block * sizeof(bits);
        if (left == int(sizeof(bits))) std::memcpy(&bits, from, sizeof(bits));
        else std::memcpy(&bits, from, left);
        own = _mm512_or_si512(own, _mm512_maskz_mov_epi8(bits, _mm512_set1_epi8(1 << (PLANES - 1 - plane))));
      }
      _mm512_store_si512(to + block * BLOCK, own);
    }
  }
#endif
};

}  // namespace
