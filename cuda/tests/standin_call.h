// One call of the stand-in for the driver: what every entry point begins with, and how it finds what handles name.
#pragma once

#include "standin_memory.h"

enum Result {
    SUCCESS = 0,
    INVALID_VALUE = 1,
    OUT_OF_MEMORY = 2,
    NOT_INITIALIZED = 3,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101,
    INVALID_IMAGE = 200,
    INVALID_CONTEXT = 201,
    NO_BINARY_FOR_GPU = 209,
    INVALID_PTX = 218,
    UNSUPPORTED_PTX_VERSION = 222,
    INVALID_HANDLE = 400,
    NOT_FOUND = 500,
    NOT_READY = 600,
    CONTEXT_IS_DESTROYED = 709,
    ALREADY_REGISTERED = 712,
    NOT_REGISTERED = 713,
    LAUNCH_FAILED = 719,
};

// What a call needs.
enum Needs { NOTHING, DRIVER, CONTEXT };

static thread_local std::vector<Context*> currents;
static thread_local address currents_epoch;

static Context* current() { return currents.empty() ? nullptr : currents.back(); }

// Every call: one at a time, counted, and failed where that is asked for.
struct Call {
    std::unique_lock<std::mutex> lock;
    int code;

    Call(const char* name, Needs needs) : lock(everything), code(SUCCESS) {
        if (currents_epoch != epoch) currents.clear();
        currents_epoch = epoch;
        calling = name;
        const address nth = ++machine.calls[name];
        const auto faults = machine.faults.find(name);
        if (faults != machine.faults.end() && faults->second.count(nth)) {
            code = faults->second[nth];
            if (!ends_context(code)) return;
            for (const auto& context : machine.contexts)
                if (current() ? context.get() == current() : !context->gone) context->lost = code;
        } else if (needs != NOTHING && !machine.initialised) {
            code = NOT_INITIALIZED;
        } else if (needs == CONTEXT) {
            code = !current() ? INVALID_CONTEXT : current()->gone ? CONTEXT_IS_DESTROYED : SUCCESS;
        }
    }
};

#define EXPORT extern "C" __attribute__((visibility("default")))
#define ENTER(needs) \
    const Call call(__func__, needs); \
    if (call.code) return call.code
// After that, on a context that is in order. What gives things back does so before it asks.
#define IN_ORDER() \
    if (current()->lost) return current()->lost

typedef void* Handle;

static address of(Handle handle) { return reinterpret_cast<address>(handle); }
static Handle as_handle(address handle) { return reinterpret_cast<Handle>(handle); }
static bool is_device(int device) { return device >= 0 && (address)device < machine.devices; }

static Context* primary(int device) {
    for (const auto& context : machine.contexts)
        if (context->device == device && !context->foreign && !context->gone) return context.get();
    machine.contexts.push_back(std::make_unique<Context>(Context{device, 0, false, false, 0, 0, {}}));
    return machine.contexts.back().get();
}

static Context* foreign(int device) {
    for (const auto& context : machine.contexts)
        if (context->device == device && context->foreign) return context.get();
    machine.contexts.push_back(std::make_unique<Context>(Context{device, 1, true, false, 0, 0, {}}));
    return machine.contexts.back().get();
}

// Which stream a handle is; its context has to be in order.
static int find_stream(Handle given, Stream** out) {
    const address handle = of(given);
    if (handle <= 2) {
        if (!current()) return INVALID_CONTEXT;
        if (current()->gone) return CONTEXT_IS_DESTROYED;
        if (handle == 2) {
            address& own = current()->by_thread[std::this_thread::get_id()];
            if (!own) own = new_stream(current(), true, true).handle;
            *out = &machine.streams.at(own);
        } else {
            *out = &legacy_of(current());
        }
        return current()->lost;
    }
    const auto found = machine.streams.find(handle);
    if (found == machine.streams.end()) return INVALID_HANDLE;
    if (found->second.gone || found->second.context->gone) {
        broken(text("stream %#llx has ended", handle));
        return INVALID_HANDLE;
    }
    *out = &found->second;
    return found->second.context->lost;
}

static int find_event(Handle handle, Event** out) {
    const auto found = machine.events.find(of(handle));
    if (found == machine.events.end()) return INVALID_HANDLE;
    if (found->second.gone || found->second.context->gone) {
        broken(text("event %#llx has ended", of(handle)));
        return INVALID_HANDLE;
    }
    *out = &found->second;
    return found->second.context->lost;
}

#define STREAM(name, handle) \
    Stream* name = nullptr; \
    if (int wrong = find_stream(handle, &name)) return wrong
#define EVENT(name, handle) \
    Event* name = nullptr; \
    if (int wrong = find_event(handle, &name)) return wrong

// Pools give back what is above their threshold when somebody has waited.
static void trim_pools() {
    for (auto& [handle, pool] : machine.pools) {
        const size_t keep = pool.gone ? pool.used : std::max(pool.used, pool.threshold);
        if (pool.reserved <= keep) continue;
        machine.used[pool.context->device] -= pool.reserved - keep;
        pool.reserved = keep;
    }
}

static void wait_for_work(Stream& stream) {
    wait(stream.handle, stream.submitted, stream.clock);
    trim_pools();
}
