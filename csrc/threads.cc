#include "threads.h"

#include <pthread.h>
#include <sched.h>
#include <unistd.h>

#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace pennyweight {
namespace {

using Task = void (*)(void*, std::size_t, std::size_t);

constexpr std::size_t kMostThreads = 256;
constexpr std::size_t kFewWorkers = 8;
// Between two products of one token lie some microseconds: whoever sleeps in between is woken too late.
constexpr std::chrono::microseconds kSpinning{1000};

inline void relax() {
#if defined(__x86_64__) || defined(__i386__)
  __builtin_ia32_pause();
#elif defined(__aarch64__)
  asm volatile("yield");
#endif
}

class Pool {
 public:
  void run(std::size_t threads, std::size_t count, Task task, void* context) {
    while (workers_.size() + 1 < threads) {
      std::thread worker([this, number = workers_.size() + 1] { work(number); });
      workers_.push_back(worker.native_handle());
      worker.detach();
    }
    task_ = task;
    context_ = context;
    count_ = count;
    next_.store(0, std::memory_order_relaxed);
    left_.store(0, std::memory_order_relaxed);
    joined_.store(threads - 1);
    {
      // Under the lock, or a worker that is about to sleep would miss it.
      const std::lock_guard<std::mutex> lock(sleep_);
      call_.store((call_.load(std::memory_order_relaxed) / kMostThreads + 1) * kMostThreads + threads - 1);
    }
    if (sleepers_.load() != 0) {
      keep_off_this_processor(threads);
      wake_.notify_all();
    }
    take(0);
    // Nobody joins any more: whoever has not come by now, because others have its processor, is not waited for.
    const std::uint64_t joined = joined_.exchange(0) / kMostThreads;
    for (std::size_t spins = 0; left_.load(std::memory_order_acquire) != joined; ++spins) {
      relax();
      if (spins % 4096 == 4095) std::this_thread::yield();
    }
  }

  std::mutex owner;

 private:
  // A system that takes the idle processors of a virtual machine for busy ones wakes a thread where its caller runs,
  // and there it waits for milliseconds, until the caller's time is up. Where there are many, that is rare and looking
  // after each takes long.
  void keep_off_this_processor(std::size_t threads) {
#if defined(__linux__) && !defined(__ANDROID__)
    cpu_set_t others;
    const int here = sched_getcpu();
    if (workers_.size() > kFewWorkers || here < 0 || sched_getaffinity(0, sizeof others, &others) != 0) return;
    CPU_CLR(static_cast<std::size_t>(here), &others);
    if (static_cast<std::size_t>(CPU_COUNT(&others)) + 1 < threads) return;
    if (CPU_EQUAL(&others, &given_) && given_to_ == workers_.size()) return;
    for (const pthread_t worker : workers_) pthread_setaffinity_np(worker, sizeof others, &others);
    given_ = others;
    given_to_ = workers_.size();
#endif
  }

  void take(std::size_t thread) {
    for (std::size_t i; (i = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) task_(context_, thread, i);
  }

  void work(std::size_t number) {
    for (std::uint64_t seen = 0;;) {
      seen = changed(seen);
      if (number > seen % kMostThreads || !join(number)) continue;
      take(number);
      left_.fetch_add(1, std::memory_order_release);
    }
  }

  // Whether this worker is part of the present call, which may be a later one than it was called for: then it may take
  // part in it twice, one time after the other.
  bool join(std::size_t number) {
    for (std::uint64_t joined = joined_.load(); number <= joined % kMostThreads;) {
      if (joined_.compare_exchange_weak(joined, joined + kMostThreads)) return true;
    }
    return false;
  }

  // The next call after `seen`.
  std::uint64_t changed(std::uint64_t seen) {
    const auto end = std::chrono::steady_clock::now() + kSpinning;
    while (std::chrono::steady_clock::now() < end) {
      for (int i = 0; i < 32; ++i) {
        const std::uint64_t call = call_.load(std::memory_order_acquire);
        if (call != seen) return call;
        relax();
      }
    }
    std::unique_lock<std::mutex> lock(sleep_);
    ++sleepers_;
    wake_.wait(lock, [&] { return call_.load() != seen; });
    --sleepers_;
    return call_.load();
  }

  std::vector<pthread_t> workers_;
#if defined(__linux__) && !defined(__ANDROID__)
  cpu_set_t given_{};  // processors
  std::size_t given_to_ = 0;
#endif
  Task task_ = nullptr;
  void* context_ = nullptr;
  std::size_t count_ = 0;
  std::atomic<std::size_t> next_{0};
  // How many have joined the present call, and the number of the last worker that may, in one word; 0: it is closed.
  std::atomic<std::uint64_t> joined_{0};
  std::atomic<std::uint64_t> left_{0};  // of those that joined
  // A number of the call, and the number of workers that it wants, in one word.
  std::atomic<std::uint64_t> call_{0};
  std::atomic<std::size_t> sleepers_{0};
  std::mutex sleep_;
  std::condition_variable wake_;
};

// Never destroyed: its threads wait in it until the process ends. A forked child has none of them.
Pool& pool() {
  static std::mutex guard;
  static Pool* current = nullptr;
  static pid_t process = 0;
  const std::lock_guard<std::mutex> lock(guard);
  if (process != getpid()) {
    current = new Pool;
    process = getpid();
  }
  return *current;
}

}  // namespace

void in_parallel(std::size_t threads, std::size_t count, Task task, void* context) {
  threads = threads < count ? threads : count;
  threads = threads < kMostThreads ? threads : kMostThreads;
  if (threads > 1) {
    Pool& workers = pool();
    const std::unique_lock<std::mutex> mine(workers.owner, std::try_to_lock);
    if (mine.owns_lock()) return workers.run(threads, count, task, context);
  }
  for (std::size_t i = 0; i < count; ++i) task(context, 0, i);
}

}  // namespace pennyweight
