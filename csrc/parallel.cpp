#include "parallel.h"

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

}  // namespace

bool run_tasks(std::int64_t tasks, int threads, const std::function<Worker()>& make_worker,
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
  {
    Crew crew(stop);
    const std::int64_t helpers = std::min<std::int64_t>(threads, tasks) - 1;
    for (std::int64_t i = 0; i < helpers; ++i) crew.add([&work] { work(nullptr); });
    was_interrupted = work(interrupted);
    crew.join();
  }
  if (failure) std::rethrow_exception(failure);
  return !was_interrupted;
}

}  // namespace llfast
