// Runs the CUDA kernels on the CPU and compares them with plain sums in f64. Shows that the arithmetic is right, and that
// no thread waits for one that never comes; says nothing about speed, nor about a real device.
#include "../../../runtime/src/kernels/cuda/kernels.cu"
#include <cstdio>
#include <random>

static std::mt19937 random_bits(7);
static int failures = 0, checks = 0;

template <typename T> std::vector<T> numbers(size_t count) {
    std::normal_distribution<float> normal;
    std::vector<T> out(count);
    for (auto &x : out) x = narrow<T>(normal(random_bits));
    return out;
}

static void near(const char *what, double got, double want) {
    checks++;
    if (std::abs(got - want) <= 1e-5 * (1.0 + std::abs(want))) return;
    if (failures++ < 20) std::printf("%s: got %g, want %g\n", what, got, want);
}

struct Case { int group, kv, dim, window, before, rows; float softcap; };

// `rows` new tokens after `before` older ones, of two sequences whose blocks lie interleaved.
template <typename K, int QUERIES, typename Kernel> void attention(const Case &c, Kernel kernel) {
    const int q_heads = c.group * c.kv, width = (q_heads + 2 * c.kv) * c.dim, sequences = 2, T_ = sequences * c.rows;
    const int context = c.before + c.rows, blocks = (context + BLOCK_TOKENS - 1) / BLOCK_TOKENS;
    const float scale = 1.0f / std::sqrt(float(c.dim));
    auto qkv = numbers<float>(size_t(T_) * width);
    auto keys = numbers<K>(size_t(sequences) * blocks * BLOCK_TOKENS * c.kv * c.dim), values = numbers<K>(keys.size());
    std::vector<unsigned> pos, tables, slot, tiles;
    for (int s = 0; s < sequences; s++) {
        for (int b = 0; b < blocks; b++) tables.push_back(b * sequences + s);
        for (int r = 0; r < c.rows; r++) {
            const int at = c.before + r;
            pos.push_back(at);
            slot.push_back(tables[s * blocks + at / BLOCK_TOKENS] * BLOCK_TOKENS + at % BLOCK_TOKENS);
        }
    }
    for (int part = 0; part < 2; part++)
        launch(kv_write<K>, {unsigned(T_), 1, 1}, 64, qkv.data(), slot.data(), (part ? values : keys).data(), width,
               (q_heads + part * c.kv) * c.dim, c.kv * c.dim);
    for (int t = 0; t < T_; t++)
        for (int i = 0; i < c.kv * c.dim; i++) {
            const float *row = &qkv[size_t(t) * width + q_heads * c.dim];
            near("kv", widen(keys[size_t(slot[t]) * c.kv * c.dim + i]), widen(narrow<K>(row[i])));
            near("kv", widen(values[size_t(slot[t]) * c.kv * c.dim + i]), widen(narrow<K>(row[c.kv * c.dim + i])));
        }

    const int heads = std::min(c.group, QUERIES), parts = (c.group + QUERIES - 1) / QUERIES;
    const int rows_a_tile = std::max(1, QUERIES / heads);
    for (int s = 0; s < sequences; s++)
        for (int r = 0; r < c.rows; r += rows_a_tile)
            for (unsigned x : {s * c.rows + r, std::min(rows_a_tile, c.rows - r), s * blocks, 0}) tiles.push_back(x);
    const unsigned splits = (context - 1) / SPLIT_KEYS + 1;
    std::vector<float> partial(size_t(T_) * q_heads * splits * (c.dim + 2), NAN);
    std::vector<float> out(size_t(T_) * q_heads * c.dim);
    launch(kernel, {unsigned(tiles.size() / 4), unsigned(c.kv * parts), splits}, WARPS * LANES, qkv.data(), keys.data(),
           values.data(), pos.data(), tiles.data(), tables.data(), partial.data(), q_heads, c.kv, c.dim, c.window, scale,
           c.softcap, parts);
    launch(join, {unsigned(T_), unsigned(q_heads), 1}, 64, partial.data(), pos.data(), out.data(), c.dim, int(splits));

    for (int t = 0; t < T_; t++)
        for (int h = 0; h < q_heads; h++) {
            const float *query = &qkv[size_t(t) * width + h * c.dim];
            std::vector<double> weights(pos[t] + 1, 0.0), mixed(c.dim, 0.0);
            double total = 0.0;
            auto start = [&](int key) {
                const unsigned block = tables[t / c.rows * blocks + key / BLOCK_TOKENS];
                return ((size_t(block) * BLOCK_TOKENS + key % BLOCK_TOKENS) * c.kv + h / c.group) * c.dim;
            };
            for (int key = 0; key <= int(pos[t]); key++) {
                if (c.window > 0 && key + c.window <= int(pos[t])) continue;
                double score = 0.0;
                for (int d = 0; d < c.dim; d++) score += double(query[d]) * widen(keys[start(key) + d]);
                score *= scale;
                if (c.softcap > 0) score = c.softcap * std::tanh(score / c.softcap);
                total += weights[key] = std::exp(score);
            }
            for (int key = 0; key <= int(pos[t]); key++)
                for (int d = 0; d < c.dim; d++) mixed[d] += weights[key] * widen(values[start(key) + d]);
            for (int d = 0; d < c.dim; d++)
                near("attention", out[(size_t(t) * q_heads + h) * c.dim + d], mixed[d] / total);
        }
}

