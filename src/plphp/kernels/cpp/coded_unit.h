// SPDX-License-Identifier: Apache-2.0
// Attention of some query rows over the coded entries of a head: N rows at once, as the lanes of a vector.
//
// Logits of all entries come first, stream after stream, so that a single table is looked up at a time; then weights;
// then weights fall on the bytes of the codes of values, and what they collect is decoded once for all entries.
#pragma once
#include <algorithm>
#include <cmath>
#include <cstdint>

#include "bytes.h"
#include "choose.h"
#include "code_dots.h"
#include "coded_call.h"
#include "dots.h"
#include "planes.h"
#include "softmax.h"
#include "tables.h"
#include "vectors.h"

namespace {

constexpr int PLANES_OF = BOOKS, TABLES = BOOKS + KINDS;  // tables: of codebooks, then of bit planes by their kind
constexpr int ROTATED = PLANES_OF + CENTRED, BY_CHANNEL = PLANES_OF + CHANNEL, BY_TOKEN = PLANES_OF + TOKEN;

// Where the softmax of a unit stands: values are relative to the maxima.
template <int N>
struct Partial {
  Row<N>*out, top, total, share;  // out [value_dim]; the share in all units of these rows
};

template <int N>
class Work {
  using Row = ::Row<N>;

  const Call& call;
  const int dim, value_dim;
  Row *query, *rotated, *stepped;          // [dim]
  Row *mixed, *codes;                      // [value_dim]
  Row *tables[TABLES], *weights[TABLES];   // [parts, 256], where one is used
  Row* logits;                             // [entries], then weights
  float* numbers;                          // [2, dim] or [2, value_dim]: lowest numbers and steps of a group
  int32_t* masses;                         // [entries]
  int32_t* chosen;                         // [entries]
  int rows = 0;
  Row of_mean, of_rotated, on_mean, on_rotated, on_rest;
  bool all_centred = true;  // the values of all tiers
  Dots<N> dots;
  CodeDots<N> code_dots;

 public:
  // Scratch memory for units of up to `entries` entries. Where it `rounds`, values may be rounded to bf16.
  static int64_t scratch(const Call& call, bool rounds, int64_t entries) {
    Work counted(call, rounds);
    return counted.lay_out(nullptr, entries);
  }
  Work(const Call& call, bool rounds, char* memory, int64_t entries) : Work(call, rounds) { lay_out(memory, entries); }

  // Tables of the queries of a unit.
  template <class T>
  void fetch(const Unit& unit) {
    std::memset(query, 0, dim * sizeof(Row));
    for (int lane = 0; lane < unit.rows; ++lane) {
      const T* from = (const T*)call.query + call.place(call.query_strides, unit.head, unit.first + lane * unit.step);
      for (int i = 0; i < dim; ++i) query[i][lane] = number(from[i]) * float(call.scaling);
    }
    of_mean = of_rotated = Row{};
    if (call.key_means) {
      half_numbers(call.key_means + call.pairs[unit.head] * dim, dim, numbers);
      for (int i = 0; i < dim; ++i) of_mean += query[i] * numbers[i];
    }
    for (int book = 0; book < BOOKS; ++book) {
      if (!tables[book]) continue;
      const int parts = parts_of(book, dim);
      const uint16_t* own = call.key_books[book] + call.kv_head(unit.head) * CENTROIDS * dim;
      tabulate<N>(own, parts, dim / parts, query, tables[book]);
    }
    if (tables[ROTATED]) {
      std::copy(query, query + dim, rotated);
      rotate<N>(rotated, dim);
      for (int i = 0; i < dim; ++i) of_rotated += rotated[i];
      tabulate_bits<N>(dim / BYTE, rotated, tables[ROTATED]);
    }
  }

  void attend(const Unit& unit, Partial<N>& result) {
    on_mean = on_rotated = on_rest = Row{};
    for (int table = 0; table < TABLES; ++table)
      if (weights[table]) std::memset(weights[table], 0, parts_of(table, value_dim) * CENTROIDS * sizeof(Row));
    std::memset(mixed, 0, value_dim * sizeof(Row));
    dots.begin(unit.head);
    rows = unit.rows;
    call.reads[unit.head] < 0 ? attend_all(unit, result) : attend_chosen(unit, result);
    finish(unit, result.out);
  }

