// SPDX-License-Identifier: Apache-2.0
// A piece in bf16 by AMX, the matrix unit of Intel's server processors since 2023, whose tiles of 16 x 16 words take
// all query rows of a KV head at once.
#pragma once
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <algorithm>
#include <cmath>
#include <cstring>
#include <utility>

#include "call.h"
#include "vectors.h"

namespace {

typedef uint16_t Halves __attribute__((vector_size(4 * LANES)));
typedef Halves AnyHalves __attribute__((aligned(2), may_alias));

// Two rows of a GROUP of values, number by number: four of every eight dims, or (OFFSET 4) the other four.
template <int OFFSET, int... PLACE>
inline Words interleaved(Halves first, Halves second, std::integer_sequence<int, PLACE...>) {
  return (Words)__builtin_shufflevector(first, second,
                                        (PLACE / 8 * 8 + PLACE % 8 / 2 + OFFSET + PLACE % 2 * GROUP)...);
}

// What `interleaved` made of the dims, as `put` takes them: the even and the odd ones.
inline void unmix(Floats low, Floats high, Floats (&group)[2]) {
  group[0] = __builtin_shufflevector(low, high, 0, 2, 16, 18, 4, 6, 20, 22, 8, 10, 24, 26, 12, 14, 28, 30);
  group[1] = __builtin_shufflevector(low, high, 1, 3, 17, 19, 5, 7, 21, 23, 9, 11, 25, 27, 13, 15, 29, 31);
}

// Words of two bf16 each.
inline Words pairs_of(Floats first, Floats second) {
  return (rounded(first) >> 16 & 0xffff) | (rounded(second) & UPPER);
}

// A barrier for the compiler, not for the processor, which keeps the order of a thread's own loads and stores. To gcc
// _tile_loadd and _tile_loadconfig are assembly that reads no memory (or eight bytes of it), so that it may move a
// store to logits, weights or values behind the load that needs it or before the load of what was there, or leave it
// out as never read. Hence a barrier between plain stores and tile loads of the same place, each time, in either order.
// _tile_stored is known to write memory, and is a barrier itself.
inline void barrier() { asm volatile("" ::: "memory"); }

class ByAmx {
  static constexpr int ROWS = 16, BYTES = 64;  // of a tile; rows are entries, pairs of dims, or query rows
  static constexpr int WIDEST = 256;

  const Call& call;
  const int key_groups, value_groups;
  int rows = 0, first = 0;                          // of those that are attended with now; the first of them
  alignas(64) Floats logits[BLOCK];                 // of an entry, one query row a lane
  alignas(64) Words weights[BLOCK / GROUP][ROWS];   // of a query row, two entries a lane
  alignas(64) Words values[2][ROWS];                // of two entries, one dim a lane
  alignas(64) Floats sums[WIDEST / LANES][ROWS];    // [half group][query row]: dims as `interleaved` puts them
  alignas(64) bf16 rest[ROWS][WIDEST];
  alignas(64) bf16 zeros[GROUP] = {};

  void score(const Piece<bf16>& block, const Words* query) {
    const int whole = block.entries / ROWS * ROWS;
    for (int i = whole; i < block.entries; ++i)  // a tile is read as a whole
      std::memcpy(rest[i - whole], block.keys + i * block.key_stride, call.dim * sizeof(bf16));
    for (int at = 0; at < block.entries; at += 4 * ROWS) {
      const bf16* from[4];
      int64_t stride[4];
      for (int i = 0; i < 4; ++i) {
        const int entry = at + i * ROWS;
        from[i] = entry < whole ? block.keys + entry * block.key_stride : rest[0];
        stride[i] = (entry < whole ? block.key_stride : WIDEST) * sizeof(bf16);
      }
      for (int i = at; i < std::min(at + 4 * ROWS, block.entries); ++i)
        for (int group = 0; group < value_groups; ++group)
          __builtin_prefetch(block.values + i * block.value_stride + group * GROUP);
      barrier();
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int group = 0; group < key_groups; ++group) {
        const int64_t dim = begin(group, call.dim);
        _tile_loadd(7, query + group * ROWS, BYTES);
        _tile_loadd(4, from[0] + dim, stride[0]);
        _tile_dpbf16ps(0, 4, 7);
        _tile_loadd(5, from[1] + dim, stride[1]);
        _tile_dpbf16ps(1, 5, 7);
        _tile_loadd(6, from[2] + dim, stride[2]);
        _tile_dpbf16ps(2, 6, 7);
        _tile_loadd(4, from[3] + dim, stride[3]);
        _tile_dpbf16ps(3, 4, 7);
      }
      _tile_stored(0, logits + at, BYTES);
      _tile_stored(1, logits + at + ROWS, BYTES);
      _tile_stored(2, logits + at + 2 * ROWS, BYTES);
      _tile_stored(3, logits + at + 3 * ROWS, BYTES);
    }
  }

