// Kernels by name, with their parameters as the driver takes them: what a stand-in for the driver needs to launch one.
//
// Parameters are pointers to each, or side by side at their natural alignment.
#pragma once

#include "../kv_pool.cu"

#include <cstddef>
#include <string>
#include <tuple>
#include <utility>

// What is read from parameters that lie anywhere.
template <class T> static T kv_read(const void* from) {
    T value;
    std::memcpy(&value, from, sizeof value);
    return value;
}

template <class... P>
static const char* kv_launch_as(void (*kernel)(P...), u32 grid, u32 block, u64 seed, void* const* each) {
    return [&]<size_t... I>(std::index_sequence<I...>) {
        const std::tuple<P...> parameters{kv_read<P>(each[I])...};
        return kv_run(grid, block, seed, [&] { std::apply(kernel, parameters); });
    }(std::index_sequence_for<P...>());
}

template <class... P>
static const char* kv_launch_packed_as(void (*kernel)(P...), u32 grid, u32 block, u64 seed, const void* packed,
                                       size_t bytes) {
    void* each[sizeof...(P)];
    size_t at = 0, n = 0;
    const auto place = [&](size_t size, size_t align) {
        at = (at + align - 1) / align * align;
        each[n++] = const_cast<char*>(static_cast<const char*>(packed) + at);
        at += size;
    };
    (place(sizeof(P), alignof(P)), ...);
    if (at != bytes) return "parameters are of another length than the kernel's";
    return kv_launch_as(kernel, grid, block, seed, each);
}

// Launches a kernel: empty, or what went wrong.
static inline const char* kv_launch(const std::string& name, u32 grid, u32 block, u64 seed, void* const* each) {
    if (name == "kv_copy") return kv_launch_as(kv_copy, grid, block, seed, each);
    if (name == "kv_encode") return kv_launch_as(kv_encode, grid, block, seed, each);
    if (name == "kv_decode") return kv_launch_as(kv_decode, grid, block, seed, each);
    return "no kernel has this name";
}

static inline const char* kv_launch_packed(const std::string& name, u32 grid, u32 block, u64 seed, const void* packed,
                                           size_t bytes) {
    if (name == "kv_copy") return kv_launch_packed_as(kv_copy, grid, block, seed, packed, bytes);
    if (name == "kv_encode") return kv_launch_packed_as(kv_encode, grid, block, seed, packed, bytes);
    if (name == "kv_decode") return kv_launch_packed_as(kv_decode, grid, block, seed, packed, bytes);
    return "no kernel has this name";
}

template <class... P> static void kv_pack_as(void (*)(P...), void* const* each, std::vector<char>& packed) {
    size_t n = 0;
    const auto add = [&](size_t size, size_t align) {
        const size_t at = (packed.size() + align - 1) / align * align;
        packed.resize(at + size);
        std::memcpy(packed.data() + at, each[n++], size);
    };
    (add(sizeof(P), alignof(P)), ...);
}

static inline bool kv_has(const std::string& name) { return name == "kv_copy" || name == "kv_encode" || name == "kv_decode"; }

// A kernel's parameters side by side, as they are now: for who launches it later.
static inline std::vector<char> kv_pack(const std::string& name, void* const* each) {
    std::vector<char> packed;
    if (name == "kv_copy") kv_pack_as(kv_copy, each, packed);
    if (name == "kv_encode") kv_pack_as(kv_encode, each, packed);
    if (name == "kv_decode") kv_pack_as(kv_decode, each, packed);
    return packed;
}
