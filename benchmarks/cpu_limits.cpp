// What this processor can do at most: multiply-adds a second, and bytes a second read from memory.
// Built and called by cpu_limits.py.

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <thread>
#include <vector>

#if defined(__x86_64__)
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

using Clock = std::chrono::steady_clock;
using Word = std::uint64_t;

double seconds_between(Clock::time_point start, Clock::time_point end) {
  return std::chrono::duration<double>(end - start).count();
}

// Runs work(0) ... work(threads - 1), one a thread, the first on the caller's. None begins before
// all are running, so what it costs to start a thread is not in the times that they take.
template <typename Work>
void run_together(int threads, const Work& work) {
  std::atomic<int> running{0};
  const auto begin = [&](int thread) {
    ++running;
    while (running.load() < threads) std::this_thread::yield();
    work(thread);
  };
  std::vector<std::thread> others;
  for (int thread = 1; thread < threads; ++thread) others.emplace_back(begin, thread);
  begin(0);
  for (std::thread& other : others) other.join();
}

// ------------------------------------------------------------------------------- multiply-adds

// Chains x <- x * factor + addend that do not wait for each other. At two instructions a cycle,
// latencies of 4 to 7 cycles need 8 to 14 of them; what the chains leave of 16 registers holds
// factor and addend. Instruction sets with 32 registers run 24.
constexpr int kChains = 14;
constexpr int kWideChains = 24;  // unrolled by a pragma: GCC keeps a longer loop than 16 in memory
constexpr int kLanes = 16;       // floats in the widest register
constexpr std::int64_t kLoops = 1000;  // between two looks at the clock

// The chains live in `state`, whose numbers all differ and which is only known when this runs:
// chains that start alike are one chain to a compiler, and the rate would be that many times the
// processor's.
using Chains = void (*)(float* state, float factor, float addend);

// There is one function for each instruction set, for a target attribute cannot be a template's
// parameter, and an intrinsic cannot be inlined into a function without its target.

#if defined(__x86_64__)

void chains_portable(float* state, float factor, float addend) {
  const __m128 a = _mm_set1_ps(factor), b = _mm_set1_ps(addend);
  __m128 x[kChains];
  for (int chain = 0; chain < kChains; ++chain) x[chain] = _mm_loadu_ps(state + chain * kLanes);
  for (std::int64_t loop = 0; loop < kLoops; ++loop)
#pragma GCC unroll 32
    for (__m128& each : x) each = _mm_add_ps(_mm_mul_ps(each, a), b);
  for (int chain = 0; chain < kChains; ++chain) _mm_storeu_ps(state + chain * kLanes, x[chain]);
}

__attribute__((target("avx2,fma"))) void chains_avx2(float* state, float factor, float addend) {
  const __m256 a = _mm256_set1_ps(factor), b = _mm256_set1_ps(addend);
  __m256 x[kChains];
  for (int chain = 0; chain < kChains; ++chain) x[chain] = _mm256_loadu_ps(state + chain * kLanes);
  for (std::int64_t loop = 0; loop < kLoops; ++loop)
#pragma GCC unroll 32
    for (__m256& each : x) each = _mm256_fmadd_ps(each, a, b);
  for (int chain = 0; chain < kChains; ++chain) _mm256_storeu_ps(state + chain * kLanes, x[chain]);
}

__attribute__((target("avx512f"))) void chains_avx512(float* state, float factor, float addend) {
  const __m512 a = _mm512_set1_ps(factor), b = _mm512_set1_ps(addend);
  __m512 x[kWideChains];
  for (int chain = 0; chain < kWideChains; ++chain)
    x[chain] = _mm512_loadu_ps(state + chain * kLanes);
  for (std::int64_t loop = 0; loop < kLoops; ++loop)
#pragma GCC unroll 32
    for (__m512& each : x) each = _mm512_fmadd_ps(each, a, b);
  for (int chain = 0; chain < kWideChains; ++chain)
    _mm512_storeu_ps(state + chain * kLanes, x[chain]);
}

// x <- x + factor * addend + factor * addend in every lane: vdpbf16ps.
__attribute__((target("avx512f,avx512bf16"))) void chains_avx512_bf16(float* state, float factor,
                                                                      float addend) {
  const __m512 factors = _mm512_set1_ps(factor), addends = _mm512_set1_ps(addend);
  const __m512bh a = _mm512_cvtne2ps_pbh(factors, factors);
  const __m512bh b = _mm512_cvtne2ps_pbh(addends, addends);
  __m512 x[kWideChains];
  for (int chain = 0; chain < kWideChains; ++chain)
    x[chain] = _mm512_loadu_ps(state + chain * kLanes);
  for (std::int64_t loop = 0; loop < kLoops; ++loop)
#pragma GCC unroll 32
    for (__m512& each : x) each = _mm512_dpbf16_ps(each, a, b);
  for (int chain = 0; chain < kWideChains; ++chain)
    _mm512_storeu_ps(state + chain * kLanes, x[chain]);
}

