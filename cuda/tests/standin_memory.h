// Memory of the stand-in for the driver: who has it, where it is, and who may touch it.
//
//     given, 0xdb ─▶ touched by work, place by place ─▶ freed: work that comes before that may still touch it
//
// Memory of a device is elsewhere than its address says. At the address itself nothing can be read, so that code of the
// host that follows it faults; copies and kernels come here to be told where it is. An address of a device never comes
// twice, and what was freed stays known: whoever touches it later is found. What nobody may touch reads 0xdd.
#pragma once

#include "standin_order.h"

#include <cstring>
#include <sys/mman.h>

enum Kind { DEVICE, POOLED, PINNED, REGISTERED };
static const char* const KINDS[] = {"device memory", "memory of a pool", "host memory", "registered memory"};

struct Range {
    address base;
    size_t bytes;
    Kind kind;
    Context* context;
    char* place;
    // The device's own name for memory of the process.
    address device_base;
    address pool;
    // Where in which stream it came, if it came in order.
    address stream, at;
    bool freed;
    // What comes before it was freed; and whether somebody was told that this was too early.
    Clock before_end;
    bool told;
    // By stream, up to where work touches it.
    Clock uses;
};

static const size_t ALIGN = 512, GAP = 4096;
// Addresses of devices, at which there is nothing.
static address devices_begin, devices_end, devices_next;

