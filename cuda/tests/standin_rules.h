// Rules of streams, events, work, images and faults, a case for each; a part of standin_check.cpp.
#pragma once

CASE(it_says_that_it_is_no_gpu) {
    standin_set("devices", 3);
    standin_set("driver", 13000);
    int count = 0, version = 0;
    EXPECT_CODE(3, cuDeviceGetCount(&count));
    OK(cuInit(0));
    OK(cuDeviceGetCount(&count));
    OK(cuDriverGetVersion(&version));
    EXPECT(count == 3 && version == 13000);
    kv_gpu* gpu = nullptr;
    kv_facts facts;
    const std::vector<char> program = program_for(90);
    const kv_image image = {program.data(), program.size(), 90, 0};
    OK(kv_open(library, 2, &image, 1, 0, &gpu));
    OK(kv_tell(gpu, &facts));
    EXPECT(std::string(facts.name) == "stand-in (CPU, not a GPU)" && facts.major == 9 && facts.minor == 0);
    EXPECT(facts.total_bytes == 64u << 20 && std::string(facts.pci) == "0000:03:00.0");
    kv_close(gpu);
}

CASE(calls_are_counted) {
    Driver driver;
    const uint64_t before = standin_calls("cuMemAlloc_v2");
    driver.device(16);
    driver.device(16);
    EXPECT(standin_calls("cuMemAlloc_v2") == before + 2 && standin_calls("cuNothing") == 0);
}

CASE(a_copy_that_nobody_waited_for_gives_old_bytes) {
    Driver driver;
    const u64 memory = driver.device(4096);
    unsigned char *source = driver.pinned(4096, 7), *sink = driver.pinned(4096, 1);
    Handle stream = driver.stream();
    EXPECT(byte_at(memory) == 0xdb);
    OK(cuMemcpyAsync(memory, at(source), 4096, stream));
    OK(cuMemcpyAsync(at(sink), memory, 4096, stream));
    if (is_eager) EXPECT(sink[4095] == 7);
    if (is_lazy) EXPECT(sink[4095] == 1 && byte_at(memory) == 0xdb);
    OK(cuStreamSynchronize(stream));
    EXPECT(sink[0] == 7 && sink[4095] == 7);
}

CASE(an_order_between_streams_that_is_missing_gives_poison) {
    Driver driver;
    const u64 memory = driver.device(64);
    unsigned char *source = driver.pinned(64, 7), *sink = driver.pinned(64, 1);
    Handle up = driver.stream(), down = driver.stream(), event = driver.event();
    OK(cuMemcpyAsync(memory, at(source), 64, up));
    OK(cuMemcpyAsync(at(sink), memory, 64, down));
    OK(cuStreamSynchronize(down));
    if (is_lazy) EXPECT(sink[0] == 0xdb);
    OK(cuEventRecord(event, up));
    OK(cuStreamWaitEvent(down, event, 0));
    OK(cuMemcpyAsync(at(sink), memory, 64, down));
    OK(cuStreamSynchronize(down));
    EXPECT(sink[0] == 7);
}

CASE(an_event_is_a_snapshot) {
    Driver driver;
    const u64 memory = driver.device(128);
    unsigned char* source = driver.pinned(64, 7);
    Handle stream = driver.stream(), event = driver.event();
    OK(cuEventQuery(event));
    OK(cuEventSynchronize(event));
    OK(cuMemcpyAsync(memory, at(source), 64, stream));
    OK(cuEventRecord(event, stream));
    OK(cuMemcpyAsync(memory + 64, at(source), 64, stream));
    OK(cuEventSynchronize(event));
    EXPECT(byte_at(memory) == 7);
    if (is_lazy) EXPECT(byte_at(memory + 64) == 0xdb);
    OK(cuEventQuery(event));
}

