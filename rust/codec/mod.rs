//! Codecs: keys and values in fewer bytes than they came in.
//!
//! | codec | keys | values | bytes of 16-bit KV, head of 128, block of 64 |
//! |---|---|---|---|
//! | `none` | as they are | as they are | 1 |
//! | `fp16` | half, from fp32 | half | - |
//! | `int8_sym` | 8 bits per channel | 8 bits per token | 0.51 |
//! | `int8_asym` | the same, with the least value | the same | 0.52 |
//! | `k8v4` | as `int8_sym` | 4 bits per token, groups of 64 | 0.40 |
//! | `int4` | 4 bits per channel, groups of 64 | 4 bits per token, groups of 64 | 0.28 |
//!
//! Keys have outlier channels and values do not, so keys are scaled per channel and values per token (KIVI: Liu et al.,
//! ICML 2024); any granularity can be asked for. `scalar` is the definition of the arithmetic; what the processor has is
//! chosen once, and equals it bit for bit: AVX2 with F16C, AVX-512, or NEON.
//!
//! A plane is encoded whole: `[scales][bases][codes]`, each part padded to 64 bytes; scales are bfloat16, bases are of the
//! dtype. One that has a NaN, an infinity, or values that no scale fits, is not encoded: its block stays as it is.

#[macro_use]
mod vector;

#[cfg(target_arch = "x86_64")]
mod avx512;
mod clip;
#[cfg(target_arch = "aarch64")]
mod neon;
mod plane;
mod scalar;
#[cfg(target_arch = "x86_64")]
mod x86;

#[cfg(test)]
mod tests;

use crate::block::Geometry;
use crate::error::{Error, ErrorKind, Result, input};
pub use clip::{Clip, Percentile};
pub use plane::Layout;
use std::ops::Range;
use std::sync::OnceLock;

const F32: u8 = 0;
const F16: u8 = 1;
const BF16: u8 = 2;

/// Signed codes of 8 bits, unsigned ones, and unsigned ones of 4.
const S8: u8 = 0;
const U8: u8 = 1;
const U4: u8 = 2;

/// Names of codecs, with their ids in records.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default)]
#[repr(u16)]
pub enum Codec {
    /// As they are.
    #[default]
    None = 0,
    /// Binary16 from binary32.
    Fp16 = 1,
    /// Eight bits around zero.
    Int8Sym = 2,
    /// Eight bits between the least and the greatest value.
    Int8Asym = 3,
    /// Keys in eight bits, values in four.
    K8V4 = 4,
    /// Four bits.
    Int4 = 5,
}

impl Codec {
    /// All codecs.
    pub const ALL: [Self; 6] = [Self::None, Self::Fp16, Self::Int8Sym, Self::Int8Asym, Self::K8V4, Self::Int4];

    /// The name used in configuration and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Fp16 => "fp16",
            Self::Int8Sym => "int8_sym",
            Self::Int8Asym => "int8_asym",
            Self::K8V4 => "k8v4",
            Self::Int4 => "int4",
        }
    }

    /// The codec of a name.
    ///
    /// # Errors
    /// There is none; the message lists those there are.
    pub fn parse(name: &str) -> Result<Self> {
        Self::ALL.into_iter().find(|codec| codec.name() == name).ok_or_else(|| {
            let valid = Self::ALL.map(Self::name).join(", ");
            input(format!("codec {name:?}: expected one of {valid}"))
        })
    }

    /// The codec of an id in a record.
    pub fn of_id(id: u16) -> Option<Self> {
        Self::ALL.into_iter().find(|&codec| codec as u16 == id)
    }
}

/// What shares a scale.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Granularity {
    /// All of a plane's block.
    Tensor,
    /// A head's block.
    Head,
    /// A token of a head, by groups of so many channels; 0: all channels.
    Token(u32),
    /// A channel of a head, by groups of so many tokens; 0: all tokens of the block.
    Channel(u32),
}

