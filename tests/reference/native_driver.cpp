// The C++ core without Python, for sanitisers: buffers of exactly the size used, results against
// plain fp64 loops. Prints what is wrong and exits with 1.
#include <cmath>
#include <cstdint>
#include <cstring>
#include <iostream>
#include <random>
#include <stdexcept>
#include <string>
#include <vector>

#include "instruction_set.h"
#include "parallel.h"
#include "token_logprobs.h"

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

double truth(const llfast::LogprobProblem& problem, const Matrix& hidden, const Matrix& lm_head,
             std::int64_t row) {
  double sum = 0;
  double target = 0;
  for (std::int64_t v = 0; v < problem.vocabulary; ++v) {
    double z = problem.bias == nullptr ? 0.0 : problem.bias[v];
    for (std::int64_t d = 0; d < problem.width; ++d) z += hidden.at(row, d) * lm_head.at(v, d);
    z *= problem.scale;
    if (problem.softcap != 0) z = problem.softcap * std::tanh(z / problem.softcap);
    sum += std::exp(z);
    if (v == problem.targets[row]) target = z;
  }
  return target - std::log(sum);
}

void check_logprobs(InstructionSet set, DType dtype, std::int64_t tokens, std::int64_t vocabulary,
                    std::int64_t width, bool with_options) {
  std::mt19937 random(static_cast<unsigned>(tokens + vocabulary + width));
  const Matrix hidden(tokens, width, width + 3, dtype, random);
  const Matrix lm_head(vocabulary, width, width + (with_options ? 1 : 0), dtype, random);
  std::vector<float> bias(static_cast<std::size_t>(vocabulary), 0.25f);
  std::vector<std::int64_t> targets;
  for (std::int64_t t = 0; t < tokens; ++t) targets.push_back(vocabulary - 1 - t % vocabulary);
  std::vector<float> logprobs(static_cast<std::size_t>(tokens));
  llfast::LogprobProblem problem{};
  problem.hidden = hidden.data;
  problem.lm_head = lm_head.data;
  problem.bias = with_options ? bias.data() : nullptr;
  problem.targets = targets.data();
  problem.logprobs = logprobs.data();
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
  expect(llfast::token_logprobs(problem, set, 3, [] { return false; }), name + " did not finish");
  for (std::int64_t t = 0; t < tokens; ++t) {
    const double error =
        std::abs(logprobs[static_cast<std::size_t>(t)] - truth(problem, hidden, lm_head, t));
    expect(error < 2e-5, name + " is off by " + std::to_string(error));
  }
}

void check_tasks() {
  std::vector<int> done(100, 0);
  const auto count = [&]() -> llfast::Worker {
    return [&](std::int64_t task) { ++done[static_cast<std::size_t>(task)]; };
  };
  expect(llfast::run_tasks(100, 4, count, [] { return false; }), "tasks did not finish");
  expect(done == std::vector<int>(100, 1), "a task was lost or repeated");
  int asked = 0;
  expect(!llfast::run_tasks(100, 1, count, [&] { return ++asked == 3; }), "was not interrupted");
  expect(asked == 3, "went on after the interrupt");
  bool thrown = false;
  try {
    const auto fail = []() -> llfast::Worker {
      return [](std::int64_t task) {
        if (task == 50) throw std::runtime_error("task 50");
      };
    };
    llfast::run_tasks(1000, 4, fail, [] { return false; });
  } catch (const std::runtime_error& error) {
    thrown = std::string(error.what()) == "task 50";
  }
  expect(thrown, "a worker's exception was lost");
}

}  // namespace

int main() {
  check_tasks();
  for (InstructionSet set : llfast::available_instruction_sets()) {
    for (DType dtype : {DType::kFloat32, DType::kBFloat16, DType::kFloat16}) {
      check_logprobs(set, dtype, 1, 1, 1, false);
      check_logprobs(set, dtype, 1, 131, 17, true);
      check_logprobs(set, dtype, 50, 1030, 33, true);
      check_logprobs(set, dtype, 7, 2049, 16, false);
      check_logprobs(set, dtype, 8, 130, 1029, true);
    }
  }
  return failures == 0 ? 0 : 1;
}