static void norms() {
    for (int width : {64, 100, 1536}) {
        const int rows = 3;
        auto hidden = numbers<float>(rows * width), update = numbers<float>(rows * width);
        auto weight = numbers<float>(width);
        std::vector<float> out(2 * rows * width);
        launch(add_rms_norm, {rows, 1, 1}, 128, hidden.data(), update.data(), 0.25f, weight.data(), out.data(), width, 1e-5f);
        for (int r = 0; r < rows; r++) {
            auto sum = [&](int i) { return hidden[r * width + i] + 0.25 * update[r * width + i]; };
            double squares = 0.0;
            for (int i = 0; i < width; i++) squares += sum(i) * sum(i);
            for (int i = 0; i < width; i++) {
                near("residual", out[r * width + i], sum(i));
                near("norm", out[(rows + r) * width + i], sum(i) / std::sqrt(squares / width + 1e-5) * weight[i]);
            }
        }
    }
}

static void gates() {
    const int rows = 3, inner = 100;
    auto gate_up = numbers<float>(rows * 2 * inner);
    std::vector<float> out(rows * inner);
    for (bool is_silu : {true, false}) {
        launch(is_silu ? silu_mul : gelu_tanh_mul, {10, 1, 1}, 32, gate_up.data(), out.data(), inner, size_t(rows * inner));
        for (int i = 0; i < rows * inner; i++) {
            const double x = gate_up[i / inner * 2 * inner + i % inner];
            const double up = gate_up[i / inner * 2 * inner + inner + i % inner];
            const double tanh_part = std::tanh(std::sqrt(2.0 / M_PI) * (x + 0.044715 * x * x * x));
            near("gate", out[i], (is_silu ? x / (1.0 + std::exp(-x)) : 0.5 * x * (1.0 + tanh_part)) * up);
        }
    }
}

int main() {
    // group, kv heads, dim, window, tokens before, new tokens, softcap
    const Case small[] = {{1, 2, 16, 0, 0, 3, 0}, {2, 1, 32, 0, 33, 1, 0}, {4, 1, 32, 9, 40, 5, 0}, {7, 1, 32, 0, 520, 2, 30}};
    for (const Case &c : small) {
        attention<float, 8>(c, attend_f32_1_8);
        attention<__nv_bfloat16, 8>(c, attend_bf16_1_8);
    }
    attention<float, 8>({8, 1, 64, 0, 1030, 1, 0}, attend_f32_2_8);
    attention<__nv_bfloat16, 8>({3, 2, 48, 600, 700, 4, 0}, attend_bf16_2_8);
    attention<float, 8>({16, 1, 128, 0, 31, 2, 50}, attend_f32_4_8);
    attention<__nv_bfloat16, 8>({4, 1, 96, 0, 60, 3, 0}, attend_bf16_4_8);
    attention<float, 4>({6, 1, 256, 0, 10, 3, 0}, attend_f32_8_4);
    attention<__nv_bfloat16, 4>({2, 1, 256, 16, 30, 4, 0}, attend_bf16_8_4);
    norms();
    gates();
    std::printf("%d of %d numbers are wrong\n", failures, checks);
    return failures > 0;
}
