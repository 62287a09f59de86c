// Independent units of work, handed out to torch's own OpenMP threads.
#pragma once

#include <atomic>

namespace peftmux {

// Hands out 0 .. count - 1 in runs of neighbours, about eight runs for each thread: what lies side by side in memory is
// then mostly read by one thread.
class Counter {
 public:
  Counter(int threads, int count) : count_(count), grain_(count / (8 * threads) + 1) {}

  template <class Body>
  void work(const Body& body) {
    for (int i; (i = next_.fetch_add(grain_, std::memory_order_relaxed)) < count_;)
      for (int end = i + grain_ < count_ ? i + grain_ : count_; i < end; ++i) body(i);
  }

 private:
  std::atomic<int> next_{0};
  int count_, grain_;
};

// Run body(0) .. body(count - 1), each once, in any order, by up to `threads` threads; returns when all are done.
// Which thread runs a unit never changes its result.
template <class Body>
inline void share(int threads, int count, const Body& body) {
  if (threads <= 1 || count <= 1) {
    for (int i = 0; i < count; ++i) body(i);
    return;
  }
  Counter units(threads, count);
#pragma omp parallel num_threads(threads)
  units.work(body);
}

// As `share`, for two stages: every unit of the first is done before one of the second begins.
template <class First, class Second>
inline void share(int threads, int first_count, const First& first, int second_count, const Second& second) {
  if (threads <= 1) {
    share(1, first_count, first);
    share(1, second_count, second);
    return;
  }
  Counter before(threads, first_count), after(threads, second_count);
#pragma omp parallel num_threads(threads)
  {
    before.work(first);
#pragma omp barrier
    after.work(second);
  }
}

}  // namespace peftmux
