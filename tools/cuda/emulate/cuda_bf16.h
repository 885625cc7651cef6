// Stands in for CUDA's header, so that a C++ compiler can run kernels.cu on the CPU: every CUDA thread is a fibre, which
// runs until it waits for others. Slow, and exact about who waits for whom.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <functional>
#include <memory>
#include <vector>
#include <ucontext.h>

#define __device__
#define __global__
#define __launch_bounds__(...)
// Blocks run one after the other, so one copy serves them all.
#define __shared__ static

struct Index { unsigned x = 0, y = 0, z = 0; };
inline Index threadIdx, blockIdx, blockDim, gridDim;

struct Fibre {
    ucontext_t context;
    std::vector<char> stack = std::vector<char>(1 << 16);
    bool done = false;
};
inline std::vector<std::unique_ptr<Fibre>> fibres;
inline ucontext_t scheduler;
inline std::function<void()> body;

// Lets the others run.
inline void rest() {
    const unsigned self = threadIdx.x;
    swapcontext(&fibres[self]->context, &scheduler);
    threadIdx.x = self;
}

struct Barrier {
    unsigned arrived = 0, passed = 0;
    void wait(unsigned count) {
        const unsigned before = passed;
        if (++arrived == count) arrived = 0, passed++;
        while (passed == before) rest();
    }
};
inline Barrier block_barrier;

struct Warp {
    Barrier barrier;
    float lanes[32];
};
inline std::vector<Warp> warps;

inline void __syncthreads() { block_barrier.wait(blockDim.x); }

inline float __shfl_xor_sync(unsigned, float x, int mask) {
    const unsigned thread = threadIdx.x;
    Warp &warp = warps[thread / 32];
    warp.lanes[thread % 32] = x;
    warp.barrier.wait(32);
    const float other = warp.lanes[thread % 32 ^ mask];
    warp.barrier.wait(32);
    return other;
}

inline float __expf(float x) { return std::exp(x); }
inline float rsqrtf(float x) { return 1.0f / std::sqrt(x); }
inline int min(int a, int b) { return a < b ? a : b; }

struct __nv_bfloat16 { uint16_t bits; };
inline float __bfloat162float(__nv_bfloat16 x) {
    const uint32_t bits = uint32_t(x.bits) << 16;
    float out;
    std::memcpy(&out, &bits, 4);
    return out;
}
// To the nearest, ties to even.
inline __nv_bfloat16 __float2bfloat16(float x) {
    uint32_t bits;
    std::memcpy(&bits, &x, 4);
    return {uint16_t((bits + 0x7fff + (bits >> 16 & 1)) >> 16)};
}

inline void run_fibre() {
    body();
    fibres[threadIdx.x]->done = true;
    swapcontext(&fibres[threadIdx.x]->context, &scheduler);
}

inline void run_block(unsigned threads) {
    block_barrier = {};
    warps.assign(threads / 32, {});
    fibres.resize(threads);
    for (auto &fibre : fibres) {
        fibre = std::make_unique<Fibre>();
        getcontext(&fibre->context);
        fibre->context.uc_stack.ss_sp = fibre->stack.data();
        fibre->context.uc_stack.ss_size = fibre->stack.size();
        makecontext(&fibre->context, run_fibre, 0);
    }
    // Nobody needs this many turns who does not wait for one that never comes.
    for (long turn = 0, left = threads; left > 0; turn++) {
        if (turn > 10'000'000) std::puts("a thread waits for ever"), std::exit(1);
        left = 0;
        for (unsigned t = 0; t < threads; t++)
            if (!fibres[t]->done) {
                threadIdx = {t, 0, 0};
                swapcontext(&scheduler, &fibres[t]->context);
                left += !fibres[t]->done;
            }
    }
}

// Runs one kernel over a grid. `threads` must be a multiple of 32.
template <typename Kernel, typename... Args>
void launch(Kernel kernel, Index grid, unsigned threads, Args... args) {
    gridDim = grid;
    blockDim = {threads, 1, 1};
    body = [=] { kernel(args...); };
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = {x, y, z};
                run_block(threads);
            }
}