  void scale(const Piece<bf16>& block) {
    for (int i = 0; i < block.entries; ++i) logits[i] *= float(call.scaling);
    if (call.bias && block.biased >= 0)
      for (int row = 0; row < rows; ++row) {
        const float* bias = call.bias_row(block.head, first + row) + block.biased;
        for (int i = 0; i < block.entries; ++i) logits[i][row] += bias[i];
      }
  }

  // Logits become weights; what was summed before shrinks to the new maxima.
  void reweigh(int entries, Floats& top, Floats& total) {
    const int padded = (entries + GROUP - 1) / GROUP * GROUP;
    std::fill(logits + entries, logits + padded, all(-INFINITY));
    Floats most = top;
    for (int i = 0; i < entries; ++i) most = logits[i] > most ? logits[i] : most;
    const Words grown = most > top;
    int any = 0;
    for (int lane = 0; lane < LANES; ++lane) any |= grown[lane];
    if (any) {
      const Floats shrink = exp_of(top - most);
      total *= shrink;
      for (int half = 0; half < 2 * value_groups; ++half)
        for (int row = 0; row < rows; ++row) sums[half][row] *= shrink[row];
      top = most;
    }
    for (int at = 0; at < padded; at += GROUP) {
      Words pairs[LANES];
      for (int i = 0; i < LANES; ++i) {
        const Floats first = exp_of(logits[at + 2 * i] - top), second = exp_of(logits[at + 2 * i + 1] - top);
        total += first + second;
        pairs[i] = pairs_of(first, second);
      }
      transpose(pairs);
      std::copy(pairs, pairs + LANES, weights[at / GROUP]);
    }
  }

  // A GROUP of dims of a GROUP of entries as two tiles.
  void fetch_values(const Piece<bf16>& block, int at, int64_t dim) {
    const auto row = [&](int entry) {
      return *(const AnyHalves*)(entry < block.entries ? block.values + entry * block.value_stride + dim : zeros);
    };
    for (int i = 0; i < ROWS; ++i) {
      const Halves first = row(at + 2 * i), second = row(at + 2 * i + 1);
      values[0][i] = interleaved<0>(first, second, std::make_integer_sequence<int, GROUP>());
      values[1][i] = interleaved<4>(first, second, std::make_integer_sequence<int, GROUP>());
    }
  }

  void mix(const Piece<bf16>& block) {
    for (int group = 0; group < value_groups; group += 2) {
      const bool both = group + 1 < value_groups;
      Floats(*sum)[ROWS] = sums + 2 * group;
      barrier();
      _tile_loadd(0, sum[0], BYTES);
      _tile_loadd(1, sum[1], BYTES);
      if (both) {
        _tile_loadd(2, sum[2], BYTES);
        _tile_loadd(3, sum[3], BYTES);
      }
      for (int at = 0; at < block.entries; at += GROUP) {
        for (int i = at; i < std::min(at + GROUP, block.entries); ++i)
          for (int next = group; next < std::min(group + 2, key_groups); ++next)
            __builtin_prefetch(block.keys + (BLOCK + i) * block.key_stride + next * GROUP);
        fetch_values(block, at, begin(group, call.value_dim));
        barrier();
        _tile_loadd(7, weights[at / GROUP], BYTES);
        _tile_loadd(4, values[0], BYTES);
        _tile_loadd(5, values[1], BYTES);
        _tile_dpbf16ps(0, 7, 4);
        _tile_dpbf16ps(1, 7, 5);
        barrier();
        if (!both) continue;
        fetch_values(block, at, begin(group + 1, call.value_dim));
        barrier();
        _tile_loadd(4, values[0], BYTES);
        _tile_loadd(5, values[1], BYTES);
        _tile_dpbf16ps(2, 7, 4);
        _tile_dpbf16ps(3, 7, 5);
        barrier();
      }
      _tile_stored(0, sum[0], BYTES);
      _tile_stored(1, sum[1], BYTES);
      if (both) {
        _tile_stored(2, sum[2], BYTES);
        _tile_stored(3, sum[3], BYTES);
      }
    }
  }

