//! See `stratakv::fuzzing::record`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| stratakv::fuzzing::record(data));
