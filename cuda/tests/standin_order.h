// What comes before what in the stand-in for the driver, and when it is done.
//
//     submitted ─▶ queue of its stream ─▶ done, once everything before it is
//
// A clock says of each stream up to which place its work is known to come before something. Work has the clock of its
// stream, which grows by what the stream is told to wait for; the host has one, too, which grows by what somebody asked
// about, or waited for, and found over. So an order that is missing is seen in every schedule, whoever came first.
//
// Work waits for nothing but what was submitted earlier: whatever is asked to run comes to an end.
#pragma once

#include <algorithm>
#include <cstdarg>
#include <cstdio>
#include <deque>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <thread>
#include <vector>

typedef unsigned long long address;

// By stream: all of it up to that place.
using Clock = std::map<address, address>;

struct Context {
    int device;
    int retained;
    // Made for the test: of no account to what is left over.
    bool foreign, gone;
    // What every call on it ends with; 0: it is in order.
    int lost;
    address legacy;
    std::map<std::thread::id, address> by_thread;
};

struct Work {
    std::string name;
    std::function<void()> run;
    Clock after;
    address at;
};

struct Stream {
    address handle;
    Context* context;
    // Whether it is in order with the legacy default stream.
    bool blocking, gone;
    // That of a context itself, which nobody has to end.
    bool own;
    std::deque<Work> queue;
    address submitted, done;
    Clock clock;
};

// What an event has of a stream.
struct Mark {
    address stream, at;
    Clock clock;
    address time;
};

struct Event {
    Context* context;
    bool timed, gone;
    std::shared_ptr<Mark> mark;
};

struct Range;
struct Pool {
    Context* context;
    size_t reserved, used, threshold;
    bool gone;
};
struct Module {
    Context* context;
    bool gone;
    Clock uses;
};
struct Function {
    address module;
    std::string name;
};

struct Machine {
    address schedule = 0, seed = 1, devices = 1, bytes = 64u << 20, capability = 90, version = 12090;
    bool apart = false, initialised = false;
    address chance = 1;
    std::map<std::string, address> calls;
    std::map<std::string, std::map<address, int>> faults;
    std::vector<std::string> broken;
    size_t breaks = 0;
    std::vector<std::unique_ptr<Context>> contexts;
    std::map<address, Stream> streams;
    std::map<address, Event> events;
    std::map<address, Pool> pools;
    std::map<address, Module> modules;
    std::map<address, Function> functions;
    std::map<address, std::shared_ptr<Range>> ranges;
    std::map<int, size_t> used;
    Clock host;
    // Handles are numbers that no pointer is, and none comes twice.
    address next_handle = 0x5000000000000010, time = 0;
};

static std::mutex everything;
static Machine machine;
// Rises with each reset: what threads remember of the time before is nothing.
static address epoch = 1;
static const char* calling = "";

// What is being carried out.
struct Running {
    const Stream* stream;
    const Work* work;
    // Memory that it touched, and that it should not have.
    std::set<const Range*> seen, told;
    const Range* last;
};
static Running* running;

__attribute__((format(printf, 1, 2))) static std::string text(const char* format, ...) {
    char line[512];
    va_list arguments;
    va_start(arguments, format);
    vsnprintf(line, sizeof line, format, arguments);
    va_end(arguments);
    return line;
}

// A rule is broken. What is said of each is kept up to a limit, how many there are is not.
static void broken(const std::string& what) {
    ++machine.breaks;
    if (machine.broken.size() == 256) return;
    machine.broken.push_back((running ? running->work->name : std::string(calling)) + ": " + what);
}

static address handle() { return machine.next_handle += 16; }

// Below a number: SplitMix64's.
static address chance(address below) {
    machine.chance += 0x9E3779B97F4A7C15;
    address mixed = (machine.chance ^ machine.chance >> 30) * 0xBF58476D1CE4E5B9;
    mixed = (mixed ^ mixed >> 27) * 0x94D049BB133111EB;
    return (mixed ^ mixed >> 31) % below;
}

static void join(Clock& clock, const Clock& other) {
    for (const auto& [stream, at] : other) clock[stream] = std::max(clock[stream], at);
}

