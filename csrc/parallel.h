// Numbered tasks over threads.
#pragma once

#include <cstdint>
#include <functional>

namespace llfast {

// Runs one numbered task.
using Worker = std::function<void(std::int64_t task)>;

// Which threads help the calling one.
enum class Helpers {
  kNew,     // those that live as long as the call
  kOpenMp,  // those that wait in the process's OpenMP runtime, if it has one; otherwise new ones
};

// Runs tasks 0 .. tasks-1, each once and in any order, on `threads` threads, the calling one among
// them. `make_worker` is called once in each thread, so that a worker can own that thread's memory.
//
// `interrupted` is called only in the calling thread, between tasks; when it returns true no new
// task is begun and the result is false, even if that was the last one. An exception of a worker
// also stops the others, and is thrown here after all threads have ended.
bool run_tasks(std::int64_t tasks, int threads, Helpers helpers,
               const std::function<Worker()>& make_worker,
               const std::function<bool()>& interrupted);

}  // namespace llfast
