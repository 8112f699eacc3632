// The driver as the GPU tier uses it: a small table of calls that are opened at run time, and nothing of CUDA's headers.
//
// Each call says how it ended by a number, and why by kv_why. Nothing throws, ends the process, or waits for the device,
// but kv_wait and kv_drain. Handles and addresses of the device are numbers of 64 bits. Any thread may call: each call makes the
// device's context current, and what was current before is so again after it.
#pragma once
#include <stddef.h>
#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

enum {
    KV_OK = 0,
    // There is no driver, or one that lacks a call that is needed.
    KV_NO_DRIVER = 1,
    // There is no device, or none of that number.
    KV_NO_DEVICE = 2,
    // None of the images runs on the device.
    KV_NO_IMAGE = 3,
    // There is no memory for that now.
    KV_NO_ROOM = 4,
    // The context is of no use any more, nor is anything of it.
    KV_LOST = 5,
    // The driver does not do that.
    KV_REFUSED = 6,
    // It is under way.
    KV_NOT_YET = 7,
};

// How pieces are copied.
enum {
    // By copy engines, each piece by a call; neighbours together.
    KV_BY_ENGINE = 0,
    // By copy engines, all pieces by one call, where the driver has one for that.
    KV_BY_BATCH = 1,
    // By a kernel.
    KV_BY_KERNEL = 2,
};

typedef struct kv_gpu kv_gpu;

// A program for devices of an architecture, 10 × major + minor; PTX is one for all from there on.
typedef struct {
    const void *bytes;
    size_t size;
    uint32_t arch, is_ptx;
} kv_image;

typedef struct {
    char name[128];
    uint32_t driver, major, minor, multiprocessors, integrated, image_arch, image_is_ptx, has_batch;
    uint64_t total_bytes;
    char pci[32];
} kv_facts;

typedef struct {
    uint64_t from, to, bytes;
} kv_piece;

// Of the thread's last call that did not end with KV_OK: a sentence.
const char *kv_why(void);

// Opens the driver of that name (NULL: the system's) and a device of it, and loads the image that fits it best. `force_ptx`:
// as if no other fitted.
int kv_open(const char *library, int device, const kv_image *images, size_t count, int force_ptx, kv_gpu **out);
void kv_close(kv_gpu *gpu);
int kv_tell(kv_gpu *gpu, kv_facts *facts);
int kv_free_bytes(kv_gpu *gpu, uint64_t *bytes);

int kv_reserve(kv_gpu *gpu, uint64_t bytes, uint64_t *address);
int kv_release(kv_gpu *gpu, uint64_t address);
// Memory of the process that the device reaches: made by the driver, or made known to it. `address`: the device's name for it.
int kv_pinned(kv_gpu *gpu, size_t bytes, void **memory, uint64_t *address);
int kv_unpinned(kv_gpu *gpu, void *memory);
int kv_register(kv_gpu *gpu, void *memory, size_t bytes, uint64_t *address);
int kv_forget(kv_gpu *gpu, void *memory);
// Memory that comes and goes in the order of a stream, from a pool that gives nothing back.
int kv_borrow(kv_gpu *gpu, uint64_t bytes, uint64_t stream, uint64_t *address);
int kv_return(kv_gpu *gpu, uint64_t address, uint64_t stream);
// The device that memory is on; -1: on none, it is the process's.
int kv_device_of(kv_gpu *gpu, uint64_t address, int *device);

int kv_stream(kv_gpu *gpu, uint64_t *stream);
int kv_end_stream(kv_gpu *gpu, uint64_t stream);
// Waits for all that was put into it.
int kv_drain(kv_gpu *gpu, uint64_t stream);
// Whether a stream of somebody else's is of this device's context.
int kv_knows(kv_gpu *gpu, uint64_t stream);
int kv_event(kv_gpu *gpu, int timed, uint64_t *event);
int kv_end_event(kv_gpu *gpu, uint64_t event);
int kv_record(kv_gpu *gpu, uint64_t event, uint64_t stream);
int kv_after(kv_gpu *gpu, uint64_t stream, uint64_t event);
// KV_OK: what was recorded is over; KV_NOT_YET.
int kv_over(kv_gpu *gpu, uint64_t event);
int kv_wait(kv_gpu *gpu, uint64_t event);
int kv_seconds(kv_gpu *gpu, uint64_t from, uint64_t to, double *seconds);

// Copies pieces. By a kernel they are of one size, a multiple of 16 bytes, and `table` is where the device finds their kv_pair
// entries; `blocks` is how many blocks of threads it may take.
int kv_copy(kv_gpu *gpu, const kv_piece *pieces, size_t count, int path, uint64_t table, uint32_t blocks, uint64_t stream);
// Launches kv_encode or kv_decode on a kv_work, which is passed as it is.
int kv_code(kv_gpu *gpu, int decode, const void *work, uint32_t blocks, uint64_t stream);

#ifdef __cplusplus
}
#endif