// Tiles of 16 x 16 sums, each of 32 products: four chains, for an instruction takes 16 cycles and
// its sums are there after 52.
constexpr int kTileChains = 4;

__attribute__((target("amx-tile,amx-bf16"))) void chains_amx_bf16(float* state, float factor,
                                                                  float addend) {
  alignas(64) unsigned char config[64] = {1};
  for (int tile = 0; tile < kTileChains + 2; ++tile) {
    config[16 + 2 * tile] = 64;  // bytes a row
    config[48 + tile] = 16;      // rows
  }
  alignas(64) std::uint16_t factors[2][16 * 32];
  for (auto& tile : factors)
    for (std::uint16_t& each : tile) {
      float value = (&tile == &factors[0] ? factor : addend) * 0.03125f;
      std::memcpy(&each, reinterpret_cast<const char*>(&value) + 2, sizeof each);  // its upper half
    }
  asm volatile("" ::: "memory");  // the compiler does not know that what follows reads memory
  _tile_loadconfig(config);
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  _tile_loadd(4, factors[0], 64);
  _tile_loadd(5, factors[1], 64);
  for (std::int64_t loop = 0; loop < kLoops; ++loop) {
    _tile_dpbf16ps(0, 4, 5);
    _tile_dpbf16ps(1, 4, 5);
    _tile_dpbf16ps(2, 4, 5);
    _tile_dpbf16ps(3, 4, 5);
  }
  alignas(64) float sums[16 * 16];
  _tile_stored(0, sums, 64);
  _tile_release();
  state[0] = sums[0];
}

// Linux gives a process tiles when it asks for them, if there are any; all that have them know
// bf16.
bool may_use_tiles() { return syscall(SYS_arch_prctl, 0x1023, 18) == 0; }

#endif

struct MultiplyAdds {
  Chains run = nullptr;  // null where this processor has no such instructions
  int a_loop = 0;        // multiply-adds of numbers, in one loop
};

