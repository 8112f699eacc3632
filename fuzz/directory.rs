//! See `stratakv::fuzzing::directory`.
#![no_main]

libfuzzer_sys::fuzz_target!(|data: &[u8]| stratakv::fuzzing::directory(data));
