// What the ranks of one host exchange through memory that all of them map: all-reduce, all-gather of columns, and
// messages from one pipeline stage to the next. `engine/distributed/shared_memory.py` makes the memory and calls
// these functions.
//
// A group's memory is one flag per rank, then slots.
//
// In a tensor parallel group every rank writes to two slots, and operation s uses slot s % 2. A rank raises its flag
// to s when its part of operation s is written. The same flag also says that the rank has read all parts of s - 1.
// So a rank that has seen every flag at s - 1 may overwrite the slot of s - 2.
//
// In a stage link, rank 0 writes message after message into the slots in turn and raises its flag to the number of
// messages written. Rank 1 raises its flag to the number of messages read.
//
// A waiting rank spins for a moment, then sleeps on the flag as a futex. It wakes every few milliseconds to check
// that the other ranks are alive. A rank that ends in an orderly way sets `left`, because the operating system needs
// tens of milliseconds to end a process.

#include <limits.h>
#include <linux/futex.h>
#include <poll.h>
#include <stddef.h>
#include <stdint.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

extern "C" {
void* memcpy(void*, const void*, size_t);

struct Group {  // one rank's view; `_Group` in engine/distributed/shared_memory.py declares the same
  char* memory;
  const int* pidfds;  // of the other ranks' processes: a pidfd can be read once its process has ended
  long num_pidfds;
  long timeout_s;
  long slots;  // per rank that writes; a power of two, so that `step % slots` survives the wrap of `step`
  long slot_bytes;
  int32_t rank;
  int32_t ranks;
  uint32_t step;  // operations so far; wraps around
};
}

namespace {

constexpr int SPINS = 2000;  // pauses before a rank sleeps: 20 to 100 microseconds
constexpr long CHECK_ALIVE_NS = 5 * 1000 * 1000;  // a sleeping rank checks the others this often

enum Result { DONE = 0, RANK_GONE = 1, TIMED_OUT = 2 };

struct alignas(128) Flag {  // 128, not 64: CPUs prefetch cache lines in pairs
  uint32_t value;  // wraps around
  uint32_t sleepers;
  uint32_t left;  // 1 when the rank ends
};

Flag& flag_of(const Group& g, long rank) { return reinterpret_cast<Flag*>(g.memory)[rank]; }

char* slot_of(const Group& g, long rank, uint32_t step) {
  return g.memory + g.ranks * sizeof(Flag) + (rank * g.slots + step % g.slots) * g.slot_bytes;
}

long min(long a, long b) { return a < b ? a : b; }

bool has_reached(uint32_t value, uint32_t wanted) { return int32_t(value - wanted) >= 0; }

void wake(Flag& flag) { syscall(SYS_futex, &flag.value, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

void raise(const Group& g, uint32_t value) {
  Flag& flag = flag_of(g, g.rank);
  __atomic_store_n(&flag.value, value, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&flag.sleepers, __ATOMIC_SEQ_CST)) wake(flag);
}

bool all_alive(const Group& g) {
  for (long rank = 0; rank < g.ranks; ++rank)
    if (rank != g.rank && __atomic_load_n(&flag_of(g, rank).left, __ATOMIC_SEQ_CST)) return false;
  for (long i = 0; i < g.num_pidfds; ++i) {
    pollfd process{g.pidfds[i], POLLIN, 0};
    if (poll(&process, 1, 0) > 0) return false;
  }
  return true;
}

long now_s() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return now.tv_sec;
}

Result sleep_until(const Group& g, Flag& flag, uint32_t value) {
  const long deadline = now_s() + g.timeout_s;
  Result result = DONE;
  __atomic_add_fetch(&flag.sleepers, 1, __ATOMIC_SEQ_CST);
  for (;;) {
    const uint32_t seen = __atomic_load_n(&flag.value, __ATOMIC_SEQ_CST);
    if (has_reached(seen, value)) {  // counts even if the rank has ended since
      result = DONE;
      break;
    }
    if (result != DONE) break;
    result = !all_alive(g) ? RANK_GONE : now_s() > deadline ? TIMED_OUT : DONE;
    const timespec interval{0, CHECK_ALIVE_NS};
    if (result == DONE) syscall(SYS_futex, &flag.value, FUTEX_WAIT, seen, &interval, nullptr, 0);
  }
  __atomic_sub_fetch(&flag.sleepers, 1, __ATOMIC_SEQ_CST);
  return result;
}

Result wait_for(const Group& g, long rank, uint32_t value) {
  Flag& flag = flag_of(g, rank);
  for (int spins = 0; spins < SPINS; ++spins) {
    if (has_reached(__atomic_load_n(&flag.value, __ATOMIC_SEQ_CST), value)) return DONE;
    __builtin_ia32_pause();
  }
  return sleep_until(g, flag, value);
}

Result wait_for_all(const Group& g, uint32_t value) {
  for (long rank = 0; rank < g.ranks; ++rank) {
    if (rank == g.rank) continue;
    if (const Result result = wait_for(g, rank, value)) return result;
  }
  return DONE;
}

// Writes this rank's part of the next operation, then waits until all other ranks have written theirs.
Result exchange(Group& g, const void* part, long bytes) {
  if (const Result result = wait_for_all(g, g.step)) return result;
  ++g.step;
  memcpy(slot_of(g, g.rank, g.step), part, bytes);
  raise(g, g.step);
  return wait_for_all(g, g.step);
}

}  // namespace

