// What a test tells the stand-in for the driver and asks it; the driver's own entry points are in standin.cpp.
//
// The stand-in is for tests alone. It says that it is no GPU, and nothing measured on it says anything of one.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

// When work is done.
enum {
    // When it is submitted.
    STANDIN_EAGER = 0,
    // When somebody waits for it; or one piece after each question whether something is over, so that asking ends.
    STANDIN_LAZY = 1,
    // Some time in between, by the seed.
    STANDIN_RANDOM = 2,
};

// Sets something, by name; -1: nothing has that name. What is set holds from then on, devices and bytes from cuInit on.
//
//     schedule    when work is done (eager)
//     seed        of the random schedule, of the order of copies in a batch, and of kernels' threads (1)
//     devices     how many there are (1)
//     bytes       of each device's memory (64 MiB)
//     capability  10 * major + minor (90)
//     driver      its version, 1000 * major + 10 * minor (12090)
//     apart       1: the device has its own addresses for memory of the process, as it may have on some machines (0)
int standin_set(const char *what, uint64_t value);

// The nth call of an entry point from now on (1: the next) ends with that code and does nothing. "work" is one, too:
// the nth copy or kernel that is carried out. After a code that ends a context, every later call on it ends so.
void standin_fail(const char *call, uint64_t nth, int code);

// How often an entry point was called.
uint64_t standin_calls(const char *call);
// How many rules were broken, and for each a line: call, what, address. Text is cut to the size.
size_t standin_report(char *text, size_t size);
// How much is still allocated, registered, created and retained, and for each a line.
size_t standin_leaks(char *text, size_t size);
// Copies, kernels and everything else that is queued and not done.
uint64_t standin_queued(void);
// Bytes that a device has given out, as the driver counts them.
uint64_t standin_used(int device);

// A stream of another context on a device, as a program beside ours might have it.
uint64_t standin_foreign_stream(int device);
// Reads and writes memory as it is now, wherever it is, and moves no work; -1: those bytes are not all known.
int standin_read(uint64_t address, void *to, size_t bytes);
int standin_write(uint64_t address, const void *from, size_t bytes);

// Forgets everything, and what was set. No other thread may be in a call.
void standin_reset(void);

#ifdef __cplusplus
}
#endif