 private:
  Work(const Call& call, bool rounds)
      : call(call), dim(int(call.dim)), value_dim(int(call.value_dim)), dots(call, rounds), code_dots(dim, rounds) {
    for (int i = 0; i < call.tier_count; ++i) all_centred &= call.tiers[i].values.kind == CENTRED;
  }

  // Bytes of an entry that a table is for.
  static int parts_of(int table, int dim) { return table == 2 ? dim / (2 * BYTE) : dim / BYTE; }

  int64_t lay_out(char* memory, int64_t entries) {
    int64_t used = 0;
    const auto take = [&](auto*& what, int64_t count) {
      what = reinterpret_cast<std::remove_reference_t<decltype(what)>>(memory + used);
      used += (count * int64_t(sizeof(*what)) + 63) / 64 * 64;
    };
    take(query, dim);
    take(rotated, dim);
    take(stepped, dim);
    take(mixed, value_dim);
    take(codes, value_dim);
    take(numbers, 2 * std::max(dim, value_dim));
    dots.lay_out(take);
    code_dots.lay_out(take);
    for (int table = 0; table < TABLES; ++table) {
      tables[table] = weights[table] = nullptr;
      if (uses(table, &Tier::keys)) take(tables[table], parts_of(table, dim) * CENTROIDS);
      if (uses(table, &Tier::values)) take(weights[table], parts_of(table, value_dim) * CENTROIDS);
    }
    take(logits, entries + 1 + std::max(N, LANES));
    take(masses, entries + N);
    take(chosen, entries + 1);
    return used;
  }
  bool uses(int table, Side Tier::*side) const {
    for (int i = 0; i < call.tier_count; ++i) {
      const Side& own = call.tiers[i].*side;
      if (side == &Tier::values && dots.can(own)) continue;
      if (own.planes && table == PLANES_OF + own.kind) return true;
      for (int book = 0; book < own.books; ++book)
        if (own.book[book] == table) return true;
    }
    return false;
  }

  // ---- logits

  // Of what is stored of keys, `index` takes the first stream alone.
  void score(const Some& some, Row* to, bool index) {
    const Side& side = some.tier.keys;
    if (side.kind == CHANNEL) return score_steps(some, to, index);
    if (!side.books) std::fill(to, to + some.count, of_mean);
    for (int book = 0; book < (index ? std::min<int64_t>(1, side.books) : side.books); ++book) {
      const int table = int(side.book[book]), parts = parts_of(table, dim);
      const Bytes bytes(some, side.streams[book], parts);
      by_parts(parts, [&, own = tables[table], mean = of_mean](auto constant) {
        for (int i = 0; i < some.count; ++i)
          to[i] = (book ? to[i] : mean) + looked_up<N, constant>(own, bytes[i], parts);
      });
    }
    if (!side.planes || (index && side.books)) return;
    const float half = float(1 << (side.planes - 1)), weight = index ? half : 1;
    const Row middle = of_rotated * (index ? half / 2 : half - 0.5f);
    const uint16_t* scales = side.scales;
    by_planes<N>(some, side, index, dim, [&, own = tables[ROTATED]](auto bytes) {
      for (int i = 0; i < some.count; ++i)
        to[i] += (bytes.looked_up(own, i) * weight - middle) * half_number(scales[some.entry(i)]);
    });
  }

  // Where entries share the steps of a channel, a table is for one group of them.
  void score_steps(const Some& some, Row* to, bool index) {
    const Side& side = some.tier.keys;
    const float half = float(1 << (side.planes - 1)), weight = index ? half : 1;
    by_groups(some, side, dim, [&](int first, int end) {
      Row lowest = {}, total = {};
      for (int at = 0; at < dim; ++at) {
        lowest += query[at] * numbers[at];
        stepped[at] = query[at] * numbers[dim + at];
        total += stepped[at];
      }
      if (index) lowest += total * ((half - 1) / 2);
#ifdef PLPHP_CODE_DOTS
      if (code_dots.can()) {
        code_dots.set(stepped);
        return by_planes<N>(some, side, index, dim, [&](auto bytes) {
          code_dots.template multiply<decltype(bytes)::PLANES>(bytes.bytes, first, end, lowest, weight, to);
        });
      }
#endif
      tabulate_bits<N>(dim / BYTE, stepped, tables[BY_CHANNEL]);
      by_planes<N>(some, side, index, dim, [&, own = tables[BY_CHANNEL]](auto bytes) {
        for (int i = first; i < end; ++i) to[i] = lowest + bytes.looked_up(own, i) * weight;
      });
    });
  }

