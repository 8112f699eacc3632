//! See `stratakv::fuzzing::structures`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| stratakv::fuzzing::structures(data));
