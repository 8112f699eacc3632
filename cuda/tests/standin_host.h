// The host's part of the pool over the stand-in, a case for each promise; a part of standin_check.cpp.
#pragma once

// The tier's device, with an image that fits; closed after the case.
struct Gpu {
    kv_gpu* gpu = nullptr;
    std::vector<char> program = program_for(90);

    Gpu() {
        const kv_image image = {program.data(), program.size(), 90, 0};
        const int code = kv_open(library, 0, &image, 1, 0, &gpu);
        expect_at(__LINE__, code == KV_OK, "kv_open:", kv_why());
    }
    ~Gpu() { kv_close(gpu); }
};

CASE(the_host_copies_by_every_path) {
    standin_set("bytes", 8 << 20);
    Gpu host;
    kv_gpu* gpu = host.gpu;
    const u32 pieces = 9, size = 4096;
    // Until there is no room.
    std::vector<uint64_t> slabs;
    uint64_t slab = 0, left = 0;
    int code = KV_OK;
    while ((code = kv_reserve(gpu, 3 << 20, &slab)) == KV_OK) slabs.push_back(slab);
    EXPECT(code == KV_NO_ROOM && slabs.size() == 2 && standin_calls("cuMemAlloc_v2") == 3);
    EXPECT(std::string(kv_why()) == "cuMemAlloc: CUDA_ERROR_OUT_OF_MEMORY (2)");
    OK(kv_free_bytes(gpu, &left));
    EXPECT(left == 2 << 20);

    void *memory = nullptr, *table_memory = nullptr;
    uint64_t ram = 0, table = 0, stream = 0, other = 0, event = 0;
    OK(kv_pinned(gpu, 2 * pieces * size, &memory, &ram));
    OK(kv_pinned(gpu, 2 * pieces * sizeof(kv_pair), &table_memory, &table));
    OK(kv_stream(gpu, &stream));
    OK(kv_stream(gpu, &other));
    OK(kv_event(gpu, 0, &event));
    OK(kv_knows(gpu, stream));
    EXPECT_CODE(KV_REFUSED, kv_knows(gpu, standin_foreign_stream(0)));
    auto* bytes = (unsigned char*)memory;
    for (int path : {KV_BY_ENGINE, KV_BY_BATCH, KV_BY_KERNEL}) {
        for (u32 n = 0; n < pieces * size; ++n) bytes[n] = (unsigned char)(n * 7 + n / size + path);
        memset(bytes + pieces * size, 0, pieces * size);
        std::vector<kv_piece> up, down;
        auto* pairs = (kv_pair*)table_memory;
        for (u32 n = 0; n < pieces; ++n) {
            // The first three are neighbours.
            const u32 place = n < 3 ? n : pieces + 2 - n;
            up.push_back({ram + n * size, slabs[1] + place * size, size});
            down.push_back({slabs[1] + place * size, ram + (pieces + n) * size, size});
            pairs[n] = {up[n].from, up[n].to};
            pairs[pieces + n] = {down[n].from, down[n].to};
        }
        const uint64_t calls = standin_calls("cuMemcpyAsync");
        OK(kv_copy(gpu, up.data(), pieces, path, table, 2, stream));
        OK(kv_record(gpu, event, stream));
        OK(kv_after(gpu, other, event));
        OK(kv_copy(gpu, down.data(), pieces, path, table + pieces * sizeof(kv_pair), 2, other));
        OK(kv_record(gpu, event, other));
        if (is_lazy) {
            EXPECT_CODE(KV_NOT_YET, kv_over(gpu, event));
            EXPECT(bytes[pieces * size + 1] == 0);
        }
        OK(kv_wait(gpu, event));
        OK(kv_over(gpu, event));
        EXPECT(memcmp(bytes, bytes + pieces * size, pieces * size) == 0);
        EXPECT(standin_calls("cuMemcpyAsync") == calls + (path == KV_BY_ENGINE ? 14 : 0));
    }
    OK(kv_end_event(gpu, event));
    OK(kv_end_stream(gpu, stream));
    OK(kv_end_stream(gpu, other));
    OK(kv_unpinned(gpu, memory));
    OK(kv_unpinned(gpu, table_memory));
    for (uint64_t each : slabs) OK(kv_release(gpu, each));
}

