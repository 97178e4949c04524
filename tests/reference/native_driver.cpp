// The C++ core without Python, for sanitisers: buffers of exactly the size used, results against
// plain fp64 loops. Prints what is wrong and exits with 1.
#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <limits>
#include <random>
#include <stdexcept>
#include <string>
#include <thread>
#include <vector>

#include "instruction_set.h"
#include "parallel.h"
#include "partials.h"

// In place of an OpenMP runtime, whose own threads sanitisers do not understand.
static int parallel_regions = 0;

extern "C" __attribute__((visibility("default"))) void GOMP_parallel(void (*body)(void*),
                                                                     void* data, unsigned threads,
                                                                     unsigned) {
  ++parallel_regions;
  std::vector<std::thread> others;
  for (unsigned i = 1; i < threads; ++i) others.emplace_back(body, data);
  body(data);
  for (std::thread& other : others) other.join();
}

namespace {

using llfast::DType;
using llfast::InstructionSet;

int failures = 0;

void expect(bool holds, const std::string& what) {
  if (holds) return;
  ++failures;
  std::cerr << "failed: " << what << '\n';
}

std::uint32_t bits_of(float value) {
  std::uint32_t bits;
  std::memcpy(&bits, &value, sizeof bits);
  return bits;
}

// Elements of one type, each an exact small number, in a buffer of exactly the size used.
struct Matrix {
  Matrix(std::int64_t rows, std::int64_t columns, std::int64_t stride, DType dtype,
         std::mt19937& random)
      : values(static_cast<std::size_t>((rows - 1) * stride + columns)), stride(stride) {
    std::uniform_int_distribution<int> digits(-16, 16);
    for (float& value : values) value = static_cast<float>(digits(random)) / 16;
    for (float value : values) {
      if (dtype == DType::kFloat16) {
        const int sixteenths = static_cast<int>(std::abs(value) * 16);
        const int exponent = sixteenths == 0 ? 0 : std::ilogb(value);
        const int fraction =
            sixteenths == 0 ? 0
                            : static_cast<int>(std::ldexp(std::abs(value), 10 - exponent)) - 1024;
        halves.push_back(static_cast<std::uint16_t>(
            sixteenths == 0 ? 0 : (value < 0 ? 0x8000 : 0) | (exponent + 15) << 10 | fraction));
      } else {
        halves.push_back(static_cast<std::uint16_t>(bits_of(value) >> 16));
      }
    }
    if (dtype == DType::kFloat32) {
      data = values.data();
    } else {
      data = halves.data();
    }
  }

  double at(std::int64_t row, std::int64_t column) const {
    return values[static_cast<std::size_t>(row * stride + column)];
  }

  std::vector<float> values;
  std::vector<std::uint16_t> halves;
  std::int64_t stride;
  const void* data;
};

// Five arrays of exactly the size used.
struct Sums {
  explicit Sums(std::int64_t size)
      : max(static_cast<std::size_t>(size), -std::numeric_limits<float>::infinity()),
        sum(static_cast<std::size_t>(size)),
        weighted_sum(static_cast<std::size_t>(size)),
        target(max),
        argmax(static_cast<std::size_t>(size)) {}

  llfast::PartialArrays arrays() {
    return {max.data(), sum.data(), weighted_sum.data(), target.data(), argmax.data()};
  }

