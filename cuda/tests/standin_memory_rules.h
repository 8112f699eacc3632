// Rules of memory, a case for each; a part of standin_check.cpp.
#pragma once

CASE(host_code_cannot_follow_an_address_of_the_device) {
    Driver driver;
    const u64 memory = driver.device(64);
    int ends[2];
    EXPECT(pipe(ends) == 0);
    // The system looks before it reads, and says so.
    EXPECT(write(ends[1], (const void*)memory, 1) == -1 && errno == EFAULT);
    close(ends[0]);
    close(ends[1]);
}

CASE(memory_is_freed_once) {
    Driver driver;
    u64 memory = 0;
    void* pinned = nullptr;
    static char own[64];
    OK(cuMemAlloc_v2(&memory, 64));
    OK(cuMemFree_v2(memory));
    EXPECT_CODE(1, cuMemFree_v2(memory));
    BROKEN(1, "cuMemFree_v2: device memory of 64 bytes at", "was freed before");
    OK(cuMemHostAlloc(&pinned, 64, 0));
    EXPECT_CODE(1, cuMemFree_v2(at(pinned)));
    OK(cuMemFreeHost(pinned));
    EXPECT_CODE(1, cuMemFreeHost(pinned));
    EXPECT_CODE(1, cuMemFreeHost(own));
    EXPECT_CODE(713, cuMemHostUnregister(own));
    EXPECT_CODE(1, cuMemFree_v2(12345));
    BROKEN(5, "is no device memory", "cuMemFreeHost: host memory of 64", "is no host memory");
    OK(cuMemHostRegister_v2(own, 64, 3));
    EXPECT_CODE(712, cuMemHostRegister_v2(own + 8, 64, 3));
    OK(cuMemHostUnregister(own));
    EXPECT_CODE(713, cuMemHostUnregister(own));
    BROKEN(1, "registered memory of 64");
}

CASE(what_was_freed_is_not_touched) {
    Driver driver;
    Handle stream = driver.stream();
    const u64 memory = driver.device(64), gone = driver.device(64);
    unsigned char* source = driver.pinned(64, 7);
    auto* table = (kv_pair*)driver.pinned(sizeof(kv_pair), 0);
    OK(cuMemFree_v2(gone));
    driver.forget(gone);
    int kind = 0;
    EXPECT_CODE(1, cuPointerGetAttribute(&kind, 2, gone));
    EXPECT_CODE(1, cuMemcpyAsync(gone, at(source), 64, stream));
    BROKEN(1, "cuMemcpyAsync: device memory of 64 bytes at", "was freed");
    // What a kernel touches is seen when it does.
    *table = {gone, memory};
    OK(driver.by_kernel(table, 1, 4, stream));
    EXPECT_CODE(700, cuStreamSynchronize(stream));
    BROKEN(1, "cuLaunchKernel 1, of kv_copy: device memory of 64 bytes at", "is touched after it was freed");
    unsigned char byte = 0;
    EXPECT(standin_read(memory, &byte, 1) == 0 && byte == 0xdd);
}

CASE(memory_is_not_freed_while_work_touches_it) {
    Driver driver;
    Handle stream = driver.stream();
    unsigned char* source = driver.pinned(64, 7);
    u64 memory = driver.device(64);
    OK(cuMemcpyAsync(memory, at(source), 64, stream));
    OK(cuMemFree_v2(memory));
    driver.forget(memory);
    BROKEN(1, "cuMemFree_v2: device memory of 64 bytes at");
    // Nor the other end of it.
    memory = driver.device(64);
    OK(cuMemcpyAsync(memory, at(source), 64, stream));
    OK(cuMemFreeHost(source));
    driver.pinned_memory.clear();
    BROKEN(1, "cuMemFreeHost: host memory of 64 bytes at");
    OK(cuStreamSynchronize(stream));
    // Whoever waited may, and whoever asked.
    source = driver.pinned(64, 7);
    OK(cuMemcpyAsync(memory, at(source), 64, stream));
    while (cuStreamQuery(stream) == 600) {}
    OK(cuMemFree_v2(memory));
    driver.forget(memory);
    // A kernel that comes late is found when it does.
    const u64 from = driver.device(64), to = driver.device(64);
    auto* table = (kv_pair*)driver.pinned(sizeof(kv_pair), 0);
    *table = {from, to};
    OK(driver.by_kernel(table, 1, 4, stream));
    cuMemFree_v2(to);
    driver.forget(to);
    cuStreamSynchronize(stream);
    BROKEN(1, "device memory of 64 bytes at");
}