CASE(a_wait_keeps_the_snapshot_of_its_call) {
    Driver driver;
    const u64 memory = driver.device(128);
    unsigned char* source = driver.pinned(64, 7);
    Handle first = driver.stream(), second = driver.stream(), event = driver.event();
    OK(cuMemcpyAsync(memory, at(source), 64, first));
    OK(cuEventRecord(event, first));
    OK(cuStreamWaitEvent(second, event, 0));
    OK(cuMemcpyAsync(memory + 64, at(source), 64, first));
    OK(cuEventRecord(event, first));
    OK(cuStreamSynchronize(second));
    EXPECT(byte_at(memory) == 7);
    if (is_lazy) EXPECT(byte_at(memory + 64) == 0xdb);
    OK(cuEventSynchronize(event));
    EXPECT(byte_at(memory + 64) == 7);
}

CASE(asking_ends) {
    Driver driver;
    const u64 memory = driver.device(64);
    unsigned char* source = driver.pinned(64, 7);
    Handle first = driver.stream(), second = driver.stream(), event = driver.event(), last = driver.event();
    for (int n = 0; n < 3; ++n) OK(cuMemcpyAsync(memory, at(source), 64, first));
    OK(cuEventRecord(event, first));
    OK(cuStreamWaitEvent(second, event, 0));
    OK(cuMemcpyAsync(memory, at(source), 64, second));
    OK(cuEventRecord(last, second));
    int asked = 0, code = 600;
    for (; code == 600 && asked < 100; ++asked) code = cuEventQuery(last);
    EXPECT(code == 0 && (asked == 1 || !is_eager));
    // Three copies, an event, a wait, a copy, an event: one for each question but the last.
    if (is_lazy) EXPECT(asked == 8);
    OK(cuMemcpyAsync(memory, at(source), 64, first));
    for (asked = 0, code = 600; code == 600 && asked < 100; ++asked) code = cuStreamQuery(first);
    EXPECT(code == 0);
}

CASE(an_event_that_is_timed_says_how_long) {
    Driver driver;
    const u64 memory = driver.device(64);
    unsigned char* source = driver.pinned(64, 7);
    Handle stream = driver.stream(), from = driver.event(0), to = driver.event(0), untimed = driver.event();
    float milliseconds = -1;
    EXPECT_CODE(400, cuEventElapsedTime(&milliseconds, from, to));
    OK(cuEventRecord(from, stream));
    OK(cuMemcpyAsync(memory, at(source), 64, stream));
    OK(cuEventRecord(to, stream));
    OK(cuEventRecord(untimed, stream));
    if (is_lazy) EXPECT_CODE(600, cuEventElapsedTime(&milliseconds, from, to));
    OK(cuEventSynchronize(to));
    OK(cuEventElapsedTime(&milliseconds, from, to));
    EXPECT(milliseconds > 0);
    EXPECT_CODE(400, cuEventElapsedTime(&milliseconds, from, untimed));
}

CASE(the_legacy_stream_waits_for_blocking_streams_alone) {
    Driver driver;
    const u64 memory = driver.device(128);
    unsigned char* source = driver.pinned(64, 7);
    Handle blocking = driver.stream(0), other = driver.stream(1);
    OK(cuMemcpyAsync(memory, at(source), 64, blocking));
    OK(cuMemcpyAsync(memory + 64, at(source), 64, other));
    unsigned char* sink = driver.pinned(64, 1);
    OK(cuMemcpyAsync(at(sink), memory, 64, nullptr));
    OK(cuStreamSynchronize((Handle)1));
    EXPECT(sink[0] == 7);
    if (is_lazy) EXPECT(byte_at(memory + 64) == 0xdb);
    // And they wait for it.
    source[0] = 9;
    OK(cuMemcpyAsync(memory, at(source), 64, nullptr));
    OK(cuMemcpyAsync(at(sink), memory, 64, blocking));
    OK(cuStreamSynchronize(blocking));
    EXPECT(sink[0] == 9);
}

CASE(each_thread_has_a_default_stream) {
    Driver driver;
    const u64 memory = driver.device(128);
    unsigned char* source = driver.pinned(64, 7);
    Handle context = nullptr;
    OK(cuStreamGetCtx((Handle)2, &context));
    EXPECT(context == driver.context);
    OK(cuMemcpyAsync(memory, at(source), 64, (Handle)2));
    std::thread([&] {
        EXPECT_CODE(201, cuMemcpyAsync(memory + 64, at(source), 64, (Handle)2));
        OK(cuCtxPushCurrent_v2(driver.context));
        OK(cuMemcpyAsync(memory + 64, at(source), 64, (Handle)2));
        OK(cuStreamSynchronize((Handle)2));
        OK(cuCtxPopCurrent_v2(nullptr));
    }).join();
    EXPECT(byte_at(memory + 64) == 7);
    if (is_lazy) EXPECT(byte_at(memory) == 0xdb);
}

