// What a weight holds, read behind torch's back: a fingerprint of a few places on every call, a checksum of everything
// where there is a doubt. See contents.py for what they are for.
#include <algorithm>
#include <cstdint>
#include <cstring>

namespace {

constexpr int64_t kLanes = 8;  // chains of multiplications that run side by side
constexpr uint64_t kOdd = 0x9E3779B97F4A7C15ull;

// Spreads every bit of a word over all of them (the finaliser of splitmix64).
inline uint64_t mix(uint64_t word) {
    word = (word ^ (word >> 30)) * 0xBF58476D1CE4E5B9ull;
    word = (word ^ (word >> 27)) * 0x94D049BB133111EBull;
    return word ^ (word >> 31);
}

// One step is a bijection of the state for every word, and of the word for every state: a single change is always seen.
inline uint64_t absorb(uint64_t state, uint64_t word) {
    const uint64_t product = (state ^ word) * kOdd;
    return product << 29 | product >> 35;
}

inline uint64_t load(const char* data, int64_t bytes) {
    uint64_t word = 0;
    std::memcpy(&word, data, bytes);
    return word;
}

uint64_t hash(const char* data, int64_t bytes, uint64_t seed) {
    uint64_t lanes[kLanes];
    for (int64_t i = 0; i < kLanes; ++i) lanes[i] = seed + kOdd * (i + 1);
    for (; bytes >= 8 * kLanes; data += 8 * kLanes, bytes -= 8 * kLanes)
        for (int64_t i = 0; i < kLanes; ++i) lanes[i] = absorb(lanes[i], load(data + 8 * i, 8));
    for (int64_t i = 0; bytes > 0; ++i, data += 8, bytes -= 8) lanes[i] = absorb(lanes[i], load(data, std::min<int64_t>(bytes, 8)));
    uint64_t result = seed;
    for (int64_t i = 0; i < kLanes; ++i) result = absorb(result, mix(lanes[i]));
    return mix(result);
}

// A line is short: one multiplication a word. The shift brings the top bits, where signs are, down to where they spread.
inline uint64_t hash_line(const char* data, int64_t bytes, uint64_t seed) {
    uint64_t sum = seed, factor = kOdd;
    for (; bytes > 0; data += 8, bytes -= 8, factor += 2 * kOdd) {
        const uint64_t word = bytes >= 8 ? load(data, 8) : load(data, bytes);
        sum += (word ^ (word >> 29)) * factor;
    }
    return mix(sum);
}

}  // namespace

// Sum of the hashes of `count` samples, each an address and a number of bytes. A sum, so that the fingerprint of several
// weights is the sum of theirs. The lines are in nobody's cache, so they are asked for well before they are read.
extern "C" uint64_t vnm_fingerprint(const uint64_t* samples, int64_t count) {
    constexpr int64_t kAhead = 48;
    for (int64_t i = 0; i < std::min(count, kAhead); ++i) __builtin_prefetch(reinterpret_cast<const char*>(samples[2 * i]));
    uint64_t sum = 0;
    for (int64_t i = 0; i < count; ++i) {
        if (i + kAhead < count) __builtin_prefetch(reinterpret_cast<const char*>(samples[2 * (i + kAhead)]));
        sum += hash_line(reinterpret_cast<const char*>(samples[2 * i]), static_cast<int64_t>(samples[2 * i + 1]), samples[2 * i]);
    }
    return sum;
}

// Hash of `rows` rows of `bytes` bytes each, `stride` bytes apart.
extern "C" uint64_t vnm_checksum(const char* data, int64_t rows, int64_t bytes, int64_t stride) {
    if (stride == bytes) return hash(data, rows * bytes, 0);
    uint64_t result = 0;
    for (int64_t row = 0; row < rows; ++row) result = absorb(result, hash(data + row * stride, bytes, row));
    return mix(result);
}