CASE(the_host_encodes_and_decodes) {
    Gpu host;
    kv_gpu* gpu = host.gpu;
    const u32 blocks = 3, heads = 2, tokens = 16, dim = 64, values = heads * tokens * dim;
    const u32 plane_bytes = 2 * values, payload = plane_bytes + 64 + values;
    void* memory = nullptr;
    uint64_t ram = 0, slab = 0, stream = 0, event = 0;
    OK(kv_pinned(gpu, 1 << 20, &memory, &ram));
    OK(kv_reserve(gpu, 1 << 20, &slab));
    OK(kv_stream(gpu, &stream));
    OK(kv_event(gpu, 1, &event));
    // In host memory: tables, then rows of two planes and the same again, for what is decoded.
    auto* bytes = (char*)memory;
    memset(bytes, 0, 1 << 20);
    auto* planes = (kv_plane*)bytes;
    auto *offsets = (u64*)(bytes + 1024), *payloads = (u64*)(bytes + 2048);
    auto* state = (u32*)(bytes + 3072);
    const u32 rows = 4096, decoded = rows + 2 * blocks * plane_bytes;
    for (u32 p = 0; p < 2; ++p) {
        planes[p].base = ram + rows + p * blocks * plane_bytes;
        planes[p].head_stride = tokens * dim * 2;
        planes[p].token_stride = dim * 2;
        planes[p].at = p ? plane_bytes : 0;
        planes[p].coding = p ? KV_S8 : KV_RAW;
        planes[p].by = p ? KV_HEAD : KV_TENSOR;
        planes[p].bound = INFINITY;
        planes[2 + p] = planes[p];
        planes[2 + p].base += decoded - rows;
    }
    for (u32 b = 0; b < blocks; ++b) {
        offsets[b] = b * plane_bytes;
        payloads[b] = slab + b * payload;
    }
    // Small numbers in the first plane, and in the other -127 and 127 times a power of two, whose scale is exact.
    auto* halves = (u16*)(bytes + rows);
    for (u32 n = 0; n < blocks * values; ++n) halves[n] = (u16)(n % 0x3c00);
    for (u32 n = 0; n < blocks * values; ++n) halves[blocks * values + n] = n % 3 ? 0x57f0 : 0xd7f0;
    kv_work work = {ram, ram + 1024, ram + 2048, ram + 3072, blocks, 2, heads, tokens, dim, KV_FP16, 1, tokens};
    OK(kv_code(gpu, 0, &work, 4, stream));
    work.plane += 2 * sizeof(kv_plane);
    OK(kv_code(gpu, 1, &work, 4, stream));
    OK(kv_record(gpu, event, stream));
    if (is_lazy) EXPECT(byte_at(slab) == 0xdb);
    OK(kv_wait(gpu, event));
    EXPECT(state[0] == 0 && state[1] == 0 && state[2] == 0);
    EXPECT(memcmp(bytes + rows, bytes + decoded, 2 * blocks * plane_bytes) == 0);
    double seconds = -1;
    OK(kv_seconds(gpu, event, event, &seconds));
    EXPECT(seconds == 0);
    OK(kv_end_event(gpu, event));
    OK(kv_end_stream(gpu, stream));
    OK(kv_release(gpu, slab));
    OK(kv_unpinned(gpu, memory));
}

CASE(the_host_borrows_in_the_order_of_a_stream) {
    Gpu host;
    uint64_t stream = 0, memory = 0, event = 0;
    int device = 7;
    OK(kv_stream(host.gpu, &stream));
    OK(kv_borrow(host.gpu, 1000, stream, &memory));
    OK(kv_device_of(host.gpu, memory, &device));
    EXPECT(device == 0);
    OK(kv_device_of(host.gpu, at(&device), &device));
    EXPECT(device == -1);
    OK(kv_return(host.gpu, memory, stream));
    EXPECT_CODE(KV_REFUSED, kv_return(host.gpu, memory, stream));
    BROKEN(1, "cuMemFreeAsync");
    // What is left of it is in the stream.
    OK(kv_event(host.gpu, 0, &event));
    OK(kv_record(host.gpu, event, stream));
    OK(kv_wait(host.gpu, event));
    OK(kv_end_event(host.gpu, event));
    OK(kv_end_stream(host.gpu, stream));
}