CASE(a_stream_of_another_context_is_told) {
    Driver driver;
    Handle foreign = (Handle)standin_foreign_stream(0), context = nullptr, event = driver.event();
    OK(cuStreamGetCtx(foreign, &context));
    EXPECT(context && context != driver.context);
    EXPECT_CODE(400, cuEventRecord(event, foreign));
    EXPECT_CODE(400, cuStreamGetCtx((Handle)0x1234, &context));
    // A wait may cross.
    OK(cuEventRecord(event, driver.stream()));
    OK(cuStreamWaitEvent(foreign, event, 0));
}

CASE(what_has_ended_is_not_used) {
    Driver driver;
    Handle stream = driver.stream(), event = driver.event();
    OK(cuStreamDestroy_v2(stream));
    OK(cuEventDestroy_v2(event));
    EXPECT_CODE(400, cuStreamSynchronize(stream));
    EXPECT_CODE(400, cuEventQuery(event));
    EXPECT_CODE(400, cuEventDestroy_v2(event));
    BROKEN(3, "cuStreamSynchronize: stream", "cuEventQuery: event", "cuEventDestroy_v2: event");
    driver.streams.clear();
    driver.events.clear();
}

CASE(a_stream_that_is_destroyed_still_does_its_work) {
    Driver driver;
    const u64 memory = driver.device(64);
    unsigned char* source = driver.pinned(64, 7);
    Handle stream = driver.stream(), event = driver.event();
    OK(cuMemcpyAsync(memory, at(source), 64, stream));
    OK(cuEventRecord(event, stream));
    OK(cuStreamDestroy_v2(stream));
    driver.streams.clear();
    OK(cuEventSynchronize(event));
    EXPECT(byte_at(memory) == 7);
}

CASE(a_batch_copies_in_any_order) {
    Driver driver;
    Handle stream = driver.stream();
    const u64 memory = driver.device(16 * 64);
    unsigned char* source = driver.pinned(16 * 64, 0);
    std::vector<u64> to(16), from(16);
    std::vector<size_t> sizes(16, 64);
    for (int n = 0; n < 16; ++n) {
        memset(source + 64 * n, n + 1, 64);
        from[n] = at(source) + 64 * n;
        to[n] = memory + 64 * (15 - n);
    }
    // Sources of the second half are read during the call.
    Attributes attributes[2] = {{1, {}, 0}, {2, {}, 0}};
    size_t firsts[] = {0, 8}, failed = 0;
    const auto batch = [&](Handle on) {
        return cuMemcpyBatchAsync(to.data(), from.data(), sizes.data(), 16, attributes, firsts, 2, &failed, on);
    };
    OK(batch(stream));
    memset(source + 64 * 8, 0xee, 64 * 8);
    OK(cuStreamSynchronize(stream));
    for (int n = 0; n < 16; ++n) EXPECT(byte_at(memory + 64 * (15 - n)) == n + 1);
    EXPECT_CODE(1, batch(nullptr));
    attributes[1].order = 0;
    EXPECT_CODE(1, batch(stream));
    EXPECT(failed == SIZE_MAX);
    attributes[1].order = 3;
    to[5] = memory + 16 * 64 - 63;
    EXPECT_CODE(1, batch(stream));
    EXPECT(failed == 5);
    BROKEN(1, "cuMemcpyBatchAsync: 64 bytes at");
    to[5] = to[6] + 63;
    OK(batch(stream));
    BROKEN(1, "copies of a batch depend on each other");
    OK(cuStreamSynchronize(stream));
}