 public:
  explicit ByAmx(const Call& call)
      : call(call), key_groups(groups(call.dim)), value_groups(groups(call.value_dim)) {}

  // Whether Linux lets this process use tiles, which it has to ask for (ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA), and
  // the call fits into them.
  static bool can(const Call& call) {
    constexpr int REQUEST = 0x1023, TILES = 18;
    static const bool allowed = syscall(SYS_arch_prctl, REQUEST, TILES) == 0;
    return allowed && std::max(call.dim, call.value_dim) <= WIDEST;
  }

  static int64_t query_size(const Call& call) { return (call.rows() + ROWS - 1) / ROWS * tiles_size(call); }

  // Tiles of a head's query rows, one a lane, of two dims; 0 where a group overlaps with the one before it.
  void fetch_query(int head, float* to) const {
    std::memset(to, 0, query_size(call) * sizeof(float));
    for (int row = 0; row < call.rows(); ++row) {
      const bf16* from = call.query_row<bf16>(head, row);
      bf16* tiles = (bf16*)(to + row / ROWS * tiles_size(call));
      for (int group = 0; group < key_groups; ++group)
        for (int i = 0; i < GROUP; ++i) {
          const int64_t dim = begin(group, call.dim) + i;
          if (dim >= group * GROUP) tiles[((group * ROWS + i / 2) * LANES + row % ROWS) * 2 + i % 2] = from[dim];
        }
    }
  }

  // out [rows, value_groups * GROUP].
  void attend(const Piece<bf16>& piece, const float* query, float* out, float* tops, float* totals) {
    for (first = 0; first < call.rows(); first += ROWS) {
      rows = std::min(ROWS, call.rows() - first);
      attend_now(piece, query + first / ROWS * tiles_size(call), out + first * value_groups * GROUP, tops + first,
                 totals + first);
    }
  }

 private:
  // Numbers of the tiles of up to ROWS query rows.
  static int64_t tiles_size(const Call& call) { return groups(call.dim) * ROWS * LANES; }

  void attend_now(const Piece<bf16>& piece, const float* query, float* out, float* tops, float* totals) {
    struct alignas(64) {
      uint8_t palette = 1, start = 0, reserved[14] = {};
      uint16_t bytes[16] = {BYTES, BYTES, BYTES, BYTES, BYTES, BYTES, BYTES, BYTES};
      uint8_t rows[16] = {ROWS, ROWS, ROWS, ROWS, ROWS, ROWS, ROWS, ROWS};
    } config;
    barrier();
    _tile_loadconfig(&config);
    std::memset(sums, 0, 2 * value_groups * sizeof(sums[0]));
    Floats top = all(LOWEST), total = all(0.0f);
    for (int at = 0; at < piece.entries; at += BLOCK) {
      const Piece<bf16> block = piece.part(at, BLOCK);
      score(block, (const Words*)query);
      scale(block);
      reweigh(block.entries, top, total);
      mix(block);
    }
    _tile_release();
    for (int row = 0; row < rows; ++row) {
      tops[row] = top[row];
      totals[row] = total[row];
      for (int group = 0; group < value_groups; ++group) {
        Floats dims[2];
        unmix(sums[2 * group][row], sums[2 * group + 1][row], dims);
        for (int half = 0; half < 2; ++half)
          store(out + (row * value_groups + group) * GROUP + half * LANES, dims[half]);
      }
    }
  }
};

}  // namespace
