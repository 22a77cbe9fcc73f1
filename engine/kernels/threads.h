// A thread pool for short loops. `parallel_for` costs about a microsecond, and never waits for a thread that has
// taken no item. So a core that another process uses delays a loop by at most one item; an OpenMP barrier would wait
// until that core's thread runs again.

#pragma once

#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <unistd.h>
#include <linux/futex.h>
#include <sys/syscall.h>

namespace phalanx {

constexpr int SPINS = 2000;  // pauses before an idle thread sleeps: 20 to 100 microseconds
constexpr long MAX_ITEMS = (1 << 24) - 4096;

inline void pause_a_little() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

// Owns: the worker threads, and the loop that they run now. Runs one loop at a time; see `parallel_for`.
//
// `ticket_` packs the loop's number, its number of items, and the next item, in 16 + 24 + 24 bits. One atomic add
// takes an item and tells whether there was one. A loop does not end before every taken item is done, so `body_` and
// `data_` stay valid for a thread that has an item. A thread that comes late finds no item.
class Team {
 public:
  void run(int threads, long count, void (*body)(const void*, long), const void* data) {
    if (threads <= 1 || count <= 1 || count > MAX_ITEMS || __atomic_exchange_n(&busy_, 1, __ATOMIC_ACQUIRE)) {
      for (long i = 0; i < count; ++i) body(data, i);  // another caller's loop runs: run this one on its own thread
      return;
    }
    while (workers_ < threads - 1 && hire()) {}
    body_ = body, data_ = data, done_ = 0;
    __atomic_store_n(&wanted_, threads - 1, __ATOMIC_RELAXED);
    __atomic_store_n(&ticket_, uint64_t(++loops_) << 48 | uint64_t(count) << 24, __ATOMIC_SEQ_CST);
    if (__atomic_load_n(&sleepers_, __ATOMIC_SEQ_CST)) {
      __atomic_add_fetch(&wakes_, 1, __ATOMIC_SEQ_CST);
      syscall(SYS_futex, &wakes_, FUTEX_WAKE_PRIVATE, threads - 1, nullptr, nullptr, 0);
    }
    while (take_one()) {}
    for (int spins = 0; __atomic_load_n(&done_, __ATOMIC_ACQUIRE) < count; ++spins)
      spins < SPINS ? pause_a_little() : void(sched_yield());
    __atomic_store_n(&busy_, 0, __ATOMIC_RELEASE);
  }

 private:
  // Returns false when the system gives no more threads. The pool then uses fewer.
  bool hire() {
    pthread_t thread;
    auto start = [](void* number) -> void* { return team.work(long(number)), nullptr; };
    if (pthread_create(&thread, nullptr, start, reinterpret_cast<void*>(workers_)) != 0) return false;
    pthread_detach(thread);
    ++workers_;
    return true;
  }

  bool has_items() const {
    const uint64_t ticket = __atomic_load_n(&ticket_, __ATOMIC_SEQ_CST);
    return (ticket & 0xffffff) < (ticket >> 24 & 0xffffff);
  }

  bool take_one() {
    if (!has_items()) return false;
    const uint64_t ticket = __atomic_fetch_add(&ticket_, 1, __ATOMIC_ACQ_REL);
    const long item = long(ticket & 0xffffff), count = long(ticket >> 24 & 0xffffff);
    if (item >= count) return false;
    body_(data_, item);
    __atomic_add_fetch(&done_, 1, __ATOMIC_RELEASE);
    return true;
  }

  [[noreturn]] void work(long number) {
    for (;;) {
      for (int spins = 0; spins < SPINS; ++spins) {
        if (number < __atomic_load_n(&wanted_, __ATOMIC_RELAXED) && take_one())
          spins = 0;
        else
          pause_a_little();
      }
      const int wakes = __atomic_load_n(&wakes_, __ATOMIC_SEQ_CST);
      __atomic_add_fetch(&sleepers_, 1, __ATOMIC_SEQ_CST);
      if (!has_items() || number >= __atomic_load_n(&wanted_, __ATOMIC_RELAXED))
        syscall(SYS_futex, &wakes_, FUTEX_WAIT_PRIVATE, wakes, nullptr, nullptr, 0);
      __atomic_sub_fetch(&sleepers_, 1, __ATOMIC_SEQ_CST);
    }
  }

  uint64_t ticket_ = 0;
  void (*body_)(const void*, long) = nullptr;
  const void* data_ = nullptr;
  alignas(64) long done_ = 0;
  alignas(64) int busy_ = 0;
  long workers_ = 0, wanted_ = 0;
  int sleepers_ = 0, wakes_ = 0;
  uint16_t loops_ = 0;
  static Team team;

  template <class F>
  friend void parallel_for(int threads, long count, const F& f);
};

inline Team Team::team;

// Calls f(i) for 0 <= i < count. A thread that is free takes the next i.
template <class F>
void parallel_for(int threads, long count, const F& f) {
  Team::team.run(threads, count, [](const void* data, long i) { (*static_cast<const F*>(data))(i); }, &f);
}

}  // namespace phalanx

using phalanx::parallel_for;
