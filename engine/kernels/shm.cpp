// What ranks of one host say to each other through memory that all of them map: sums, columns side by side,
// and messages from one stage to the next. `engine/distributed/shm.py` makes the memory and calls this.
//
// A group's memory is a flag for each rank, then slots. In a row every rank has two slots, and operation s
// uses slot s % 2: a rank raises its flag to s once its part is written, which also says that it has read
// all of s - 1; whoever has seen every flag at s - 1 may overwrite what s - 2 used. Between stages, rank 0
// writes messages into slots in turn and raises its flag to their number, and so does rank 1 when it has
// taken them out.
//
// Waiting spins a little, then sleeps on the flag as a futex, and now and then looks whether the others live.
// A rank that ends in order says so, since the kernel takes tens of milliseconds to take a process down.

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

struct Group {  // one rank's end; `engine/distributed/shm.py` declares the same
  char* memory;
  const int* lives;  // of the other ranks' processes: descriptors that can be read once they have ended
  long others;
  long timeout_s;
  long slots;  // of each rank that writes; a power of two, since steps wrap around
  long slot_bytes;
  int32_t rank;
  int32_t ranks;
  uint32_t step;  // operations so far
};
}

namespace {

constexpr int SPINS = 2000;  // pauses before a rank sleeps: some 20 to 100 microseconds
constexpr long LOOK_NS = 5 * 1000 * 1000;

enum Result { DONE = 0, LOST = 1, LATE = 2 };

struct alignas(128) Flag {  // CPUs fetch cache lines in pairs
  uint32_t value;  // wraps around
  uint32_t sleepers;
  uint32_t left;  // whether the rank has ended
};

Flag& flag_of(const Group& g, long rank) { return reinterpret_cast<Flag*>(g.memory)[rank]; }

char* slot_of(const Group& g, long rank, uint32_t step) {
  return g.memory + g.ranks * sizeof(Flag) + (rank * g.slots + step % g.slots) * g.slot_bytes;
}

long least(long a, long b) { return a < b ? a : b; }

bool is_past(uint32_t value, uint32_t wanted) { return int32_t(value - wanted) >= 0; }

void wake(Flag& flag) { syscall(SYS_futex, &flag.value, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0); }

void raise(const Group& g, uint32_t value) {
  Flag& flag = flag_of(g, g.rank);
  __atomic_store_n(&flag.value, value, __ATOMIC_SEQ_CST);
  if (__atomic_load_n(&flag.sleepers, __ATOMIC_SEQ_CST)) wake(flag);
}

bool all_live(const Group& g) {
  for (long rank = 0; rank < g.ranks; ++rank)
    if (rank != g.rank && __atomic_load_n(&flag_of(g, rank).left, __ATOMIC_SEQ_CST)) return false;
  for (long i = 0; i < g.others; ++i) {
    pollfd life{g.lives[i], POLLIN, 0};
    if (poll(&life, 1, 0) > 0) return false;
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
    if (is_past(seen, value)) {  // even if its rank has ended since
      result = DONE;
      break;
    }
    if (result != DONE) break;
    result = !all_live(g) ? LOST : now_s() > deadline ? LATE : DONE;
    const timespec most{0, LOOK_NS};
    if (result == DONE) syscall(SYS_futex, &flag.value, FUTEX_WAIT, seen, &most, nullptr, 0);
  }
  __atomic_sub_fetch(&flag.sleepers, 1, __ATOMIC_SEQ_CST);
  return result;
}

Result wait_for(const Group& g, long rank, uint32_t value) {
  Flag& flag = flag_of(g, rank);
  for (int spins = 0; spins < SPINS; ++spins) {
    if (is_past(__atomic_load_n(&flag.value, __ATOMIC_SEQ_CST), value)) return DONE;
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

// Writes this rank's part of the next operation and waits for those of the others.
Result exchange(Group& g, const void* part, long bytes) {
  if (const Result result = wait_for_all(g, g.step)) return result;
  ++g.step;
  memcpy(slot_of(g, g.rank, g.step), part, bytes);
  raise(g, g.step);
  return wait_for_all(g, g.step);
}

}  // namespace

extern "C" {

// x becomes the sum of all ranks' x, added in the order of ranks.
int phalanx_shm_sum(Group* group, float* x, long count) {
  Group& g = *group;
  const long most = g.slot_bytes / long(sizeof(float));
  for (long start = 0; start < count; start += most) {
    const long n = least(most, count - start);
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

// Every row of `out` becomes the ranks' rows side by side; a rank's rows have `width` bytes.
int phalanx_shm_gather(Group* group, const char* part, char* out, long rows, long width) {
  Group& g = *group;
  const long bytes = rows * width;
  for (long start = 0; start < bytes; start += g.slot_bytes) {
    const long end = least(start + g.slot_bytes, bytes);
    if (const Result result = exchange(g, part + start, end - start)) return result;
    for (long rank = 0; rank < g.ranks; ++rank) {
      const char* slot = slot_of(g, rank, g.step);
      for (long at = start; at < end;) {
        const long row = at / width, column = at % width, n = least(width - column, end - at);
        memcpy(out + (row * g.ranks + rank) * width + column, slot + (at - start), n);
        at += n;
      }
    }
  }
  return DONE;
}

// Rank 0's message to rank 1, of at most a slot. Waits while all slots are full.
int phalanx_shm_send(Group* group, const void* data, long bytes) {
  Group& g = *group;
  const uint32_t step = g.step + 1;
  if (const Result result = wait_for(g, 1, step - uint32_t(g.slots))) return result;
  memcpy(slot_of(g, 0, step), data, bytes);
  raise(g, g.step = step);
  return DONE;
}

// The next message, whose size both know.
int phalanx_shm_receive(Group* group, void* data, long bytes) {
  Group& g = *group;
  const uint32_t step = g.step + 1;
  if (const Result result = wait_for(g, 0, step)) return result;
  memcpy(data, slot_of(g, 0, step), bytes);
  raise(g, g.step = step);
  return DONE;
}

// Says that this rank ends; whoever waits for it, now or later, is told that it is lost.
void phalanx_shm_leave(Group* group) {
  Flag& flag = flag_of(*group, group->rank);
  __atomic_store_n(&flag.left, 1, __ATOMIC_SEQ_CST);
  wake(flag);
}

}  // extern "C"