CASE(a_launch_has_its_parameters_from_the_call) {
    Driver driver;
    Handle stream = driver.stream();
    const u64 from = driver.device(64), to = driver.device(64);
    unsigned char* source = driver.pinned(64, 7);
    auto* table = (kv_pair*)driver.pinned(sizeof(kv_pair), 0);
    *table = {from, to};
    OK(cuMemcpyAsync(from, at(source), 64, stream));
    u64 where = at(table);
    u32 n = 1, vectors = 4;
    void* parameters[] = {&where, &n, &vectors};
    OK(cuLaunchKernel(driver.copy, 1, 1, 1, 32, 1, 1, 0, stream, parameters, nullptr));
    where = n = vectors = 0;
    OK(cuStreamSynchronize(stream));
    EXPECT(byte_at(to) == 7);
    EXPECT_CODE(1, cuLaunchKernel(driver.copy, 1, 1, 1, 2048, 1, 1, 0, stream, parameters, nullptr));
    EXPECT_CODE(1, cuLaunchKernel(driver.copy, 0, 1, 1, 32, 1, 1, 0, stream, parameters, nullptr));
    EXPECT_CODE(400, cuLaunchKernel(driver.module, 1, 1, 1, 32, 1, 1, 0, stream, parameters, nullptr));
}

CASE(an_image_is_of_the_device_s_architecture) {
    Driver driver;
    Handle module = nullptr, function = nullptr;
    const auto load = [&](const void* image) {
        const int code = cuModuleLoadData(&module, image);
        if (code == 0) OK(cuModuleUnload(module));
        return code;
    };
    const struct {
        unsigned capability, arch;
        int code;
    } programs[] = {
        {90, 90, 0}, {90, 80, 209}, {90, 100, 209}, {86, 80, 0}, {80, 86, 209}, {100, 100, 0}, {120, 100, 209},
    };
    for (const auto& each : programs) {
        standin_set("capability", each.capability);
        EXPECT_CODE(each.code, load(program_for(each.arch).data()));
    }
    std::vector<char> other = program_for(90);
    other[18] = 62;
    EXPECT_CODE(200, load(other.data()));
    EXPECT_CODE(200, load("no image"));
    EXPECT_CODE(200, load(""));
    standin_set("capability", 90);
    OK(load(ptx_for(88, 80).c_str()));
    OK(load(".version 8.0\n.target sm_90\n"));
    EXPECT_CODE(218, load("// a comment\n"));
    EXPECT_CODE(218, load(ptx_for(88, 100).c_str()));
    EXPECT_CODE(222, load(ptx_for(90, 80).c_str()));
    standin_set("driver", 13000);
    OK(load(ptx_for(90, 80).c_str()));
    standin_set("driver", 12060);
    OK(load(ptx_for(85, 80).c_str()));
    EXPECT_CODE(222, load(ptx_for(86, 80).c_str()));
    EXPECT_CODE(500, cuModuleGetFunction(&function, driver.module, "kv_nothing"));
}

CASE(a_module_is_not_unloaded_while_its_kernels_run) {
    Driver driver;
    Handle stream = driver.stream(), module = nullptr, function = nullptr;
    auto* table = (kv_pair*)driver.pinned(sizeof(kv_pair), 0);
    OK(cuModuleLoadData(&module, program_for(90).data()));
    OK(cuModuleGetFunction(&function, module, "kv_copy"));
    u64 where = at(table);
    u32 n = 0, vectors = 4;
    void* parameters[] = {&where, &n, &vectors};
    OK(cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, 0, stream, parameters, nullptr));
    OK(cuModuleUnload(module));
    BROKEN(1, "cuModuleUnload: module");
    EXPECT_CODE(400, cuLaunchKernel(function, 1, 1, 1, 32, 1, 1, 0, stream, parameters, nullptr));
    EXPECT_CODE(400, cuModuleUnload(module));
    BROKEN(2, "was unloaded", "is no module");
}

CASE(the_nth_call_fails) {
    Driver driver;
    standin_fail("cuMemAlloc_v2", 2, 2);
    u64 memory = 0;
    driver.device(8);
    EXPECT_CODE(2, cuMemAlloc_v2(&memory, 8));
    driver.device(8);
    standin_fail("cuMemAlloc_v2", 1, 801);
    EXPECT_CODE(801, cuMemAlloc_v2(&memory, 8));
}

