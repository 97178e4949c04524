// The Python module llfast._native: converts arguments, releases the GIL, and nothing else. Here is
// the head; each of the other parts has a file of its own.
#include "bindings.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <array>
#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "instruction_set.h"
#include "partials.h"

namespace py = pybind11;

namespace {

llfast::DType dtype_of(const std::string& name) {
  if (name == "float32") return llfast::DType::kFloat32;
  if (name == "bfloat16") return llfast::DType::kBFloat16;
  if (name == "float16") return llfast::DType::kFloat16;
  throw std::invalid_argument("dtype must be float32, bfloat16 or float16, got '" + name + "'");
}

// Addresses come from Tensor.data_ptr(); 0 stands for null.
template <class T>
T* pointer(std::uintptr_t address) {
  // NOLINTNEXTLINE(performance-no-int-to-ptr): Python has addresses as numbers only
  return reinterpret_cast<T*>(address);
}

// The addresses of five arrays: max, sum, weighted sum, target logit, arg max.
using Addresses = std::array<std::uintptr_t, 5>;

llfast::PartialArrays partial_arrays(const Addresses& addresses) {
  return {pointer<float>(addresses[0]), pointer<float>(addresses[1]), pointer<float>(addresses[2]),
          pointer<float>(addresses[3]), pointer<std::int32_t>(addresses[4])};
}

void head_partials(std::uintptr_t hidden, std::int64_t hidden_stride, std::uintptr_t lm_head,
                   std::int64_t lm_head_stride, std::uintptr_t bias, std::uintptr_t targets,
                   const Addresses& parts, std::int64_t first_word, std::int64_t tokens,
                   std::int64_t vocabulary, std::int64_t width, const std::string& dtype,
                   float scale, std::optional<float> softcap, int threads,
                   const std::string& instruction_set) {
  llfast::HeadProblem problem{};
  problem.hidden = pointer<const void>(hidden);
  problem.lm_head = pointer<const void>(lm_head);
  problem.bias = pointer<const float>(bias);
  problem.targets = pointer<const std::int64_t>(targets);
  problem.first_word = first_word;
  problem.tokens = tokens;
  problem.vocabulary = vocabulary;
  problem.width = width;
  problem.hidden_stride = hidden_stride;
  problem.lm_head_stride = lm_head_stride;
  problem.dtype = dtype_of(dtype);
  problem.scale = scale;
  problem.softcap = softcap.value_or(0.0f);
  const llfast::InstructionSet set = llfast::choose_instruction_set(instruction_set);
  bool finished = false;
  {
    const py::gil_scoped_release release;
    finished =
        llfast::head_partials(problem, partial_arrays(parts), set, threads, llfast::SignalCheck());
  }
  if (!finished) throw py::error_already_set();
}

void fold_partials(const Addresses& parts, std::int64_t count, std::int64_t tokens,
                   const Addresses& total, const std::string& instruction_set) {
  const llfast::InstructionSet set = llfast::choose_instruction_set(instruction_set);
  const py::gil_scoped_release release;
  llfast::fold_partials(partial_arrays(parts), count, tokens, partial_arrays(total), set);
}

void statistics(const Addresses& total, std::int64_t tokens, std::uintptr_t logprobs,
                std::uintptr_t lse, std::uintptr_t target_logits, std::uintptr_t entropy,
                std::uintptr_t argmax) {
  const py::gil_scoped_release release;
  llfast::statistics_of(
      partial_arrays(total), tokens,
      {pointer<float>(logprobs), pointer<float>(lse), pointer<float>(target_logits),
       pointer<float>(entropy), pointer<std::int64_t>(argmax)});
}

}  // namespace

// NOLINTNEXTLINE(misc-const-correctness): of a variable in the macro
PYBIND11_MODULE(_native, module) {
  module.doc() = "The C++ core of llfast. Addresses are trusted: call it through llfast.kernels.";
  module.attr("GROUP") = llfast::kGroup;
  module.def("head_partials", &head_partials, py::kw_only(), py::arg("hidden"),
             py::arg("hidden_stride"), py::arg("lm_head"), py::arg("lm_head_stride"),
             py::arg("bias"), py::arg("targets"), py::arg("parts"), py::arg("first_word"),
             py::arg("tokens"), py::arg("vocabulary"), py::arg("width"), py::arg("dtype"),
             py::arg("scale"), py::arg("softcap"), py::arg("threads"), py::arg("instruction_set"),
             "Writes what each group of words adds to the softmax, (groups, T), to the arrays of "
             "`parts`. Matrices and vectors are addresses, strides count elements.");
  module.def("fold_partials", &fold_partials, py::kw_only(), py::arg("parts"), py::arg("count"),
             py::arg("tokens"), py::arg("total"), py::arg("instruction_set"),
             "Folds parts, (count, T), into total, (T,), from left to right.");
  module.def("statistics", &statistics, py::kw_only(), py::arg("total"), py::arg("tokens"),
             py::arg("logprobs"), py::arg("lse"), py::arg("target_logits"), py::arg("entropy"),
             py::arg("argmax"), "Writes the statistics of partials, each (T,).");
  module.def(
      "choose_instruction_set",
      [](const std::string& name) {
        return std::string(llfast::name_of(llfast::choose_instruction_set(name)));
      },
      py::arg("name"), "The instruction set of that name, or the fastest one for ''.");
  module.def(
      "available_instruction_sets",
      [] {
        std::vector<std::string> names;
        for (const llfast::InstructionSet set : llfast::available_instruction_sets()) {
          names.emplace_back(llfast::name_of(set));
        }
        return names;
      },
      "The names of the instruction sets of this processor, the slowest first.");
  llfast::bind_reader(module);
}
