#include "pool.h"

#include <algorithm>
#include <atomic>
#include <condition_variable>
#include <memory>
#include <mutex>

namespace jaxquant {

// The calling thread works too, and waits for tasks that have begun only, so a pool of threads that
// all multiply cannot lock up. What starts late finds no task and touches nothing.
void run_tasks(int64_t tasks, const Pool& pool, const std::function<void(int64_t)>& task) {
  struct Shared {
    std::atomic<int64_t> next{0};
    int64_t done = 0;
    std::mutex mutex;
    std::condition_variable all_done;
  };
  const auto shared = std::make_shared<Shared>();
  const auto work = [shared, tasks, &task] {
    int64_t own = 0;
    for (int64_t i; (i = shared->next.fetch_add(1)) < tasks; ++own) task(i);
    if (own == 0) return;
    const std::lock_guard<std::mutex> lock(shared->mutex);
    shared->done += own;
    if (shared->done == tasks) shared->all_done.notify_all();
  };
  for (int64_t i = 1; i < std::min(pool.threads, tasks); ++i) pool.schedule(work);
  work();
  std::unique_lock<std::mutex> lock(shared->mutex);
  shared->all_done.wait(lock, [&] { return shared->done == tasks; });
}

}  // namespace jaxquant
