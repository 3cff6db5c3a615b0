// Arrays beside which no memory is: a byte read or written outside of one ends the program.
#pragma once

#include <sys/mman.h>
#include <unistd.h>

#include <cstddef>
#include <cstdlib>

// An array between two pages that may not be touched, at the end or at the start of what lies there.
template <class T>
class Guarded {
 public:
  Guarded(size_t count, bool at_end) {
    const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
    const size_t bytes = count * sizeof(T), inner = (bytes + page - 1) / page * page;
    length_ = inner + 2 * page;
    start_ = static_cast<char*>(
        mmap(nullptr, length_, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0));
    if (start_ == MAP_FAILED || mprotect(start_ + page, inner, PROT_READ | PROT_WRITE)) abort();
    data = reinterpret_cast<T*>(start_ + page + (at_end ? inner - bytes : 0));
  }
  ~Guarded() { munmap(start_, length_); }
  Guarded(const Guarded&) = delete;
  T* data;

 private:
  char* start_;
  size_t length_;
};
