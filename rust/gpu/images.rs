//! Prebuilt kernels, see `cuda/build_kernels.py`.

macro_rules! image {
    ($name:literal) => {
        include_bytes!(concat!("../../cuda/prebuilt/", $name))
    };
}

/// Architecture, whether it is PTX, and what is loaded.
pub(super) const IMAGES: [(u32, bool, &[u8]); 5] = [
    (80, false, image!("sm_80.cubin")),
    (90, false, image!("sm_90.cubin")),
    (100, false, image!("sm_100.cubin")),
    (120, false, image!("sm_120.cubin")),
    (80, true, image!("compute_80.ptx")),
];