CASE(registered_memory_is_not_forgotten_while_work_touches_it) {
    Driver driver;
    Handle stream = driver.stream();
    const u64 memory = driver.device(64);
    static char own[64];
    OK(cuMemHostRegister_v2(own, 64, 3));
    OK(cuMemcpyAsync(at(own), memory, 64, stream));
    OK(cuMemHostUnregister(own));
    BROKEN(1, "cuMemHostUnregister: registered memory of 64 bytes at");
    if (is_lazy) memset(own, 1, 64);
    OK(cuStreamSynchronize(stream));
    // It is done no more: whose memory that is now, nobody knows.
    if (is_lazy) EXPECT(own[0] == 1);
    // Known again, it may be touched again.
    OK(cuMemHostRegister_v2(own, 32, 3));
    OK(cuMemcpyAsync(at(own), memory, 32, stream));
    OK(cuStreamSynchronize(stream));
    OK(cuMemHostUnregister(own));
}

CASE(memory_ends_where_it_ends) {
    Driver driver;
    Handle stream = driver.stream();
    const u64 memory = driver.device(96), other = driver.device(4096);
    unsigned char* source = driver.pinned(4096, 7);
    EXPECT_CODE(1, cuMemcpyAsync(memory + 64, at(source), 33, stream));
    EXPECT_CODE(1, cuMemcpyAsync(at(source), memory + 4096, 8, stream));
    BROKEN(2, "33 bytes at", "end beyond device memory of 96", "are nobody's");
    OK(cuMemcpyAsync(memory + 64, at(source), 32, stream));
    OK(cuStreamSynchronize(stream));
    auto* table = (kv_pair*)driver.pinned(sizeof(kv_pair), 0);
    *table = {other, memory};
    OK(driver.by_kernel(table, 1, 7, stream));
    EXPECT_CODE(700, cuStreamSynchronize(stream));
    BROKEN(1, "16 bytes at", "are touched, beyond device memory of 96");
}