  // Call work(first, end) for the entries of every group; what they share is in `numbers` then.
  template <class Todo>
  void by_groups(const Some& some, const Side& side, int width, Todo todo) {
    for (int first = 0, end; first < some.count; first = end) {
      const int64_t group = some.place(first) / side.group;
      for (end = first + 1; end < some.count && some.place(end) / side.group == group;) ++end;
      half_numbers(side.groups + (some.tier.group_starts[some.head] + group) * 2 * width, 2 * width, numbers);
      todo(first, end);
    }
  }

  // ---- weights

  void attend_all(const Unit& unit, Partial<N>& result) {
    by_tiers(unit, [&](const Some& some, int64_t at) { score(some, logits + at, false); });
    reweigh<N>(logits, int(unit.to - unit.from), result.top, result.total);
    if (all_centred) on_mean = result.total;
    by_tiers(unit, [&](const Some& some, int64_t at) { mix(some, logits + at); });
  }

  // Call work(entries of a tier, how many are before them) for what a unit has of each tier.
  template <class Todo>
  void by_tiers(const Unit& unit, Todo todo) const {
    int64_t before = 0;
    for (int i = 0; i < call.tier_count; ++i) {
      const Tier& tier = call.tiers[i];
      const int64_t own = tier.counts[unit.head], from = std::max<int64_t>(0, unit.from - before),
                    to = std::min(own, unit.to - before);
      if (from < to) todo(Some{tier, unit.head, int(to - from), nullptr, from}, before + from - unit.from);
      before += own;
    }
  }

  // The entries with the largest index mass are read; what is left may stand in as one more entry.
  void attend_chosen(const Unit& unit, Partial<N>& result) {
    const int held = int(unit.to), wanted = int(std::min<int64_t>(held, call.reads[unit.head]));
    int count = 0;
    Row top, total, rest = {};
    if (wanted < held) {
      by_tiers(unit, [&](const Some& some, int64_t at) { score(some, logits + at, true); });
      reweigh<N>(logits, held, top, total);
      Row shares = {};
      for (int lane = 0; lane < unit.rows; ++lane) shares[lane] = 1 / total[lane];
      std::fill(logits + held, logits + held + N, Row{});
      weigh<N>(logits, held, shares, masses);
    } else {
      std::fill(masses, masses + held, 0);
    }
    const Choice choice = wanted < held ? choose(masses, held, wanted) : Choice{-1, 0};
    int ends[MOST_TIERS] = {};
    by_tiers(unit, [&](const Some& some, int64_t at) {
      const Row* left = logits + at;
      const int32_t* own = masses + at;
      for (int i = 0; i < some.count; ++i) {
        const int read = choice.has(own[i], int(at) + i);
        chosen[count] = i;
        count += read;
        rest += left[i] * float(1 - read);
      }
      ends[&some.tier - call.tiers] = count;
    });
    const auto by_chosen = [&](auto todo) {
      for (int i = 0, at = 0; i < call.tier_count; ++i) {
        if (ends[i] > at) {
          todo(Some{call.tiers[i], unit.head, ends[i] - at, chosen + at, 0}, at);
          at = ends[i];
        }
      }
    };
    by_chosen([&](const Some& some, int at) { score(some, logits + at, false); });
    logits[count] = Row{} - INFINITY;
    if (wanted < held && call.rests[unit.head / call.kv_heads])
      for (int lane = 0; lane < N; ++lane) logits[count][lane] = top[lane] + std::log(rest[lane]);
    reweigh<N>(logits, count + 1, result.top, result.total);
    on_rest = logits[count];
    if (all_centred) on_mean = result.total - on_rest;
    by_chosen([&](const Some& some, int at) { mix(some, logits + at); });
  }

  // ---- values

