//! Compiles the host part of the GPU tier. It opens the driver when it runs: no part of CUDA is needed to build it.

fn main() {
    println!("cargo::rerun-if-changed=build.rs");
    #[cfg(feature = "cuda")]
    {
        println!("cargo::rerun-if-changed=cuda/kv_host.h");
        println!("cargo::rerun-if-changed=cuda/kv_host.cpp");
        // Without C++'s own library: what is loaded beside this needs none of a certain version.
        cc::Build::new()
            .cpp(true)
            .cpp_link_stdlib(None)
            .std("c++17")
            .flags(["-fno-exceptions", "-fno-rtti"])
            .file("cuda/kv_host.cpp")
            .compile("kv_host");
    }
}
