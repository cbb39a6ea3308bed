// SPDX-License-Identifier: Apache-2.0
// Logits by AVX-512's sums of products of bytes (VNNI): codes of bit planes are small whole numbers, and queries become
// whole numbers of 24 bits, as three bytes each, which is what a float32 holds: the sums are exact. Where the steps that
// are part of the query change every few entries, this is cheaper than a table of what each byte adds.
#pragma once
#if defined(__AVX512VNNI__) && defined(__AVX512BW__) && defined(__AVX512VL__)
#define PLPHP_CODE_DOTS
#include <immintrin.h>
#endif

#include <algorithm>
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
  static constexpr float MOST = 8355000;  // below 127 * (65536 + 256 + 1) by more than rounding adds
  static constexpr int CHANNELS = 4;      // channels in a word
  static constexpr int BLOCK = 64;        // codes in a vector
  const int dim, blocks;
  const bool able;
#ifdef PLPHP_CODE_DOTS
  __m512i* lower = nullptr;  // [HALVES, dim / 4]: of eight queries the lowest bytes of four channels, and the middle ones
  __m256i* upper = nullptr;  // [HALVES, dim / 4]: the highest bytes
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
    take(lower, HALVES * dim / CHANNELS);
    take(upper, HALVES * dim / CHANNELS);
    take(codes, TOGETHER * blocks * BLOCK);
#endif
  }

#ifdef PLPHP_CODE_DOTS
  // Queries [dim]. What is no number makes `lowest` in multiply none, and may become any whole number here.
  void set(const Row<N>* query) {
    for (int half = 0; half < HALVES; ++half) {
      __m256 top = _mm256_setzero_ps();
      for (int i = 0; i < dim; ++i)
        top = _mm256_max_ps(top, _mm256_andnot_ps(_mm256_set1_ps(-0.0f), eight(query[i], half)));
      const __m256 scale = _mm256_mul_ps(top, _mm256_set1_ps(1 / MOST));
      const __m256 some = _mm256_cmp_ps(scale, _mm256_setzero_ps(), _CMP_GT_OQ);
      const __m256 inverse = _mm256_and_ps(some, _mm256_div_ps(_mm256_set1_ps(1), scale));
      _mm256_storeu_ps(scales[half], scale);
      for (int at = 0; at < dim; at += CHANNELS) {
        __m256i bytes[3] = {};
        for (int i = 0; i < CHANNELS; ++i) {
          __m256i number = _mm256_cvtps_epi32(_mm256_mul_ps(eight(query[at + i], half), inverse));
          for (__m256i& to : bytes) {
            const __m256i lowest = _mm256_srai_epi32(_mm256_slli_epi32(number, 24), 24);  // from -128 to 127
            number = _mm256_srai_epi32(_mm256_sub_epi32(number, lowest), 8);
            to = _mm256_or_si256(to, _mm256_slli_epi32(_mm256_and_si256(lowest, _mm256_set1_epi32(255)), 8 * i));
          }
        }
        const int word = (half * dim + at) / CHANNELS;
        lower[word] = _mm512_inserti64x4(_mm512_castsi256_si512(bytes[0]), bytes[1], 1);
        upper[word] = bytes[2];
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
        __m512i low_sums[TOGETHER] = {};
        __m256i high_sums[TOGETHER] = {};
        for (int at = 0; at < dim / CHANNELS; ++at)
          for (int i = 0; i < TOGETHER; ++i) {
            int32_t four;
            std::memcpy(&four, codes + i * blocks * BLOCK + at * CHANNELS, sizeof(four));
            const __m512i own = _mm512_set1_epi32(four);
            const int word = half * dim / CHANNELS + at;
            low_sums[i] = _mm512_dpbusd_epi32(low_sums[i], own, lower[word]);
            high_sums[i] = _mm256_dpbusd_epi32(high_sums[i], _mm512_castsi512_si256(own), upper[word]);
          }
        const __m256 scale = _mm256_mul_ps(_mm256_loadu_ps(scales[half]), _mm256_set1_ps(weight));
        for (int i = 0; i < count; ++i) {
          const __m256i low = _mm512_castsi512_si256(low_sums[i]), middle = _mm512_extracti64x4_epi64(low_sums[i], 1);
          const __m256 rest = _mm256_cvtepi32_ps(_mm256_add_epi32(_mm256_slli_epi32(middle, 8), low));
          const __m256 sum = _mm256_fmadd_ps(_mm256_cvtepi32_ps(high_sums[i]), _mm256_set1_ps(65536), rest);
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