  std::vector<float> max, sum, weighted_sum, target;
  std::vector<std::int32_t> argmax;
};

struct Row {
  double logprob;
  double lse;
  double target;
  double entropy;
  std::int64_t argmax;
};

Row truth(const llfast::HeadProblem& problem, const Matrix& hidden, const Matrix& lm_head,
          std::int64_t row) {
  std::vector<double> logits;
  double sum = 0;
  for (std::int64_t v = 0; v < problem.vocabulary; ++v) {
    double z = problem.bias == nullptr ? 0.0 : problem.bias[v];
    for (std::int64_t d = 0; d < problem.width; ++d) z += hidden.at(row, d) * lm_head.at(v, d);
    z *= problem.scale;
    if (problem.softcap != 0) z = problem.softcap * std::tanh(z / problem.softcap);
    sum += std::exp(z);
    logits.push_back(z);
  }
  const double lse = std::log(sum);
  double entropy = 0;
  for (double z : logits) entropy -= std::exp(z - lse) * (z - lse);
  const double target = logits[static_cast<std::size_t>(problem.targets[row])];
  const auto largest = std::max_element(logits.begin(), logits.end());
  return {target - lse, lse, target, entropy, largest - logits.begin()};
}

// One head, whole or in slices of one group, the last slice first.
void check_head(InstructionSet set, DType dtype, std::int64_t tokens, std::int64_t vocabulary,
                std::int64_t width, bool with_options, bool sliced = false) {
  std::mt19937 random(static_cast<unsigned>(tokens + vocabulary + width));
  const Matrix hidden(tokens, width, width + 3, dtype, random);
  const Matrix lm_head(vocabulary, width, width + (with_options ? 1 : 0), dtype, random);
  std::vector<float> bias(static_cast<std::size_t>(vocabulary), 0.25f);
  std::vector<std::int64_t> targets;
  for (std::int64_t t = 0; t < tokens; ++t) targets.push_back(vocabulary - 1 - t % vocabulary);
  llfast::HeadProblem problem{};
  problem.hidden = hidden.data;
  problem.lm_head = lm_head.data;
  problem.bias = with_options ? bias.data() : nullptr;
  problem.targets = targets.data();
  problem.tokens = tokens;
  problem.vocabulary = vocabulary;
  problem.width = width;
  problem.hidden_stride = hidden.stride;
  problem.lm_head_stride = lm_head.stride;
  problem.dtype = dtype;
  problem.scale = with_options ? 0.5f : 1.0f;
  problem.softcap = with_options ? 5.0f : 0.0f;
  const std::string name = std::string(llfast::name_of(set)) + " " + std::to_string(tokens) + "x" +
                           std::to_string(vocabulary) + "x" + std::to_string(width);
  const auto never = [] { return false; };
  const std::int64_t groups = llfast::groups_of(vocabulary);
  Sums parts(groups * tokens);
  if (sliced) {
    for (std::int64_t group = groups - 1; group >= 0; --group) {
      llfast::HeadProblem slice = problem;
      const std::int64_t first = group * llfast::kGroup;
      const std::size_t bytes = dtype == DType::kFloat32 ? 4 : 2;
      slice.first_word = first;
      slice.lm_head = static_cast<const char*>(lm_head.data) +
                      bytes * static_cast<std::size_t>(first * lm_head.stride);
      slice.bias = with_options ? bias.data() + first : nullptr;
      slice.vocabulary = std::min(llfast::kGroup, vocabulary - first);
      llfast::PartialArrays place = parts.arrays();
      place = {place.max + group * tokens, place.sum + group * tokens,
               place.weighted_sum + group * tokens, place.target + group * tokens,
               place.argmax + group * tokens};
      expect(llfast::head_partials(slice, place, set, 2, never), name + " did not finish");
    }
  } else {
    expect(llfast::head_partials(problem, parts.arrays(), set, 3, never), name + " did not finish");
  }
  Sums total(tokens);
  llfast::fold_partials(parts.arrays(), groups, tokens, total.arrays(), set);
  const auto size = static_cast<std::size_t>(tokens);
  std::vector<float> logprobs(size), lse(size), target_logits(size), entropy(size);
  std::vector<std::int64_t> argmax(size);
  llfast::statistics_of(
      total.arrays(), tokens,
      {logprobs.data(), lse.data(), target_logits.data(), entropy.data(), argmax.data()});
  for (std::size_t t = 0; t < size; ++t) {
    const Row row = truth(problem, hidden, lm_head, static_cast<std::int64_t>(t));
    const double error =
        std::max({std::abs(logprobs[t] - row.logprob), std::abs(lse[t] - row.lse),
                  std::abs(target_logits[t] - row.target), std::abs(entropy[t] - row.entropy)});
    expect(error < 3e-5, name + " is off by " + std::to_string(error));
    // With a softcap, fp32 makes one of what fp64 keeps apart.
    expect(with_options || argmax[t] == row.argmax, name + " has another arg max");
  }
}

void check_tasks(llfast::Helpers helpers) {
  std::vector<int> done(100, 0);
  const auto count = [&]() -> llfast::Worker {
    return [&](std::int64_t task) { ++done[static_cast<std::size_t>(task)]; };
  };
  expect(llfast::run_tasks(100, 4, helpers, count, [] { return false; }), "tasks did not finish");
  expect(done == std::vector<int>(100, 1), "a task was lost or repeated");
  int asked = 0;
  expect(!llfast::run_tasks(100, 1, helpers, count, [&] { return ++asked == 3; }),
         "was not interrupted");
  expect(asked == 3, "went on after the interrupt");
  bool thrown = false;
  try {
    const auto fail = []() -> llfast::Worker {
      return [](std::int64_t task) {
        if (task == 50) throw std::runtime_error("task 50");
      };
    };
    llfast::run_tasks(1000, 4, helpers, fail, [] { return false; });
  } catch (const std::runtime_error& error) {
    thrown = std::string(error.what()) == "task 50";
  }
  expect(thrown, "a worker's exception was lost");
}

}  // namespace

// `amx` checks that set alone, in bf16: with emulated tiles, also where the processor has none.
int main(int count, char** words) {
  const bool amx = count > 1 && std::string(words[1]) == "amx";
  check_tasks(llfast::Helpers::kNew);
  expect(parallel_regions == 0, "OpenMP was used where new threads were asked for");
  check_tasks(llfast::Helpers::kOpenMp);
  expect(parallel_regions == 2, "OpenMP was not used where there was a use for it");
  std::vector<InstructionSet> sets = llfast::available_instruction_sets();
  std::vector<DType> dtypes = {DType::kFloat32, DType::kBFloat16, DType::kFloat16};
  if (amx) {
    sets = {InstructionSet::kAmxBFloat16};
    dtypes = {DType::kBFloat16};
  }
  for (InstructionSet set : sets) {
    for (DType dtype : dtypes) {
      check_head(set, dtype, 1, 1, 1, false);
      check_head(set, dtype, 1, 131, 17, true);
      check_head(set, dtype, 50, 1030, 33, true);
      check_head(set, dtype, 7, 2049, 16, false);
      check_head(set, dtype, 8, 130, 1029, true);
      check_head(set, dtype, 3, 2100, 65, false, true);
      check_head(set, dtype, 100, 70, 1601, true, true);  // blocks of rows and of depth
      check_head(set, dtype, 530, 33, 1025, false);       // more rows than any task has
      check_head(set, dtype, 135, 600, 1100, true);  // too few for whole blocks, of five depths
      check_head(set, dtype, 2, 5, 40000, true);     // blocks of depth that do not come out even
    }
  }
  return failures == 0 ? 0 : 1;
}
