// Independent units of work, handed out one by one to torch's own OpenMP threads.
#pragma once

#include <atomic>

namespace peftmux {

// Run body(0) .. body(count - 1), each once, in any order, by up to `threads` threads; returns when all are done.
// Which thread runs a unit never changes its result.
template <class Body>
inline void share(int threads, int count, const Body& body) {
  if (threads <= 1 || count <= 1) {
    for (int i = 0; i < count; ++i) body(i);
    return;
  }
  std::atomic<int> next{0};
#pragma omp parallel num_threads(threads)
  for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < count;) body(i);
}

// As `share`, for two stages: every unit of the first is done before one of the second begins.
template <class First, class Second>
inline void share(int threads, int first_count, const First& first, int second_count, const Second& second) {
  if (threads <= 1) {
    share(1, first_count, first);
    share(1, second_count, second);
    return;
  }
  std::atomic<int> next{0}, after{0};
#pragma omp parallel num_threads(threads)
  {
    for (int i; (i = next.fetch_add(1, std::memory_order_relaxed)) < first_count;) first(i);
#pragma omp barrier
    for (int i; (i = after.fetch_add(1, std::memory_order_relaxed)) < second_count;) second(i);
  }
}

}  // namespace peftmux
