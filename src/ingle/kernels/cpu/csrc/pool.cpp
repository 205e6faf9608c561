#include "pool.h"

#include <atomic>
#include <chrono>
#include <mutex>
#include <thread>

#ifdef __linux__
#include <linux/futex.h>
#include <sys/syscall.h>
#include <unistd.h>
#endif
#if defined(__x86_64__)
#include <immintrin.h>
#endif

namespace ingle {
namespace {

// Longer than Python takes from one operator to the next, shorter than anyone would miss the core.
constexpr auto kSpin = std::chrono::microseconds(100);

constexpr int kMostThreads = 512;

// A thread's share of a job as one number: where it ends in the upper half, the next piece in the lower. Whoever adds 1
// and finds that piece before the end owns it. A job ends when all its pieces are done, so the owner of one may read
// `task` and `context` without a lock, even if it comes from an earlier job's loop.
struct alignas(64) Share {
    std::atomic<uint64_t> ticket{0};
};
Share shares[kMostThreads];
std::atomic<int64_t> pieces_left{0};
void (*task)(void*, int64_t);
void* context;

// The number of jobs so far, which workers wait on.
std::atomic<uint32_t> published{0};
std::atomic<int> num_sleeping{0};

std::mutex job_mutex;
std::atomic<int> threads_started{1};

std::atomic<uint64_t> jobs_begun{0};

void relax() {
#if defined(__x86_64__)
    _mm_pause();
#elif defined(__aarch64__)
    asm volatile("yield");
#endif
}

// Sleeps while `published` is `last`. A futex: glibc before 2.41 can lose a condition variable's wake-up (bug 25847).
void sleep_until_published(uint32_t last) {
    num_sleeping.fetch_add(1, std::memory_order_seq_cst);
#ifdef __linux__
    while (published.load(std::memory_order_seq_cst) == last)
        syscall(SYS_futex, &published, FUTEX_WAIT_PRIVATE, last, nullptr, nullptr, 0);
#else
    published.wait(last, std::memory_order_seq_cst);
#endif
    num_sleeping.fetch_sub(1, std::memory_order_seq_cst);
}

void wake_sleepers() {
    if (num_sleeping.load(std::memory_order_seq_cst) == 0) return;
#ifdef __linux__
    syscall(SYS_futex, &published, FUTEX_WAKE_PRIVATE, 0x7fffffff, nullptr, nullptr, 0);
#else
    published.notify_all();
#endif
}

// One's own share, then what is left of the others'.
void work(int own) {
    const int threads = threads_started.load(std::memory_order_relaxed);
    for (int i = 0; i < threads; i++) {
        std::atomic<uint64_t>& ticket = shares[(own + i) % threads].ticket;
        int64_t done = 0;
        for (;; done++) {
            uint64_t claim = ticket.fetch_add(1, std::memory_order_acq_rel);
            int64_t piece = claim & 0xffffffff, end = claim >> 32;
            if (piece >= end) break;
            task(context, piece);
        }
        if (done) pieces_left.fetch_sub(done, std::memory_order_acq_rel);
    }
}

uint32_t await_job(uint32_t last) {
    auto until = std::chrono::steady_clock::now() + kSpin;
    do {
        for (int i = 0; i < 32; i++) {
            uint32_t serial = published.load(std::memory_order_acquire);
            if (serial != last) return serial;
            relax();
        }
    } while (std::chrono::steady_clock::now() < until);
    sleep_until_published(last);
    return published.load(std::memory_order_acquire);
}

void worker(int own) {
    for (uint32_t last = 0;;) {
        last = await_job(last);
        work(own);
    }
}

}  // namespace

void start_threads(int threads) {
    std::lock_guard<std::mutex> lock(job_mutex);
    if (threads > kMostThreads) threads = kMostThreads;
    for (; threads_started < threads; threads_started++) std::thread(worker, threads_started.load()).detach();
}

int num_threads() { return threads_started; }

uint64_t num_jobs() { return jobs_begun.load(std::memory_order_relaxed); }

void run_pieces(int64_t count, void (*new_task)(void*, int64_t), void* new_context) {
    jobs_begun.fetch_add(1, std::memory_order_relaxed);
    std::unique_lock<std::mutex> lock(job_mutex, std::try_to_lock);
    if (count <= 1 || threads_started == 1 || !lock) {  // someone else's job keeps the workers busy
        for (int64_t i = 0; i < count; i++) new_task(new_context, i);
        return;
    }
    task = new_task;
    context = new_context;
    pieces_left.store(count, std::memory_order_relaxed);
    for (int64_t i = 0; i < threads_started; i++) {
        uint64_t begin = count * i / threads_started, end = count * (i + 1) / threads_started;
        shares[i].ticket.store(end << 32 | begin, std::memory_order_release);
    }
    published.fetch_add(1, std::memory_order_seq_cst);
    wake_sleepers();
    work(0);
    while (pieces_left.load(std::memory_order_acquire)) relax();
}

}  // namespace ingle
