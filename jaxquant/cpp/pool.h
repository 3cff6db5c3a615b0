// Tasks in the threads of XLA.
#pragma once

#include <cstdint>
#include <functional>

namespace jaxquant {

// Threads that run what they are given, whenever they can; none need.
struct Pool {
  int64_t threads = 0;
  std::function<void(std::function<void()>)> schedule;
};

// Run tasks 0, 1, ... each once, in any order; return when all are done.
void run_tasks(int64_t tasks, const Pool& pool, const std::function<void(int64_t)>& task);

}  // namespace jaxquant
