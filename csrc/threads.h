// Threads that wait for work, so that a product of a tenth of a millisecond can have two.
#pragma once

#include <cstddef>

namespace pennyweight {

// task(context, thread, index) for every index below `count`, on at most `threads` threads, the caller's being number
// 0. Who is free takes the next index. Where another caller has the threads, this one works alone.
void in_parallel(std::size_t threads, std::size_t count, void (*task)(void*, std::size_t, std::size_t), void* context);

}  // namespace pennyweight