CASE(what_ends_a_context_is_said_by_every_later_call) {
    standin_set("devices", 2);
    Driver driver;
    Handle stream = driver.stream(), event = driver.event(), other = nullptr;
    const u64 memory = driver.device(64);
    unsigned char* source = driver.pinned(64, 7);
    u64 more = 0;
    size_t left = 0, all = 0;
    // It comes from the second piece of work, and whoever waits is the first to hear of it.
    standin_fail("work", 2, 719);
    for (int n = 0; n < 3; ++n) {
        const int code = cuMemcpyAsync(memory, at(source), 64, stream);
        EXPECT(code == 0 || !is_lazy);
    }
    EXPECT_CODE(719, cuStreamSynchronize(stream));
    EXPECT_CODE(719, cuMemAlloc_v2(&more, 64));
    EXPECT_CODE(719, cuMemGetInfo_v2(&left, &all));
    EXPECT_CODE(719, cuEventQuery(event));
    EXPECT_CODE(719, cuMemcpyAsync(memory, at(source), 64, stream));
    EXPECT_CODE(719, cuCtxSynchronize());
    // Another device's context is in order.
    OK(cuDevicePrimaryCtxRetain(&other, 1));
    OK(cuCtxPushCurrent_v2(other));
    OK(cuMemAlloc_v2(&more, 64));
    OK(cuMemFree_v2(more));
    standin_fail("cuMemAlloc_v2", 1, 700);
    EXPECT_CODE(700, cuMemAlloc_v2(&more, 64));
    EXPECT_CODE(700, cuMemAlloc_v2(&more, 64));
    OK(cuCtxPopCurrent_v2(nullptr));
    OK(cuDevicePrimaryCtxRelease_v2(1));
}

CASE(a_context_does_not_end_while_work_is_queued) {
    Handle context = nullptr, stream = nullptr;
    OK(cuInit(0));
    EXPECT_CODE(201, cuStreamCreateWithPriority(&stream, 1, 0));
    EXPECT_CODE(201, cuDevicePrimaryCtxRelease_v2(0));
    BROKEN(1, "device 0's context is not retained");
    OK(cuDevicePrimaryCtxRetain(&context, 0));
    OK(cuCtxPushCurrent_v2(context));
    OK(cuStreamCreateWithPriority(&stream, 1, 0));
    void* memory = nullptr;
    OK(cuMemHostAlloc(&memory, 128, 0));
    for (int n = 0; n < 8; ++n) OK(cuMemcpyAsync(at(memory) + 64, at(memory), 64, stream));
    OK(cuDevicePrimaryCtxRelease_v2(0));
    if (is_lazy) BROKEN(1, "has work queued, and its context ends");
    else if (!is_eager) known_breaks = standin_report(nullptr, 0);
    EXPECT_CODE(709, cuMemAlloc_v2(nullptr, 8));
    OK(cuCtxPopCurrent_v2(nullptr));
    EXPECT_CODE(201, cuCtxPushCurrent_v2(context));
    EXPECT(standin_leaks(nullptr, 0) == 2);
    standin_reset();
    known_breaks = 0;
}

CASE(threads_may_call_at_once) {
    Driver driver;
    const u64 memory = driver.device(4 * 64);
    unsigned char* source = driver.pinned(4 * 64, 7);
    std::vector<std::thread> threads;
    for (int t = 0; t < 4; ++t) {
        Handle stream = driver.stream(), event = driver.event();
        threads.emplace_back([=, &driver] {
            OK(cuCtxPushCurrent_v2(driver.context));
            for (int n = 0; n < 50; ++n) {
                OK(cuMemcpyAsync(memory + 64 * t, at(source) + 64 * t, 64, stream));
                OK(cuEventRecord(event, stream));
                if (n % 2) OK(cuEventSynchronize(event));
                else while (cuEventQuery(event) == 600) {}
            }
            OK(cuCtxPopCurrent_v2(nullptr));
        });
    }
    for (std::thread& thread : threads) thread.join();
    for (int t = 0; t < 4; ++t) EXPECT(byte_at(memory + 64 * t) == 7);
}
