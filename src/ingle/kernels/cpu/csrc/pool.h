// Threads that share the pieces of one operator after another, a few microseconds apart.
#pragma once

#include <cstdint>

namespace ingle {

// Starts workers until there are so many threads, the calling thread being the first. They run where the system puts
// them: kept on processors of their own, the threads of two engines would meet on the same ones.
void start_threads(int threads);

int num_threads();

// All that were begun, for whoever watches from another thread whether a long step gets on.
uint64_t num_jobs();

// Calls task(context, i) once for every i in [0, count) on all threads; returns when all are done.
// Each thread starts with neighbouring pieces, so that it reads memory in order, and then takes one by one what others
// have left: a thread that lost its core to another process delays no more than one piece.
void run_pieces(int64_t count, void (*task)(void*, int64_t), void* context);

template <typename Body>
void parallel_for(int64_t count, const Body& body) {
    run_pieces(count, [](void* context, int64_t i) { (*static_cast<const Body*>(context))(i); }, (void*)&body);
}

// The same over ranges [begin, end) of [0, size), several for each thread and none smaller than `least`; nor larger than
// `most`, if that is more: who takes the last one lets the others wait.
template <typename Body>
void parallel_ranges(int64_t size, int64_t least, const Body& body, int64_t most = INT64_MAX) {
    int64_t step = size / (num_threads() * 16);
    if (step > most) step = most;
    if (step < least) step = least;
    parallel_for((size + step - 1) / step, [&](int64_t piece) {
        int64_t begin = piece * step, end = begin + step;
        body(begin, end < size ? end : size);
    });
}

}  // namespace ingle