MultiplyAdds multiply_adds(const std::string& set) {
#if defined(__x86_64__)
  if (set == "portable") return {chains_portable, kChains * 4};
  if (set == "avx2" && __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"))
    return {chains_avx2, kChains * 8};
  if (set == "avx512" && __builtin_cpu_supports("avx512f"))
    return {chains_avx512, kWideChains * 16};
  if (set == "avx512_bf16" && __builtin_cpu_supports("avx512bf16"))
    return {chains_avx512_bf16, kWideChains * 32};
  if (set == "amx_bf16" && may_use_tiles()) return {chains_amx_bf16, kTileChains * 16 * 16 * 32};
#endif
  static_cast<void>(set);
  return {};
}

double flops_a_second(const MultiplyAdds& set, double seconds) {
  float state[kWideChains * kLanes];
  for (int place = 0; place < kWideChains * kLanes; ++place) {
    volatile float start = 1.0f + 0.001f * static_cast<float>(place);
    state[place] = start;
  }
  volatile float factor = 0.999f, addend = 0.001f;  // fixed point 1: no overflow, no denormals
  double loops = 0, taken = 0;
  const Clock::time_point start = Clock::now();
  do {
    set.run(state, factor, addend);
    loops += kLoops;
    taken = seconds_between(start, Clock::now());
  } while (taken < seconds);
  volatile float sink = state[0];
  static_cast<void>(sink);
  return 2.0 * loops * set.a_loop / taken;
}

// --------------------------------------------------------------------------------------- reads

// A share of an array is read as eight streams side by side, each asked for 1 KiB ahead: hardware
// prefetchers stop at the end of a page of 4 KiB, and a single stream waits for each page walk.
// On two Zen 4 cores, over 154 MB: one stream 54 GB/s, eight 57, eight with prefetches 62.
constexpr std::size_t kStreams = 8;
constexpr std::size_t kLine = 64;     // bytes
constexpr std::size_t kAhead = 1024;  // bytes

template <std::size_t kCount>
Word sum_of(const Word (&words)[kCount]) {
  Word sum = 0;
  for (Word word : words) sum += word;
  return sum;
}

// Each returns a sum over kStreams * stream_bytes bytes, where stream_bytes is a multiple of kLine.
using Reader = Word (*)(const unsigned char* data, std::size_t stream_bytes);

Word read_words(const unsigned char* data, std::size_t stream_bytes) {
  Word sums[kStreams] = {};
  for (std::size_t place = 0; place < stream_bytes; place += sizeof(Word)) {
    for (std::size_t stream = 0; stream < kStreams; ++stream) {
      const unsigned char* from = data + stream * stream_bytes + place;
      if (place % kLine == 0) __builtin_prefetch(from + kAhead);
      Word word;
      std::memcpy(&word, from, sizeof(word));
      sums[stream] += word;
    }
  }
  return sum_of(sums);
}

#if defined(__x86_64__)

__attribute__((target("avx2"))) Word read_avx2(const unsigned char* data,
                                               std::size_t stream_bytes) {
  __m256i sums[kStreams] = {};
  for (std::size_t place = 0; place < stream_bytes; place += 32) {
    for (std::size_t stream = 0; stream < kStreams; ++stream) {
      const unsigned char* from = data + stream * stream_bytes + place;
      if (place % kLine == 0) __builtin_prefetch(from + kAhead);
      sums[stream] = _mm256_add_epi64(sums[stream],
                                      _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
    }
  }
  Word words[kStreams * 32 / sizeof(Word)];
  std::memcpy(words, sums, sizeof(words));
  return sum_of(words);
}

__attribute__((target("avx512f"))) Word read_avx512(const unsigned char* data,
                                                    std::size_t stream_bytes) {
  __m512i sums[kStreams] = {};
  for (std::size_t place = 0; place < stream_bytes; place += 64) {
    for (std::size_t stream = 0; stream < kStreams; ++stream) {
      const unsigned char* from = data + stream * stream_bytes + place;
      __builtin_prefetch(from + kAhead);
      sums[stream] = _mm512_add_epi64(sums[stream], _mm512_loadu_si512(from));
    }
  }
  Word words[kStreams * 64 / sizeof(Word)];
  std::memcpy(words, sums, sizeof(words));
  return sum_of(words);
}

#endif

Reader widest_reader() {
#if defined(__x86_64__)
  if (__builtin_cpu_supports("avx512f")) return read_avx512;
  if (__builtin_cpu_supports("avx2")) return read_avx2;
#endif
  return read_words;
}

// Reads `lines` lines. Streams of an odd number of lines do not all fall into one set of a cache,
// as those of whole pages would; what they leave, under 16 lines, is read after them.
Word read_share(Reader read, const unsigned char* data, std::size_t lines) {
  std::size_t stream_lines = lines / kStreams;
  if (stream_lines > 0 && stream_lines % 2 == 0) --stream_lines;
  Word sum = read(data, stream_lines * kLine);
  for (std::size_t line = kStreams * stream_lines; line < lines; ++line) {
    Word words[kLine / sizeof(Word)];
    std::memcpy(words, data + line * kLine, kLine);
    sum += sum_of(words);
  }
  return sum;
}

}  // namespace

extern "C" {

// The sum of the threads' rates, over about `seconds`. `set` is portable (SSE2, a multiply and an
// add), avx2, avx512, avx512_bf16 or amx_bf16; 0 where this processor does not have it.
double fma_gflops(const char* set, int threads, double seconds) {
  const MultiplyAdds found = multiply_adds(set);
  if (found.run == nullptr) return 0;
  std::vector<double> rates(threads);
  run_together(threads, [&](int thread) { rates[thread] = flops_a_second(found, seconds); });
  double sum = 0;
  for (double rate : rates) sum += rate;
  return sum / 1e9;
}

// How long `threads` threads take to read an array, each a contiguous share, from when the first
// begins to when the last is done. Up to 63 bytes at the end are left out.
double read_seconds(const void* data, std::size_t bytes, int threads) {
  const auto* first = static_cast<const unsigned char*>(data);
  const Reader read = widest_reader();
  const std::size_t lines = bytes / kLine;
  std::vector<Clock::time_point> starts(threads), ends(threads);
  run_together(threads, [&](int thread) {
    const std::size_t from = lines * thread / threads, to = lines * (thread + 1) / threads;
    starts[thread] = Clock::now();
    volatile Word sink = read_share(read, first + from * kLine, to - from);
    static_cast<void>(sink);
    ends[thread] = Clock::now();
  });
  double longest = 0;
  for (Clock::time_point start : starts)
    for (Clock::time_point end : ends) longest = std::max(longest, seconds_between(start, end));
  return longest;
}

}  // extern "C"
