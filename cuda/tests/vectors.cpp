// Runs kernels on the executor, on stored vectors, and compares every byte that they may have touched.
//
//     vectors FILE SEED...     each vector once for each seed; ends with 1 at the first byte that differs
//
// A vector is a launch and its memory before and after it. Memory refers to memory by number, since addresses are known
// only here. Numbers are little-endian; texts and bytes have their length (u32) before them.
//
//     file     u64 magic "kvvector", u32 vectors
//     vector   name, kernel, u32 grid, u32 block, parameters, references, u32 memories
//     memory   bytes before, references, u32 whether it may change; if so: bytes after, u32 number, and for each
//              u32 at, u32 bytes: there anything may stand
//     references   u32 number, and for each: u32 at, u32 memory, u64 offset: there stands that address
#define KV_EXECUTOR 1
#include "launch.h"

#include <fstream>
#include <iterator>
#include <unistd.h>

struct Reader {
    const std::vector<char>& bytes;
    size_t at;

    template <class T> T number() {
        T value;
        std::memcpy(&value, take(sizeof value), sizeof value);
        return value;
    }
    std::string text() {
        const u32 length = number<u32>();
        return {take(length), length};
    }
    const char* take(size_t length) {
        if (bytes.size() - at < length) {
            std::fprintf(stderr, "vectors: the file ends early\n");
            std::exit(2);
        }
        at += length;
        return bytes.data() + at - length;
    }
};

struct Reference {
    u32 at, memory;
    u64 offset;
};

// Exactly as long as it is said to be: the first byte beyond belongs to nobody.
struct Memory {
    std::string before, after;
    std::vector<Reference> references;
    std::vector<std::pair<u32, u32>> anything;
    bool changes;
    std::unique_ptr<char, void (*)(void*)> place{nullptr, std::free};
};

static std::vector<Reference> references(Reader& reader) {
    std::vector<Reference> all(reader.number<u32>());
    for (Reference& one : all) {
        one.at = reader.number<u32>();
        one.memory = reader.number<u32>();
        one.offset = reader.number<u64>();
    }
    return all;
}

static void refer(std::string& bytes, const std::vector<Reference>& all, const std::vector<Memory>& memories) {
    for (const Reference& one : all) {
        const u64 address = (u64)memories[one.memory].place.get() + one.offset;
        std::memcpy(&bytes[one.at], &address, sizeof address);
    }
}

int main(int count, char** arguments) {
    if (count < 3) return 2;
    std::ifstream file(arguments[1], std::ios::binary);
    const std::vector<char> bytes{std::istreambuf_iterator<char>(file), {}};
    Reader reader{bytes, 0};
    if (std::string(reader.take(8), 8) != "kvvector") return 2;
    const u32 vectors = reader.number<u32>();
    for (u32 n = 0; n < vectors; ++n) {
        // A kernel that never ends is wrong, too.
        alarm(20);
        const std::string name = reader.text(), kernel = reader.text();
        const u32 grid = reader.number<u32>(), block = reader.number<u32>();
        std::string parameters = reader.text();
        const std::vector<Reference> of_parameters = references(reader);
        std::vector<Memory> memories(reader.number<u32>());
        for (Memory& memory : memories) {
            memory.before = reader.text();
            memory.references = references(reader);
            memory.changes = reader.number<u32>() != 0;
            if (memory.changes) {
                memory.after = reader.text();
                memory.anything.resize(reader.number<u32>());
                for (auto& [at, bytes] : memory.anything) {
                    at = reader.number<u32>();
                    bytes = reader.number<u32>();
                }
            }
            void* place = nullptr;
            if (posix_memalign(&place, 64, memory.before.size()) != 0) return 2;
            memory.place.reset(static_cast<char*>(place));
        }
        for (Memory& memory : memories) {
            refer(memory.before, memory.references, memories);
            if (!memory.changes) memory.after = memory.before;
        }
        refer(parameters, of_parameters, memories);
        for (int seed = 2; seed < count; ++seed) {
            for (Memory& memory : memories) std::memcpy(memory.place.get(), memory.before.data(), memory.before.size());
            const u64 chance = std::strtoull(arguments[seed], nullptr, 0);
            const char* wrong = kv_launch_packed(kernel, grid, block, chance, parameters.data(), parameters.size());
            if (*wrong) {
                std::fprintf(stderr, "vectors: %s, seed %llu: %s\n", name.c_str(), chance, wrong);
                return 1;
            }
            for (size_t m = 0; m < memories.size(); ++m) {
                const std::string& after = memories[m].after;
                char* found = memories[m].place.get();
                for (const auto& [at, bytes] : memories[m].anything) std::memcpy(found + at, &after[at], bytes);
                for (size_t i = 0; i < after.size(); ++i) {
                    if (found[i] == after[i]) continue;
                    std::fprintf(stderr, "vectors: %s, seed %llu: memory %zu, byte %zu of %zu is %02x, not %02x\n",
                                 name.c_str(), chance, m, i, after.size(), found[i] & 0xff, after[i] & 0xff);
                    return 1;
                }
            }
        }
    }
    std::printf("vectors: %u, as expected under each of %d seeds\n", vectors, count - 2);
    return 0;
}
