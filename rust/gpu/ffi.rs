//! `cuda/kv_host.h`, as Rust calls it.

use super::device::Fault;
use std::ffi::{CStr, c_char, c_int, c_void};

pub(super) const NO_DRIVER: c_int = 1;
pub(super) const NO_DEVICE: c_int = 2;
pub(super) const NO_IMAGE: c_int = 3;
const NO_ROOM: c_int = 4;
const LOST: c_int = 5;
pub(super) const NOT_YET: c_int = 7;

pub(super) const BY_ENGINE: c_int = 0;
pub(super) const BY_BATCH: c_int = 1;
pub(super) const BY_KERNEL: c_int = 2;

pub(super) const FP16: u32 = 2;

/// What the C part keeps of a device.
#[repr(C)]
pub(super) struct Gpu {
    _private: [u8; 0],
}

#[repr(C)]
pub(super) struct Image {
    pub(super) bytes: *const c_void,
    pub(super) size: usize,
    pub(super) arch: u32,
    pub(super) is_ptx: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Facts {
    pub(super) name: [c_char; 128],
    pub(super) driver: u32,
    pub(super) major: u32,
    pub(super) minor: u32,
    pub(super) multiprocessors: u32,
    pub(super) integrated: u32,
    pub(super) image_arch: u32,
    pub(super) image_is_ptx: u32,
    pub(super) has_batch: u32,
    pub(super) total_bytes: u64,
    pub(super) pci: [c_char; 32],
}

/// As `kv_plane` of `cuda/kv_pool.cu`.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct Plane {
    pub(super) base: u64,
    pub(super) head_stride: u64,
    pub(super) token_stride: u64,
    pub(super) at: u32,
    pub(super) coding: u8,
    pub(super) by: u8,
    pub(super) unused: u16,
    pub(super) group: u32,
    pub(super) bound: f32,
}

/// As `kv_work` there.
#[repr(C)]
#[derive(Clone, Copy)]
pub(super) struct CodeWork {
    pub(super) plane: u64,
    pub(super) offset: u64,
    pub(super) coded: u64,
    pub(super) status: u64,
    pub(super) blocks: u32,
    pub(super) planes: u32,
    pub(super) heads: u32,
    pub(super) tokens: u32,
    pub(super) dim: u32,
    pub(super) dtype: u32,
    pub(super) runs: u32,
    pub(super) run_tokens: u32,
}

// # Safety
// As the header says: pointers are of what was opened or made, and of what is there during the call.
unsafe extern "C" {
    pub(super) fn kv_why() -> *const c_char;
    pub(super) fn kv_open(
        library: *const c_char,
        device: c_int,
        images: *const Image,
        count: usize,
        force_ptx: c_int,
        out: *mut *mut Gpu,
    ) -> c_int;
    pub(super) fn kv_close(gpu: *mut Gpu);
    pub(super) fn kv_tell(gpu: *mut Gpu, facts: *mut Facts) -> c_int;
    pub(super) fn kv_free_bytes(gpu: *mut Gpu, bytes: *mut u64) -> c_int;
    pub(super) fn kv_reserve(gpu: *mut Gpu, bytes: u64, address: *mut u64) -> c_int;
    pub(super) fn kv_release(gpu: *mut Gpu, address: u64) -> c_int;
    pub(super) fn kv_pinned(gpu: *mut Gpu, bytes: usize, memory: *mut *mut c_void, address: *mut u64) -> c_int;
    pub(super) fn kv_unpinned(gpu: *mut Gpu, memory: *mut c_void) -> c_int;
    pub(super) fn kv_register(gpu: *mut Gpu, memory: *mut c_void, bytes: usize, address: *mut u64) -> c_int;
    pub(super) fn kv_forget(gpu: *mut Gpu, memory: *mut c_void) -> c_int;
    pub(super) fn kv_borrow(gpu: *mut Gpu, bytes: u64, stream: u64, address: *mut u64) -> c_int;
    pub(super) fn kv_return(gpu: *mut Gpu, address: u64, stream: u64) -> c_int;
    pub(super) fn kv_device_of(gpu: *mut Gpu, address: u64, device: *mut c_int) -> c_int;
    pub(super) fn kv_stream(gpu: *mut Gpu, stream: *mut u64) -> c_int;
    pub(super) fn kv_end_stream(gpu: *mut Gpu, stream: u64) -> c_int;
    pub(super) fn kv_drain(gpu: *mut Gpu, stream: u64) -> c_int;
    pub(super) fn kv_knows(gpu: *mut Gpu, stream: u64) -> c_int;
    pub(super) fn kv_event(gpu: *mut Gpu, timed: c_int, event: *mut u64) -> c_int;
    pub(super) fn kv_end_event(gpu: *mut Gpu, event: u64) -> c_int;
    pub(super) fn kv_record(gpu: *mut Gpu, event: u64, stream: u64) -> c_int;
    pub(super) fn kv_after(gpu: *mut Gpu, stream: u64, event: u64) -> c_int;
    pub(super) fn kv_over(gpu: *mut Gpu, event: u64) -> c_int;
    pub(super) fn kv_wait(gpu: *mut Gpu, event: u64) -> c_int;
    pub(super) fn kv_seconds(gpu: *mut Gpu, from: u64, to: u64, seconds: *mut f64) -> c_int;
    pub(super) fn kv_copy(
        gpu: *mut Gpu,
        pieces: *const super::Piece,
        count: usize,
        path: c_int,
        table: u64,
        blocks: u32,
        stream: u64,
    ) -> c_int;
    pub(super) fn kv_code(gpu: *mut Gpu, decode: c_int, work: *const c_void, blocks: u32, stream: u64) -> c_int;
}

/// Why this thread's last call did not end well.
pub(super) fn why() -> String {
    // SAFETY: it is this thread's, ends with a zero, and is copied before the next call.
    unsafe { CStr::from_ptr(kv_why()) }.to_string_lossy().into_owned()
}

/// What a call's end means; `bytes`: what it was asked for.
pub(super) fn ended(end: c_int, bytes: u64) -> Result<(), Fault> {
    match end {
        0 => Ok(()),
        NO_ROOM => Err(Fault::NoRoom(bytes)),
        LOST => Err(Fault::Lost(why())),
        _ => Err(Fault::Refused(why())),
    }
}
