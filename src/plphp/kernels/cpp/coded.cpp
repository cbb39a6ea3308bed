// SPDX-License-Identifier: Apache-2.0
// Attention over entries that are held in few bits, on a CPU: `attend_codes` in coded_attention.py says what,
// _coded_cpp.py calls it. Nothing is decoded entry by entry: see tables.h. Sums are float32.
#include <cmath>
#include <exception>
#include <memory>
#include <new>
#include <vector>

#include "coded_call.h"
#include "coded_unit.h"
#include "vectors.h"

extern "C" int omp_get_thread_num();  // omp.h may be missing, where the compiler knows OpenMP

namespace {

inline void write(float* to, float x) { *to = x; }
inline void write(bf16* to, float x) {  // the nearest, ties to even
  uint32_t bits;
  std::memcpy(&bits, &x, sizeof(bits));
  to->bits = x != x ? 0x7fc0 : uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16);
}

// The output of query rows, from the partials of units with these rows: weights of each are relative to its own maximum,
// and are brought to the largest of all before they are added. Where there is no entry there is no weight.
template <int N, class T>
void merge(const Call& call, const Unit& unit, Partial<N>* partials, size_t count) {
  Row<N> top = Row<N>{} + LOWEST, total = {}, shrink = Row<N>{} + 1.0f;
  for (size_t i = 0; i < count; ++i) top = partials[i].top > top ? partials[i].top : top;
  for (size_t i = 0; i < count; ++i) {
    for (int lane = 0; lane < N; ++lane) partials[i].share[lane] = std::exp(partials[i].top[lane] - top[lane]);
    total += partials[i].total * partials[i].share;
  }
  Row<N> others = {}, whole = total;
  if (call.more) {
    Row<N> lse = {};
    for (int lane = 0; lane < unit.rows; ++lane) lse[lane] = call.more_lse[call.out_at(unit, lane)];
    const Row<N> most = lse > top ? lse : top;
    for (int lane = 0; lane < N; ++lane) {
      others[lane] = std::exp(lse[lane] - most[lane]);
      shrink[lane] = std::exp(top[lane] - most[lane]);
    }
    total *= shrink;
    whole = total + others;
    top = most;
  }
  for (int lane = 0; lane < unit.rows; ++lane) call.lse[call.out_at(unit, lane)] = top[lane] + std::log(whole[lane]);
  const Row<N> scale = 1.0f / (whole == 0.0f ? Row<N>{} + 1.0f : whole);
  for (size_t i = 0; i < count; ++i) partials[i].share *= shrink * scale;
  for (int i = 0; i < call.value_dim; ++i) {
    Row<N> sum = {};
    for (size_t at = 0; at < count; ++at) sum += partials[at].out[i] * partials[at].share;
    partials[0].out[i] = sum;
  }
  others *= scale;
  for (int lane = 0; lane < unit.rows; ++lane) {
    T* to = (T*)call.out + call.out_at(unit, lane) * call.value_dim;
    const float* from = (const float*)partials[0].out + lane;
    const T* more = (const T*)call.more;
    if (more) more += call.place(call.more_strides, unit.head, unit.first + lane * unit.step);
    for (int i = 0; i < call.value_dim; ++i)
      write(to + i, from[i * N] + (more ? others[lane] * number(more[i]) : 0.0f));
  }
}

struct Aligned {
  void operator()(char* memory) const { ::operator delete[](memory, std::align_val_t(64)); }
};
using Memory = std::unique_ptr<char[], Aligned>;
inline Memory memory_of(int64_t size) {
  return Memory(static_cast<char*>(::operator new[](size_t(size), std::align_val_t(64))));
}

template <int N, class T>
void attend(const Call& call) {
  const std::vector<Unit> units = units_of(call, N);
  std::vector<size_t> first;  // unit of each set of query rows
  int64_t most = 0;
  for (size_t i = 0; i < units.size(); ++i) {
    if (!i || !same_rows(units[i - 1], units[i])) first.push_back(i);
    most = std::max(most, units[i].to - units[i].from);
  }
  first.push_back(units.size());
  constexpr bool rounds = std::is_same_v<T, bf16>;
  const int64_t size = Work<N>::scratch(call, rounds, most);
  const Memory scratch = memory_of(call.threads * size), outs = memory_of(units.size() * call.value_dim * sizeof(Row<N>));
  std::vector<Partial<N>> partials(units.size());
  for (size_t i = 0; i < units.size(); ++i) partials[i].out = (Row<N>*)outs.get() + i * call.value_dim;
// As many threads as torch has, and each loop ends in a barrier: see decode.cpp.
#pragma omp parallel num_threads(int(call.threads))
  {
    Work<N> work(call, rounds, scratch.get() + omp_get_thread_num() * size, most);
    const Unit* last = nullptr;  // tables are those of its rows
#pragma omp for schedule(dynamic)
    for (size_t i = 0; i < units.size(); ++i) {
      if (!last || !same_rows(*last, units[i])) work.template fetch<T>(units[i]);
      last = &units[i];
      work.attend(units[i], partials[i]);
    }
#pragma omp for
    for (size_t i = 0; i < first.size() - 1; ++i)
      merge<N, T>(call, units[first[i]], &partials[first[i]], first[i + 1] - first[i]);
  }
}

template <class T>
int tried(const Call& call) {
  try {
    const int64_t rows = call.group * call.length;
    bool recalls = false;
    for (int head = 0; head < call.heads(); ++head) recalls |= call.reads[head] >= 0;
    const int64_t wanted = recalls ? call.group : rows;
    wanted <= 4 ? attend<4, T>(call) : wanted <= 8 ? attend<8, T>(call) : attend<16, T>(call);
  } catch (const std::exception&) {  // no memory: no exception may leave a function that C calls
    return 1;
  }
  return 0;
}

}  // namespace

extern "C" int attend_codes_float32(const Call* call) { return tried<float>(*call); }
extern "C" int attend_codes_bfloat16(const Call* call) { return tried<bf16>(*call); }