static bool covers(const Clock& clock, address stream, address at) {
    const auto found = clock.find(stream);
    return at == 0 || (found != clock.end() && found->second >= at);
}

static bool covers(const Clock& clock, const Clock& other) {
    const auto is_there = [&](const auto& each) { return covers(clock, each.first, each.second); };
    return std::all_of(other.begin(), other.end(), is_there);
}

// Whether the host knows that work is over; a lost context does none any more.
static bool is_known_over(address stream, address at) {
    return covers(machine.host, stream, at) || machine.streams.at(stream).context->lost;
}

// Errors after which a context does nothing any more, as NVIDIA's header describes them.
static bool ends_context(int code) {
    static const int codes[] = {214, 220, 226, 700, 702, 709, 710, 714, 715, 716, 717, 718, 719, 721, 999};
    return std::find(std::begin(codes), std::end(codes), code) != std::end(codes);
}

static void run_to(address stream, address at);

static void run_first(Stream& stream) {
    const Work work = std::move(stream.queue.front());
    stream.queue.pop_front();
    for (const auto& [other, at] : work.after)
        if (other != stream.handle) run_to(other, at);
    Running now = {&stream, &work, {}, {}, nullptr}, *before = running;
    running = &now;
    // A lost context does nothing, but its queues come to an end.
    if (!stream.context->lost && work.run) {
        const auto faults = machine.faults.find("work");
        const address nth = ++machine.calls["work"];
        if (faults != machine.faults.end() && faults->second.count(nth)) stream.context->lost = faults->second[nth];
        else work.run();
    }
    running = before;
    ++machine.time;
    stream.done = work.at;
}

static void run_to(address handle, address at) {
    Stream& stream = machine.streams.at(handle);
    while (stream.done < at && !stream.queue.empty()) run_first(stream);
}

// One piece on the way there.
static void step_to(address handle, address at) {
    Stream& stream = machine.streams.at(handle);
    if (stream.done >= at || stream.queue.empty()) return;
    for (const auto& [other, place] : stream.queue.front().after) {
        if (other != handle && machine.streams.at(other).done < place) return step_to(other, place);
    }
    run_first(stream);
}

static void run_some() {
    std::vector<Stream*> busy;
    for (auto& [handle, stream] : machine.streams)
        if (!stream.queue.empty()) busy.push_back(&stream);
    if (!busy.empty()) run_first(*busy[chance(busy.size())]);
}

static Stream& new_stream(Context* context, bool blocking, bool own) {
    const address name = handle();
    return machine.streams[name] = Stream{name, context, blocking, false, own, {}, 0, 0, {}};
}

static Stream& legacy_of(Context* context) {
    if (!context->legacy) context->legacy = new_stream(context, true, true).handle;
    return machine.streams.at(context->legacy);
}

// What comes next in a stream comes after all that the stream and the host know, and what default streams ask for.
static void arrive(Stream& stream) {
    Context* context = stream.context;
    if (stream.handle == context->legacy) {
        for (const auto& [handle, other] : machine.streams)
            if (other.context == context && other.blocking) join(stream.clock, other.clock);
    } else if (stream.blocking && context->legacy) {
        join(stream.clock, legacy_of(context).clock);
    }
    join(stream.clock, machine.host);
}

// Queues work; its place in the stream. What has no `run` only keeps its place.
static address submit(Stream& stream, const std::string& name, std::function<void()> run) {
    arrive(stream);
    Work work = {name, std::move(run), stream.clock, ++stream.submitted};
    stream.clock[stream.handle] = stream.submitted;
    stream.queue.push_back(std::move(work));
    const address at = stream.submitted;
    if (machine.schedule == 0) run_to(stream.handle, at);
    if (machine.schedule == 2)
        for (address n = chance(3); n != 0; --n) run_some();
    return at;
}

// Whether that is over; what is asked for goes on by a piece.
static bool is_over(address stream, address at, const Clock& clock) {
    if (machine.streams.at(stream).done >= at) {
        join(machine.host, clock);
        return true;
    }
    step_to(stream, at);
    if (machine.schedule == 2)
        for (address n = chance(3); n != 0; --n) run_some();
    return false;
}

static void wait(address stream, address at, const Clock& clock) {
    run_to(stream, at);
    join(machine.host, clock);
}