CASE(the_host_copies_neighbours_of_two_allocations) {
    Gpu host;
    auto* own = (char*)mmap(nullptr, 8192, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    memset(own, 7, 8192);
    uint64_t first = 0, second = 0, slab = 0, stream = 0;
    OK(kv_register(host.gpu, own, 4096, &first));
    OK(kv_register(host.gpu, own + 4096, 4096, &second));
    OK(kv_reserve(host.gpu, 8192, &slab));
    OK(kv_stream(host.gpu, &stream));
    const kv_piece pieces[] = {{first, slab, 4096}, {second, slab + 4096, 4096}};
    OK(kv_copy(host.gpu, pieces, 2, KV_BY_ENGINE, 0, 0, stream));
    OK(cuStreamSynchronize((Handle)stream));
    EXPECT(byte_at(slab) == 7 && byte_at(slab + 8191) == 7);
    OK(kv_forget(host.gpu, own));
    OK(kv_forget(host.gpu, own + 4096));
    OK(kv_release(host.gpu, slab));
    OK(kv_end_stream(host.gpu, stream));
    munmap(own, 8192);
}

CASE(the_host_copies_on_the_legacy_stream) {
    Gpu host;
    uint64_t ram = 0, slab = 0;
    void* memory = nullptr;
    OK(kv_pinned(host.gpu, 64, &memory, &ram));
    OK(kv_reserve(host.gpu, 64, &slab));
    const kv_piece piece = {ram, slab, 64};
    OK(kv_copy(host.gpu, &piece, 1, KV_BY_BATCH, 0, 0, 0));
    OK(cuCtxPushCurrent_v2([] {
        Handle context = nullptr;
        OK(cuDevicePrimaryCtxRetain(&context, 0));
        return context;
    }()));
    OK(cuCtxSynchronize());
    OK(cuCtxPopCurrent_v2(nullptr));
    OK(cuDevicePrimaryCtxRelease_v2(0));
    OK(kv_release(host.gpu, slab));
    OK(kv_unpinned(host.gpu, memory));
}

CASE(what_the_host_makes_by_halves_it_takes_back) {
    Gpu host;
    static char own[4096];
    void* memory = nullptr;
    uint64_t address = 0;
    standin_fail("cuMemHostGetDevicePointer_v2", 1, 801);
    EXPECT_CODE(KV_REFUSED, kv_pinned(host.gpu, 64, &memory, &address));
    standin_fail("cuMemHostGetDevicePointer_v2", 1, 801);
    EXPECT_CODE(KV_REFUSED, kv_register(host.gpu, own, sizeof own, &address));
    EXPECT(std::string(kv_why()) == "cuMemHostGetDevicePointer: CUDA_ERROR_NOT_SUPPORTED (801)");
}

CASE(the_host_opens_the_image_that_fits_best) {
    const unsigned arches[] = {80, 86, 90, 120};
    std::vector<std::vector<char>> programs;
    std::vector<kv_image> images;
    for (unsigned arch : arches) programs.push_back(program_for(arch));
    for (int n = 0; n < 4; ++n) images.push_back({programs[n].data(), 64, arches[n], 0});
    // As long as its text, and not a byte longer.
    const std::string text = ptx_for(88, 80);
    const std::vector<char> ptx(text.begin(), text.end());
    images.push_back({ptx.data(), ptx.size(), 80, 1});
    const struct {
        unsigned capability, arch, is_ptx;
        int force;
    } wanted[] = {{80, 80, 0, 0}, {89, 86, 0, 0}, {90, 90, 0, 0}, {100, 80, 1, 0}, {121, 120, 0, 0}, {90, 80, 1, 1}};
    for (const auto& each : wanted) {
        standin_set("capability", each.capability);
        kv_gpu* gpu = nullptr;
        kv_facts facts;
        EXPECT_CODE(KV_OK, kv_open(library, 0, images.data(), images.size(), each.force, &gpu));
        OK(kv_tell(gpu, &facts));
        EXPECT(facts.image_arch == each.arch && facts.image_is_ptx == each.is_ptx);
        kv_close(gpu);
    }
    kv_gpu* gpu = nullptr;
    standin_set("driver", 12020);
    standin_set("capability", 100);
    EXPECT_CODE(KV_NO_IMAGE, kv_open(library, 0, images.data(), images.size(), 0, &gpu));
    EXPECT(!gpu && std::string(kv_why()) == "no image runs on architecture 100 with driver 12020");
}

CASE(the_host_opens_the_images_that_are_shipped) {
    const unsigned arches[] = {80, 90, 100, 120};
    std::vector<std::string> files;
    std::vector<kv_image> images;
    for (unsigned arch : arches) files.push_back(file_of("sm_" + std::to_string(arch) + ".cubin"));
    for (int n = 0; n < 4; ++n) images.push_back({files[n].data(), files[n].size(), arches[n], 0});
    const std::string ptx = file_of("compute_80.ptx");
    images.push_back({ptx.data(), ptx.size(), 80, 1});
    for (unsigned capability : {80, 86, 90, 100, 110, 120}) {
        standin_set("capability", capability);
        kv_gpu* gpu = nullptr;
        kv_facts facts;
        EXPECT_CODE(KV_OK, kv_open(library, 0, images.data(), images.size(), 0, &gpu));
        OK(kv_tell(gpu, &facts));
        // There is no program for one of them.
        const bool is_ptx = capability == 110;
        EXPECT(facts.image_is_ptx == is_ptx && facts.image_arch / 10 == (is_ptx ? 8 : capability / 10));
        kv_close(gpu);
    }
}

CASE(the_host_says_why_there_is_no_device) {
    kv_gpu* gpu = nullptr;
    const std::vector<char> program = program_for(90);
    const kv_image image = {program.data(), program.size(), 90, 0};
    EXPECT_CODE(KV_NO_DRIVER, kv_open("/nowhere/libcuda.so.1", 0, &image, 1, 0, &gpu));
    EXPECT_CODE(KV_NO_DEVICE, kv_open(library, 1, &image, 1, 0, &gpu));
    EXPECT(std::string(kv_why()) == "device is 1, expected a number from 0, below 1");
    standin_fail("cuInit", 1, 803);
    EXPECT_CODE(KV_NO_DRIVER, kv_open(library, 0, &image, 1, 0, &gpu));
    standin_fail("cuModuleLoadData", 1, 2);
    EXPECT_CODE(KV_NO_ROOM, kv_open(library, 0, &image, 1, 0, &gpu));
    standin_reset();
    standin_set("devices", 0);
    EXPECT_CODE(KV_NO_DEVICE, kv_open(library, 0, &image, 1, 0, &gpu));
    EXPECT(!gpu);
}

CASE(the_host_does_without_a_pool_where_a_device_has_none) {
    const std::vector<char> program = program_for(90);
    const kv_image image = {program.data(), program.size(), 90, 0};
    kv_gpu* gpu = nullptr;
    standin_fail("cuMemPoolCreate", 1, 801);
    EXPECT_CODE(KV_OK, kv_open(library, 0, &image, 1, 0, &gpu));
    uint64_t address = 0;
    EXPECT_CODE(KV_REFUSED, kv_borrow(gpu, 4096, 1, &address));
    kv_close(gpu);
}

CASE(the_host_leaves_nothing_when_opening_fails_anywhere) {
    const std::vector<char> program = program_for(90);
    const kv_image image = {program.data(), program.size(), 90, 0};
    const char* calls[] = {
        "cuInit", "cuDriverGetVersion", "cuDeviceGetCount", "cuDeviceGet", "cuDeviceGetName", "cuDeviceGetPCIBusId",
        "cuDeviceTotalMem_v2", "cuDeviceGetAttribute", "cuDevicePrimaryCtxRetain", "cuCtxPushCurrent_v2",
        "cuModuleLoadData", "cuModuleGetFunction", "cuMemPoolCreate", "cuMemPoolSetAttribute",
    };
    for (const char* call : calls) {
        kv_gpu* gpu = nullptr;
        standin_fail(call, 1, 2);
        const int code = kv_open(library, 0, &image, 1, 0, &gpu);
        expect_at(__LINE__, code != KV_OK && !gpu, call);
        expect_at(__LINE__, standin_leaks(nullptr, 0) == 0, call, all_of(standin_leaks));
    }
}

CASE(the_host_hears_that_its_context_is_lost) {
    Gpu host;
    uint64_t ram = 0, slab = 0, stream = 0, event = 0;
    void* memory = nullptr;
    OK(kv_pinned(host.gpu, 64, &memory, &ram));
    OK(kv_reserve(host.gpu, 64, &slab));
    OK(kv_stream(host.gpu, &stream));
    OK(kv_event(host.gpu, 0, &event));
    const kv_piece piece = {ram, slab, 64};
    standin_fail("work", 1, 700);
    kv_copy(host.gpu, &piece, 1, KV_BY_ENGINE, 0, 0, stream);
    kv_record(host.gpu, event, stream);
    EXPECT_CODE(KV_LOST, kv_wait(host.gpu, event));
    EXPECT(std::string(kv_why()) == "cuEventSynchronize: CUDA_ERROR_ILLEGAL_ADDRESS (700)");
    EXPECT_CODE(KV_LOST, kv_over(host.gpu, event));
    EXPECT_CODE(KV_LOST, kv_reserve(host.gpu, 64, &slab));
    // It is given back all the same.
    kv_end_event(host.gpu, event);
    kv_end_stream(host.gpu, stream);
    kv_unpinned(host.gpu, memory);
    kv_release(host.gpu, slab);
}