extern "C" {

// All-reduce: x becomes the sum of all ranks' x, added in rank order.
int phalanx_shm_sum(Group* group, float* x, long count) {
  Group& g = *group;
  const long per_slot = g.slot_bytes / long(sizeof(float));
  for (long start = 0; start < count; start += per_slot) {
    const long n = min(per_slot, count - start);
    if (const Result result = exchange(g, x + start, n * sizeof(float))) return result;
    const float* first = reinterpret_cast<float*>(slot_of(g, 0, g.step));
    float* out = x + start;
    const float* second = reinterpret_cast<float*>(slot_of(g, 1, g.step));
    for (long i = 0; i < n; ++i) out[i] = first[i] + second[i];
    for (long rank = 2; rank < g.ranks; ++rank) {
      const float* part = reinterpret_cast<float*>(slot_of(g, rank, g.step));
      for (long i = 0; i < n; ++i) out[i] += part[i];
    }
  }
  return DONE;
}

// All-gather of columns: row i of `out` is the concatenation of all ranks' rows i, of `width` bytes each.
int phalanx_shm_gather(Group* group, const char* part, char* out, long rows, long width) {
  Group& g = *group;
  const long bytes = rows * width;
  for (long start = 0; start < bytes; start += g.slot_bytes) {
    const long end = min(start + g.slot_bytes, bytes);
    if (const Result result = exchange(g, part + start, end - start)) return result;
    for (long rank = 0; rank < g.ranks; ++rank) {
      const char* slot = slot_of(g, rank, g.step);
      for (long at = start; at < end;) {
        const long row = at / width, column = at % width, n = min(width - column, end - at);
        memcpy(out + (row * g.ranks + rank) * width + column, slot + (at - start), n);
        at += n;
      }
    }
  }
  return DONE;
}

// Sends a message of at most `slot_bytes` from rank 0 to rank 1. Waits while all slots are full.
int phalanx_shm_send(Group* group, const void* data, long bytes) {
  Group& g = *group;
  const uint32_t step = g.step + 1;
  if (const Result result = wait_for(g, 1, step - uint32_t(g.slots))) return result;
  memcpy(slot_of(g, 0, step), data, bytes);
  raise(g, g.step = step);
  return DONE;
}

// Receives the next message. Both ranks know its size.
int phalanx_shm_receive(Group* group, void* data, long bytes) {
  Group& g = *group;
  const uint32_t step = g.step + 1;
  if (const Result result = wait_for(g, 0, step)) return result;
  memcpy(data, slot_of(g, 0, step), bytes);
  raise(g, g.step = step);
  return DONE;
}

// Marks this rank as ended. A rank that waits for it, now or later, gets RANK_GONE.
void phalanx_shm_leave(Group* group) {
  Flag& flag = flag_of(*group, group->rank);
  __atomic_store_n(&flag.left, 1, __ATOMIC_SEQ_CST);
  wake(flag);
}

}  // extern "C"