CASE(no_copy_goes_from_one_allocation_into_the_next) {
    Driver driver;
    Handle stream = driver.stream();
    const u64 memory = driver.device(8192);
    auto* own = (char*)mmap(nullptr, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    OK(cuMemHostRegister_v2(own, 4096, 3));
    OK(cuMemHostRegister_v2(own + 4096, 4096, 3));
    EXPECT_CODE(1, cuMemcpyAsync(memory, at(own), 8192, stream));
    OK(cuMemHostUnregister(own));
    OK(cuMemHostUnregister(own + 4096));
    munmap(own, 8192);
}

CASE(a_kernel_has_the_device_s_names_for_memory) {
    standin_set("apart", 1);
    standin_set("devices", 2);
    Driver driver;
    Handle stream = driver.stream();
    const u64 memory = driver.device(64);
    unsigned char* source = driver.pinned(64, 7);
    auto* table = (kv_pair*)driver.pinned(sizeof(kv_pair), 0);
    u64 named = 0;
    OK(cuMemHostGetDevicePointer_v2(&named, source + 16, 0));
    EXPECT(named != at(source) + 16);
    *table = {named - 16, memory};
    OK(driver.by_kernel(table, 1, 4, stream));
    OK(cuStreamSynchronize(stream));
    EXPECT(byte_at(memory) == 7);
    *table = {at(source), memory};
    OK(driver.by_kernel(table, 1, 4, stream));
    EXPECT_CODE(700, cuStreamSynchronize(stream));
    BROKEN(1, "host memory of 64 bytes at", "by an address that is not the device's");
}

CASE(a_kernel_reaches_its_own_device_alone) {
    standin_set("devices", 2);
    Driver driver;
    Handle stream = driver.stream(), other = nullptr;
    u64 far = 0;
    OK(cuDevicePrimaryCtxRetain(&other, 1));
    OK(cuCtxPushCurrent_v2(other));
    OK(cuMemAlloc_v2(&far, 64));
    OK(cuCtxPopCurrent_v2(nullptr));
    const u64 memory = driver.device(64);
    int device = -1;
    unsigned kind = 0;
    OK(cuPointerGetAttribute(&device, 9, far + 8));
    OK(cuPointerGetAttribute(&kind, 2, far));
    EXPECT(device == 1 && kind == 2);
    // A copy may cross.
    OK(cuMemcpyAsync(memory, far, 64, stream));
    auto* table = (kv_pair*)driver.pinned(sizeof(kv_pair), 0);
    *table = {far, memory};
    OK(driver.by_kernel(table, 1, 4, stream));
    EXPECT_CODE(700, cuStreamSynchronize(stream));
    BROKEN(1, "is another device's");
    OK(cuCtxPushCurrent_v2(other));
    OK(cuMemFree_v2(far));
    OK(cuCtxPopCurrent_v2(nullptr));
    OK(cuDevicePrimaryCtxRelease_v2(1));
}

CASE(memory_of_the_process_is_read_during_the_call) {
    Driver driver;
    Handle stream = driver.stream();
    const u64 memory = driver.device(64);
    std::vector<char> own(64, 7);
    OK(cuMemcpyAsync(memory, at(own.data()), 64, stream));
    own.assign(64, 1);
    // And what is written there is written before it returns.
    OK(cuMemcpyAsync(at(own.data()), memory, 64, stream));
    EXPECT(own[63] == 7);
    int kind = 0;
    EXPECT_CODE(1, cuPointerGetAttribute(&kind, 2, at(own.data())));
}

// As the driver's header has it.
struct PoolProperties {
    int allocation, handles, location, id;
    char rest[72];
};

struct PoolOf {
    Handle pool = nullptr;
    PoolOf() {
        const PoolProperties properties = {1, 0, 1, 0, {}};
        OK(cuMemPoolCreate(&pool, &properties));
    }
    ~PoolOf() { OK(cuMemPoolDestroy(pool)); }
    u64 get(size_t bytes, Handle stream) {
        u64 memory = 0;
        OK(cuMemAllocFromPoolAsync(&memory, bytes, pool, stream));
        return memory;
    }
    uint64_t value(int attribute) {
        uint64_t value = 0;
        OK(cuMemPoolGetAttribute(pool, attribute, &value));
        return value;
    }
};

CASE(memory_of_a_pool_comes_and_goes_in_the_order_of_a_stream) {
    Driver driver;
    PoolOf pool;
    Handle stream = driver.stream(), other = driver.stream(), event = driver.event();
    unsigned char* source = driver.pinned(64, 7);
    auto* table = (kv_pair*)driver.pinned(sizeof(kv_pair), 0);
    const u64 to = driver.device(64);
    // A kernel that is queued before it is freed may touch it, however late it runs.
    u64 memory = pool.get(64, stream);
    OK(cuMemcpyAsync(memory, at(source), 64, stream));
    *table = {memory, to};
    OK(driver.by_kernel(table, 1, 4, stream));
    OK(cuMemFreeAsync(memory, stream));
    OK(cuStreamSynchronize(stream));
    EXPECT(byte_at(to) == 7);
    // Another stream may, after an event.
    memory = pool.get(64, stream);
    OK(cuEventRecord(event, stream));
    OK(cuStreamWaitEvent(other, event, 0));
    OK(cuMemcpyAsync(memory, at(source), 64, other));
    OK(cuMemFreeAsync(memory, other));
    OK(cuStreamSynchronize(other));
}

CASE(memory_of_a_pool_is_not_touched_without_an_order) {
    Driver driver;
    PoolOf pool;
    Handle stream = driver.stream(), other = driver.stream();
    unsigned char* source = driver.pinned(64, 7);
    u64 memory = pool.get(64, stream);
    OK(cuMemcpyAsync(memory, at(source), 64, other));
    OK(cuStreamSynchronize(other));
    OK(cuStreamSynchronize(stream));
    BROKEN(1, "cuMemcpyAsync 1: memory of a pool of 64 bytes at", "nothing orders that after its allocation");
    OK(cuMemcpyAsync(memory, at(source), 64, other));
    OK(cuMemFreeAsync(memory, stream));
    BROKEN(1, "cuMemFreeAsync: memory of a pool of 64 bytes at", "nothing orders that after work that touches it");
    OK(cuStreamSynchronize(other));
    // From the call on that frees it nobody touches it, in the same stream neither; and it is freed once.
    memory = pool.get(64, stream);
    OK(cuMemFreeAsync(memory, stream));
    EXPECT_CODE(1, cuMemcpyAsync(memory, at(source), 64, stream));
    EXPECT_CODE(1, cuMemFreeAsync(memory, stream));
    EXPECT_CODE(1, cuMemFreeAsync(driver.device(8), stream));
    BROKEN(3, "was freed", "cuMemFreeAsync: memory of a pool of 64 bytes at", "is no memory of a pool");
}

CASE(a_kernel_that_nothing_orders_before_the_free_is_found) {
    Driver driver;
    PoolOf pool;
    Handle stream = driver.stream(), other = driver.stream(), event = driver.event();
    auto* table = (kv_pair*)driver.pinned(sizeof(kv_pair), 0);
    const u64 memory = pool.get(64, stream), to = driver.device(64);
    *table = {memory, to};
    OK(cuEventRecord(event, stream));
    OK(cuStreamWaitEvent(other, event, 0));
    OK(driver.by_kernel(table, 1, 4, other));
    OK(cuMemFreeAsync(memory, stream));
    cuCtxSynchronize();
    BROKEN(1, "memory of a pool of 64 bytes at");
}

CASE(a_pool_keeps_what_is_below_its_threshold) {
    standin_set("bytes", 1 << 20);
    Driver driver;
    PoolOf pool;
    Handle stream = driver.stream();
    uint64_t threshold = 512 << 10;
    OK(cuMemPoolSetAttribute(pool.pool, 4, &threshold));
    EXPECT(pool.value(4) == threshold);
    u64 memory = pool.get(768 << 10, stream), refused = 0;
    EXPECT_CODE(2, cuMemAllocFromPoolAsync(&refused, 512 << 10, pool.pool, stream));
    OK(cuMemFreeAsync(memory, stream));
    // Freed in that order, it is there for what comes next.
    memory = pool.get(768 << 10, stream);
    EXPECT(pool.value(5) == 768 << 10 && pool.value(7) == 768 << 10);
    OK(cuMemFreeAsync(memory, stream));
    OK(cuStreamSynchronize(stream));
    EXPECT(pool.value(5) == threshold && pool.value(7) == 0);
    size_t left = 0, all = 0;
    OK(cuMemGetInfo_v2(&left, &all));
    EXPECT(left == 512 << 10 && all == 1 << 20 && standin_used(0) == 512 << 10);
}

CASE(there_is_so_much_memory) {
    standin_set("bytes", 1 << 20);
    Driver driver;
    u64 memory = 0;
    EXPECT_CODE(2, cuMemAlloc_v2(&memory, (1 << 20) + 1));
    EXPECT_CODE(2, cuMemAlloc_v2(&memory, SIZE_MAX));
    EXPECT_CODE(1, cuMemAlloc_v2(&memory, 0));
    driver.device(1 << 20);
    EXPECT_CODE(2, cuMemAlloc_v2(&memory, 1));
}

CASE(what_is_left_is_listed) {
    static char own[64];
    {
        Driver driver;
        u64 memory = 0;
        void* pinned = nullptr;
        Handle stream = nullptr, event = nullptr, module = nullptr, context = nullptr, pool = nullptr;
        const PoolProperties properties = {1, 0, 1, 0, {}};
        OK(cuMemAlloc_v2(&memory, 48));
        OK(cuMemHostAlloc(&pinned, 80, 0));
        OK(cuMemHostRegister_v2(own, 64, 3));
        OK(cuStreamCreateWithPriority(&stream, 1, 0));
        OK(cuEventCreate(&event, 2));
        OK(cuModuleLoadData(&module, program_for(90).data()));
        OK(cuMemPoolCreate(&pool, &properties));
        OK(cuDevicePrimaryCtxRetain(&context, 0));
    }
    const std::string leaks = all_of(standin_leaks);
    EXPECT(standin_leaks(nullptr, 0) == 8);
    for (const char* what : {"device memory of 48", "host memory of 80", "registered memory of 64", "stream 0x",
                             "event 0x", "module 0x", "pool 0x", "context of device 0, retained 1 times"}) {
        expect_at(__LINE__, leaks.find(what) != std::string::npos, what, "is not in\n" + leaks);
    }
    standin_reset();
    EXPECT(standin_leaks(nullptr, 0) == 0);
}