impl Granularity {
    /// Of `tensor`, `head`, `token` or `channel`; the latter two with `:` and the size of groups, if not of all.
    ///
    /// # Errors
    /// It is none of these.
    pub fn parse(text: &str) -> Result<Self> {
        let (name, group) = text.split_once(':').map_or((text, Some(0)), |(name, group)| (name, group.parse().ok()));
        let known = match (name, group) {
            ("tensor", Some(0)) if name == text => Some(Self::Tensor),
            ("head", Some(0)) if name == text => Some(Self::Head),
            ("token", Some(group)) if group < 1 << 24 => Some(Self::Token(group)),
            ("channel", Some(group)) if group < 1 << 24 => Some(Self::Channel(group)),
            _ => None,
        };
        known.ok_or_else(|| {
            input(format!(
                "granularity {text:?}: expected tensor, head, token or channel, or groups as token:64 or channel:32"
            ))
        })
    }

    /// What stands for it in a record.
    pub(crate) fn word(self) -> u32 {
        match self {
            Self::Tensor => 0,
            Self::Head => 1,
            Self::Token(group) => 2 | group << 8,
            Self::Channel(group) => 3 | group << 8,
        }
    }

    /// What a record's word stands for.
    pub(crate) fn of_word(word: u32) -> Option<Self> {
        let group = word >> 8;
        match word & 0xff {
            0 if group == 0 => Some(Self::Tensor),
            1 if group == 0 => Some(Self::Head),
            2 => Some(Self::Token(group)),
            3 => Some(Self::Channel(group)),
            _ => None,
        }
    }
}

/// A codec and how its scales are shared.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Scheme {
    /// The codec.
    pub codec: Codec,
    /// For keys, and for a latent plane.
    pub keys: Granularity,
    /// For values.
    pub values: Granularity,
    /// What values of a plane are clipped to.
    pub clip: Option<Clip>,
    /// So many layers stay as they are at either end of the model.
    pub raw_layers: [u32; 2],
}

impl Scheme {
    /// The default of a codec, for blocks of a geometry: keys per channel, values per token, and groups of 64 at most
    /// for four bits.
    pub fn new(codec: Codec, geometry: &Geometry) -> Self {
        let group =
            |of: u32| (1..=of.min(64)).rev().find(|n| of.is_multiple_of(*n) && n.is_multiple_of(2)).unwrap_or(of);
        let (four_k, four_v) = (codec == Codec::Int4, matches!(codec, Codec::Int4 | Codec::K8V4));
        Self {
            codec,
            keys: Granularity::Channel(if four_k { group(geometry.block_tokens) } else { 0 }),
            values: Granularity::Token(if four_v { group(geometry.head_dim) } else { 0 }),
            clip: None,
            raw_layers: [0; 2],
        }
    }
}

/// Paths of the arithmetic, by what the processor has.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Isa {
    /// Plain Rust: the definition.
    Scalar,
    /// AVX2 and F16C.
    Avx2,
    /// AVX-512.
    Avx512,
    /// What every processor of 64-bit ARM has.
    Neon,
}

impl Isa {
    /// Paths that this processor has, the fastest last.
    pub fn all() -> Vec<Self> {
        let mut all = vec![Self::Scalar];
        #[cfg(target_arch = "x86_64")]
        if x86::detected() {
            all.push(Self::Avx2);
        }
        #[cfg(target_arch = "x86_64")]
        if avx512::detected() {
            all.push(Self::Avx512);
        }
        #[cfg(target_arch = "aarch64")]
        if neon::detected() {
            all.push(Self::Neon);
        }
        all
    }

    /// The one that is used: what `STRATAKV_CODEC_ISA` names, else the fastest.
    pub fn chosen() -> Self {
        static CHOSEN: OnceLock<Isa> = OnceLock::new();
        *CHOSEN.get_or_init(|| Self::asked().ok().flatten().unwrap_or_else(Self::fastest))
    }