static char* mapped(size_t bytes, int protection) {
    void* at = mmap(nullptr, bytes, protection, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    return at == MAP_FAILED ? nullptr : static_cast<char*>(at);
}

// 0: there are no more.
static address new_address(size_t bytes) {
    if (!devices_begin) {
        const size_t all = (size_t)1 << 42;
        devices_begin = devices_next = reinterpret_cast<address>(mapped(all, PROT_NONE));
        if (!devices_begin) return 0;
        devices_end = devices_begin + all;
    }
    // Something is between neighbours, and what is there belongs to nobody.
    const address at = devices_next;
    devices_next += (bytes + GAP + ALIGN - 1) / ALIGN * ALIGN;
    return devices_next > devices_end ? 0 : at;
}

static std::string named(const Range& range) {
    return text("%s of %zu bytes at %#llx", KINDS[range.kind], range.bytes, range.base);
}

// The last that begins at an address or before.
static Range* before(address at, address* base) {
    auto found = machine.ranges.upper_bound(at);
    if (found == machine.ranges.begin()) return nullptr;
    --found;
    *base = found->first;
    return found->second.get();
}

static Range* at_address(address at) {
    address base = 0;
    Range* range = before(at, &base);
    return range && at - base < range->bytes ? range : nullptr;
}

static char* place_of(const Range& range, address at) {
    return range.place + (at - range.base < range.bytes ? at - range.base : at - range.device_base);
}

static size_t rounded(size_t bytes) { return (bytes + ALIGN - 1) / ALIGN * ALIGN; }

static bool takes_room(Context* context, size_t bytes) {
    size_t& used = machine.used[context->device];
    if (bytes > machine.bytes || used > machine.bytes - bytes) return false;
    used += bytes;
    return true;
}

static std::shared_ptr<Range> new_range(Kind kind, Context* context, address base, char* place, size_t bytes) {
    auto range = std::make_shared<Range>();
    range->kind = kind;
    range->context = context;
    range->base = range->device_base = base;
    range->place = place;
    range->bytes = bytes;
    return machine.ranges[base] = range;
}

static std::shared_ptr<Range> new_device_range(Kind kind, Context* context, size_t bytes) {
    const address base = new_address(bytes);
    char* place = base ? mapped(rounded(bytes), PROT_READ | PROT_WRITE) : nullptr;
    if (!place) return nullptr;
    memset(place, 0xdb, bytes);
    return new_range(kind, context, base, place, bytes);
}

// The device's name for memory of the process is its own, if machines are to be like that.
static bool name_apart(const std::shared_ptr<Range>& range) {
    if (!machine.apart) return true;
    range->device_base = new_address(range->bytes);
    if (!range->device_base) return false;
    machine.ranges[range->device_base] = range;
    return true;
}

static void note_use(Range& range, address stream, address at) {
    range.uses[stream] = std::max(range.uses[stream], at);
}

// Before memory is freed at once: what touches it has to be known to be over.
static void expect_unused(Range& range) {
    for (const auto& [stream, at] : range.uses) {
        if (is_known_over(stream, at)) continue;
        const bool queued = machine.streams.at(stream).done < at;
        broken(named(range) + (queued ? " while work on it is queued" : ", and nobody knows that work on it is over"));
        range.told = true;
        return;
    }
}

// Gives the memory itself back. What the process had stays where it is, so that nobody else comes to be there.
static void give_back(Range& range) {
    const int flags = MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE | MAP_FIXED;
    if (range.kind == PINNED) mmap(range.place, range.bytes, PROT_NONE, flags, -1, 0);
    if (range.kind == DEVICE || range.kind == POOLED) {
        munmap(range.place, rounded(range.bytes));
        range.place = nullptr;
    }
}

// Whether nothing is known there. What was registered there once is forgotten.
static bool is_vacant(address first, size_t bytes) {
    auto next = machine.ranges.upper_bound(first);
    if (next != machine.ranges.begin()) --next;
    while (next != machine.ranges.end() && next->first < first + bytes) {
        if (next->first + next->second->bytes <= first) ++next;
        else if (!next->second->freed) return false;
        else next = machine.ranges.erase(next);
    }
    return true;
}

// What is being carried out touches memory that it must not.
static void broken_by(const Range* range, const std::string& what) {
    if (!running->told.insert(range).second) return;
    broken(what);
    running->stream->context->lost = 700;
}

// What is being carried out touches that memory: whether it may.
static bool touch(Range& range) {
    const address stream = running->stream->handle, at = running->work->at;
    if (!running->seen.insert(&range).second) return running->told.count(&range) == 0;
    if (range.freed && !covers(range.before_end, stream, at)) {
        if (range.told && covers(range.uses, stream, at)) running->told.insert(&range);
        else broken_by(&range, named(range) + " is touched after it was freed");
        return false;
    }
    if (range.context->gone) {
        broken_by(&range, named(range) + " is touched after its context ended");
        return false;
    }
    note_use(range, stream, at);
    if (range.at && !covers(running->work->after, range.stream, range.at))
        broken(named(range) + " is touched, and nothing orders that after its allocation");
    return true;
}

// Where a kernel finds memory; what it must not touch is nowhere, and reads 0xdd.
static void* place_for_kernel(address at, size_t bytes) {
    static unsigned char nowhere[64];
    const auto refused = [&] { return memset(nowhere, 0xdd, sizeof nowhere); };
    address base = 0;
    if (const Range* last = running->last) {
        const address offset = at - last->device_base;
        if (offset < last->bytes && bytes <= last->bytes - offset) return last->place + offset;
    }
    Range* range = before(at, &base);
    if (!range || at - base >= range->bytes + GAP) {
        broken_by(nullptr, text("%#llx is touched, which is nobody's", at));
        return refused();
    }
    if (at - base >= range->bytes || bytes > range->bytes - (at - base)) {
        broken_by(range, text("%zu bytes at %#llx are touched, beyond ", bytes, at) + named(*range));
        return refused();
    }
    if (base != range->device_base) {
        broken_by(range, named(*range) + " is touched by an address that is not the device's");
        return refused();
    }
    if (range->kind <= POOLED && range->context->device != running->stream->context->device) {
        broken_by(range, named(*range) + " is another device's");
        return refused();
    }
    if (!touch(*range)) return refused();
    running->last = range;
    return range->place + (at - base);
}

// One end of a copy: memory that is known, or the process's own.
struct End {
    std::shared_ptr<Range> range;
    address at;
    size_t bytes;
    bool fits;

    char* place() const { return range ? place_of(*range, at) : reinterpret_cast<char*>(at); }
};

static End end_of(address at, size_t bytes) {
    address base = 0;
    Range* range = before(at, &base);
    const bool nobodys = at >= devices_begin && at < devices_end;
    if (!range || at - base >= range->bytes || (range->freed && range->kind == REGISTERED)) {
        if (nobodys) broken(text("%zu bytes at %#llx are nobody's", bytes, at));
        return {nullptr, at, bytes, !nobodys};
    }
    if (range->freed) {
        broken(named(*range) + " was freed");
        return {nullptr, at, bytes, false};
    }
    if (bytes > range->bytes - (at - base)) {
        // What goes on in a neighbour is refused, and does no harm.
        const Range* next = at_address(base + range->bytes);
        if (!next || next->freed) broken(text("%zu bytes at %#llx end beyond ", bytes, at) + named(*range));
        return {nullptr, at, bytes, false};
    }
    return {machine.ranges.at(base), at, bytes, true};
}