  void mix(const Some& some, const Row* own) {
    const Side& side = some.tier.values;
    if (side.kind == CHANNEL) return mix_groups(some, own);
    if (side.kind == TOKEN) return mix_steps(some, own);
    for (int i = 0; i < some.count && !all_centred; ++i) on_mean += own[i];
    if (dots.can(side)) return dots.add(some, own, rows);
    for (int book = 0; book < side.books; ++book) {
      const int table = int(side.book[book]), parts = parts_of(table, value_dim);
      const Bytes bytes(some, side.streams[book], parts);
      by_parts(parts, [&, collected = weights[table]](auto constant) {
        for (int i = 0; i < some.count; ++i) let_fall<N, constant>(collected, bytes[i], parts, own[i]);
      });
    }
    if (!side.planes) return;
    Row scales = {};
    by_planes<N>(some, side, false, value_dim, [&, collected = weights[ROTATED]](auto bytes) {
      for (int i = 0; i < some.count; ++i) {
        const Row scaled = own[i] * half_number(side.scales[some.entry(i)]);
        scales += scaled;
        bytes.let_fall(collected, i, scaled);
      }
    });
    on_rotated += scales * (float(1 << (side.planes - 1)) - 0.5f);
  }

  // Where entries share the steps of a channel, their codes are mixed before they become numbers.
  void mix_groups(const Some& some, const Row* own) {
    const Side& side = some.tier.values;
    by_groups(some, side, value_dim, [&](int first, int end) {
      Row total = {};
      for (int i = first; i < end; ++i) total += own[i];
      if (dots.can(side)) return dots.add_group(some.part(first, end), own + first, rows, total, numbers);
      Row* collected = weights[BY_CHANNEL];
      std::memset(collected, 0, value_dim / BYTE * CENTROIDS * sizeof(Row));
      by_planes<N>(some, side, false, value_dim, [&](auto bytes) {
        for (int i = first; i < end; ++i) bytes.let_fall(collected, i, own[i]);
      });
      std::memset(codes, 0, value_dim * sizeof(Row));
      spread_bits<N>(value_dim / BYTE, collected, codes);
      for (int i = 0; i < value_dim; ++i) mixed[i] += codes[i] * numbers[value_dim + i] + total * numbers[i];
    });
  }

  // Where the channels of an entry have steps of their own, some of them share one.
  void mix_steps(const Some& some, const Row* own) {
    const Side& side = some.tier.values;
    const int channels = int(side.group), shared = value_dim / channels, parts = channels / BYTE;
    for (int i = 0; i < some.count; ++i) {
      const uint16_t* scales = side.scales + some.entry(i) * 2 * shared;
      for (int at = 0; at < shared; ++at) {
        const Row low = own[i] * half_number(scales[at]), step = own[i] * half_number(scales[shared + at]);
        for (int channel = 0; channel < channels; ++channel) mixed[at * channels + channel] += low;
        for (int plane = 0; plane < side.planes; ++plane)
          let_fall<N, 0>(weights[BY_TOKEN] + at * parts * CENTROIDS,
                         side.streams[plane] + (some.entry(i) * shared + at) * parts, parts,
                         step * float(1 << (side.planes - 1 - plane)));
      }
    }
  }

  // What weights have fallen on becomes values.
  void finish(const Unit& unit, Row* out) {
    std::memset(out, 0, value_dim * sizeof(Row));
    const int parts = value_dim / BYTE;
    if (weights[ROTATED]) spread_bits<N>(parts, weights[ROTATED], out);
    for (int i = 0; i < value_dim; ++i) out[i] -= on_rotated;
    dots.put(true, rows, out);
    rotate<N>(out, value_dim);
    dots.put(false, rows, out);
    if (weights[BY_TOKEN]) spread_bits<N>(parts, weights[BY_TOKEN], out);
    for (int i = 0; i < value_dim; ++i) out[i] += mixed[i];
    for (int book = 0; book < BOOKS; ++book) {
      if (!weights[book]) continue;
      const uint16_t* own = call.value_books[book] + call.kv_head(unit.head) * CENTROIDS * value_dim;
      const int own_parts = parts_of(book, value_dim);
      spread<N>(own, own_parts, value_dim / own_parts, weights[book], out);
    }
    const auto add = [&](const uint16_t* means, Row weight) {
      const uint16_t* own = means + call.pairs[unit.head] * value_dim;
      for (int i = 0; i < value_dim; ++i) out[i] += weight * half_number(own[i]);
    };
    if (call.value_means) add(call.value_means, on_mean);
    if (call.rest_values && call.reads[unit.head] >= 0) add(call.rest_values, on_rest);
  }
};

}  // namespace
