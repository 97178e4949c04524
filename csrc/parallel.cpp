#include "parallel.h"

#include <dlfcn.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <exception>
#include <mutex>
#include <thread>
#include <vector>

namespace llfast {
namespace {

// Threads that are told to stop and then joined on every way out.
class Crew {
 public:
  explicit Crew(std::atomic<bool>& stop) : stop_(stop) {}
  Crew(const Crew&) = delete;
  Crew& operator=(const Crew&) = delete;
  ~Crew() {
    stop_ = true;
    join();
  }

  void add(const std::function<void()>& body) { threads_.emplace_back(body); }

  void join() {
    for (std::thread& thread : threads_) thread.join();
    threads_.clear();
  }

 private:
  std::atomic<bool>& stop_;
  std::vector<std::thread> threads_;
};

// How compilers enter a parallel region: `body(data)` on at most so many threads, the calling one
// among them. GCC's runtime has it, and those of LLVM and Intel have it for GCC's sake.
using ParallelRegion = void (*)(void (*body)(void*), void* data, unsigned threads, unsigned flags);

const pid_t loaded_in = getpid();

// Null where the process has no OpenMP, and after a fork: the runtime would wait for threads that
// the child does not have.
ParallelRegion parallel_region() {
  static const auto region = reinterpret_cast<ParallelRegion>(dlsym(RTLD_DEFAULT, "GOMP_parallel"));
  return getpid() == loaded_in ? region : nullptr;
}

}  // namespace

bool run_tasks(std::int64_t tasks, int threads, Helpers helpers,
               const std::function<Worker()>& make_worker,
               const std::function<bool()>& interrupted) {
  std::atomic<std::int64_t> next{0};
  std::atomic<bool> stop{false};
  std::mutex failure_mutex;
  std::exception_ptr failure;

  // Returns whether `should_stop` said so.
  const auto work = [&](const std::function<bool()>& should_stop) {
    try {
      const Worker worker = make_worker();
      while (!stop) {
        const std::int64_t task = next.fetch_add(1);
        if (task >= tasks) break;
        worker(task);
        if (should_stop && should_stop()) {
          stop = true;
          return true;
        }
      }
    } catch (...) {
      const std::lock_guard<std::mutex> lock(failure_mutex);
      if (!failure) failure = std::current_exception();
      stop = true;
    }
    return false;
  };

  bool was_interrupted = false;
  const auto crew_size = static_cast<int>(std::min<std::int64_t>(threads, tasks));
  const ParallelRegion region =
      helpers == Helpers::kOpenMp && crew_size > 1 ? parallel_region() : nullptr;
  if (region != nullptr) {
    const std::thread::id caller = std::this_thread::get_id();
    std::function<void()> body = [&] {
      if (std::this_thread::get_id() == caller) {
        was_interrupted = work(interrupted);
      } else {
        work(nullptr);
      }
    };
    region([](void* data) { (*static_cast<std::function<void()>*>(data))(); }, &body,
           static_cast<unsigned>(crew_size), 0);
  } else {
    Crew crew(stop);
    for (int i = 1; i < crew_size; ++i) crew.add([&work] { work(nullptr); });
    was_interrupted = work(interrupted);
    crew.join();
  }
  if (failure) std::rethrow_exception(failure);
  return !was_interrupted;
}

}  // namespace llfast
