// Stands in for CUDA's header, so that a C++ compiler can run kernels.cu on the CPU: every CUDA thread is a thread, a
// shuffle is an exchange between two barriers. Slow, and exact about who waits for whom.
#pragma once
#include <barrier>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <memory>
#include <thread>
#include <vector>

#define __device__
#define __global__
#define __launch_bounds__(...)
// Blocks run one after the other, so one copy serves them all.
#define __shared__ static

struct Index { unsigned x = 0, y = 0, z = 0; };
inline thread_local Index threadIdx;
inline Index blockIdx, blockDim, gridDim;

struct Warp {
    std::barrier<> barrier{32};
    float lanes[32];
};
inline std::vector<std::unique_ptr<Warp>> warps;
inline std::unique_ptr<std::barrier<>> block_barrier;

inline void __syncthreads() { block_barrier->arrive_and_wait(); }

inline float __shfl_xor_sync(unsigned, float x, int mask) {
    Warp &warp = *warps[threadIdx.x / 32];
    warp.lanes[threadIdx.x % 32] = x;
    warp.barrier.arrive_and_wait();
    const float other = warp.lanes[threadIdx.x % 32 ^ mask];
    warp.barrier.arrive_and_wait();
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

// Runs one kernel over a grid. `threads` must be a multiple of 32.
template <typename Kernel, typename... Args>
void launch(Kernel kernel, Index grid, unsigned threads, Args... args) {
    gridDim = grid;
    blockDim = {threads, 1, 1};
    for (unsigned z = 0; z < grid.z; z++)
        for (unsigned y = 0; y < grid.y; y++)
            for (unsigned x = 0; x < grid.x; x++) {
                blockIdx = {x, y, z};
                block_barrier = std::make_unique<std::barrier<>>(threads);
                warps.clear();
                for (unsigned w = 0; w < threads / 32; w++) warps.push_back(std::make_unique<Warp>());
                std::vector<std::thread> all;
                for (unsigned t = 0; t < threads; t++)
                    all.emplace_back([=] {
                        threadIdx = {t, 0, 0};
                        kernel(args...);
                    });
                for (auto &thread : all) thread.join();
            }
}
