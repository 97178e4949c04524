// What the parts of the module llfast._native share.
#pragma once

#include <pybind11/pybind11.h>

#include <chrono>

namespace llfast {

// True, with the exception set, once a signal's Python handler has raised. Asks every 50 ms only:
// it needs the GIL, which another thread may hold.
class SignalCheck {
 public:
  bool operator()() {
    const auto now = std::chrono::steady_clock::now();
    if (now - last_ < std::chrono::milliseconds(50)) return false;
    last_ = now;
    const pybind11::gil_scoped_acquire acquire;
    return PyErr_CheckSignals() != 0;
  }

 private:
  std::chrono::steady_clock::time_point last_ = std::chrono::steady_clock::now();
};

// Adds Memory, FileReader and ReadStatistics.
void bind_reader(const pybind11::module_& module);

}  // namespace llfast