    /// What `STRATAKV_CODEC_ISA` names, if it is set.
    ///
    /// # Errors
    /// This processor has no such path.
    pub(crate) fn asked() -> Result<Option<Self>> {
        let Some(asked) = std::env::var_os("STRATAKV_CODEC_ISA") else { return Ok(None) };
        let named = Self::all().into_iter().find(|isa| asked == isa.name());
        named.map(Some).ok_or_else(|| {
            let valid: Vec<&str> = Self::all().into_iter().map(Self::name).collect();
            let message = format!("STRATAKV_CODEC_ISA is {asked:?}, expected one of {}", valid.join(", "));
            Error::new(ErrorKind::Config, message)
        })
    }

    fn fastest() -> Self {
        Self::all().pop().unwrap_or(Self::Scalar)
    }

    /// Its name.
    pub fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Neon => "neon",
        }
    }

    fn kernels(self, dtype: u8) -> &'static Kernels {
        match self {
            #[cfg(target_arch = "x86_64")]
            Self::Avx2 => &x86::KERNELS[dtype as usize],
            #[cfg(target_arch = "x86_64")]
            Self::Avx512 => &avx512::KERNELS[dtype as usize],
            #[cfg(target_arch = "aarch64")]
            Self::Neon => &neon::KERNELS[dtype as usize],
            _ => &scalar::KERNELS[dtype as usize],
        }
    }
}

/// The arithmetic for one dtype, over rows of values and, one after the other, the codes of rows. Groups are parts of
/// rows, of so many bytes, or columns over all the rows.
#[expect(clippy::type_complexity, reason = "each says in one line what it takes")]
struct Kernels {
    /// Greatest magnitude of each group; not finite, if a value is not.
    absmax: fn(rows: &[&[u8]], group_bytes: usize, hi: &mut [f32]),
    /// Least and greatest value of each group; not finite, if a value is not.
    range: fn(rows: &[&[u8]], group_bytes: usize, lo: &mut [f32], hi: &mut [f32]),
    absmax_columns: fn(rows: &[&[u8]], columns: Range<usize>, hi: &mut [f32]),
    range_columns: fn(rows: &[&[u8]], columns: Range<usize>, lo: &mut [f32], hi: &mut [f32]),
    parameters: fn(steps: f32, lo: &[f32], hi: &[f32], scale: &mut [f32], inverse: &mut [f32]) -> bool,
    /// By kind of code.
    quantise: [fn(rows: Rows<'_>, group_bytes: usize, inverse: &[f32], base: &[f32], codes: &mut [u8]); 3],
    quantise_columns: [Quantise; 3],
    dequantise: [fn(codes: &[u8], group_bytes: usize, scale: &[f32], base: &[f32], rows: &mut [&mut [u8]]); 3],
    dequantise_columns: [Dequantise; 3],
    /// Values to binary32 and back.
    read: fn(values: &[u8], floats: &mut [f32]),
    write: fn(floats: &[f32], values: &mut [u8]),
    halve: fn(row: &[u8], halves: &mut [u8]) -> bool,
    double: fn(halves: &[u8], row: &mut [u8]),
}

/// Rows at hand, and those after them: they may be fetched from memory meanwhile.
#[derive(Clone, Copy)]
struct Rows<'a> {
    now: &'a [&'a [u8]],
    next: &'a [&'a [u8]],
}

/// From the first column's codes on; a row's are so many bytes after those of the row before.
type Quantise = fn(rows: Rows<'_>, first: usize, inverse: &[f32], base: &[f32], codes: &mut [u8], stride: usize);
type Dequantise = fn(codes: &[u8], stride: usize, scale: &[f32], base: &[f32], first: usize, rows: &mut [&mut [u8]]);

/// The most groups whose parameters are computed at once.
const BATCH: usize = 256;
