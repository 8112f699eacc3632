//! Blocks: their geometry, their names, and who may share them.
//!
//! A block is `block_tokens` tokens of K and V of all layers. Its hash names the *whole prefix* up to its end:
//!
//! ```text
//! K_0 = BLAKE3(secret; model | weights version | geometry | adapter | tenant salt) ^ epoch   the namespace's seed
//! K_i = K_(i-1) * x^m + P(tokens of block i)                                                in GF(2^128)
//! ```
//!
//! `P` reads four tokens as one field element and `x` is a secret point, so the chain is a polynomial hash of
//! the prefix: two fixed different prefixes of n elements collide with probability n / 2^128 while `x` is secret
//! (Carter-Wegman; the field and its reduction are those of GHASH without the bit reflection). For that reason a
//! raw hash never leaves the process: [`Secret::seal`] encrypts it (AES-128, one block) for disk and network.

use crate::error::{Result, input};
use aes::Aes128;
use aes::cipher::{BlockCipherDecrypt, BlockCipherEncrypt, KeyInit};

/// Element type of the stored tensors. The store moves their bits and never interprets them.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
#[repr(u8)]
pub enum Dtype {
    /// IEEE binary32.
    Fp32 = 1,
    /// IEEE binary16.
    Fp16 = 2,
    /// bfloat16.
    Bf16 = 3,
    /// Eight bits: FP8 in either format, as opaque bytes.
    Uint8 = 4,
}

impl Dtype {
    /// All dtypes, in the order of their codes.
    pub const ALL: [Self; 4] = [Self::Fp32, Self::Fp16, Self::Bf16, Self::Uint8];

    /// Bytes of one element.
    pub fn bytes(self) -> usize {
        match self {
            Self::Fp32 => 4,
            Self::Fp16 | Self::Bf16 => 2,
            Self::Uint8 => 1,
        }
    }

    /// The name used in configuration and messages.
    pub fn name(self) -> &'static str {
        match self {
            Self::Fp32 => "fp32",
            Self::Fp16 => "fp16",
            Self::Bf16 => "bf16",
            Self::Uint8 => "uint8",
        }
    }

    /// The dtype of that name.
    ///
    /// # Errors
    /// [`ErrorKind::Input`](crate::ErrorKind::Input) when there is none.
    pub fn parse(name: &str) -> Result<Self> {
        Self::ALL
            .into_iter()
            .find(|d| d.name() == name)
            .ok_or_else(|| input(format!("dtype {name:?} is not supported: expected fp32, fp16, bf16 or uint8")))
    }
}

/// Shape of one block of a model.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Geometry {
    /// Attention layers that have a cache.
    pub layers: u32,
    /// Tensors per layer: 2 for K and V, 1 for a latent (MLA) plane.
    pub planes: u32,
    /// Key/value heads.
    pub kv_heads: u32,
    /// Elements per head.
    pub head_dim: u32,
    /// Element type.
    pub dtype: Dtype,
    /// Tokens per block.
    pub block_tokens: u32,
}

/// Bytes of the fixed part of a record, before the token ids.
pub const RECORD_HEADER_BYTES: usize = 256;
/// The payload starts at a multiple of this within its record.
pub const PAYLOAD_ALIGN: usize = 512;
/// Records are padded to a multiple of this: the unit of direct I/O.
pub const RECORD_ALIGN: usize = 4096;
/// The largest block, in payload bytes.
pub const MAX_BLOCK_BYTES: u64 = 1 << 30;
/// The most tokens in a block.
pub const MAX_BLOCK_TOKENS: u32 = 4096;

impl Geometry {
    /// Checks that every size is positive and that a block stays below [`MAX_BLOCK_BYTES`].
    ///
    /// # Errors
    /// [`ErrorKind::Input`](crate::ErrorKind::Input) naming the field.
    pub fn validate(&self) -> Result<()> {
        let positive = [
            ("layers", self.layers),
            ("kv_heads", self.kv_heads),
            ("head_dim", self.head_dim),
            ("block_tokens", self.block_tokens),
        ];
        if let Some((name, _)) = positive.iter().find(|(_, value)| *value == 0) {
            return Err(input(format!("geometry: {name} is 0, expected a positive number")));
        }
        if !(1..=2).contains(&self.planes) {
            let planes = self.planes;
            return Err(input(format!("geometry: planes is {planes}, expected 2 (K and V) or 1 (latent)")));
        }
        if self.block_tokens > MAX_BLOCK_TOKENS {
            let n = self.block_tokens;
            return Err(input(format!("geometry: block_tokens is {n}, expected at most {MAX_BLOCK_TOKENS}")));
        }
        let bytes = [self.layers, self.planes, self.kv_heads, self.head_dim, self.block_tokens]
            .iter()
            .try_fold(self.dtype.bytes() as u64, |product, &n| product.checked_mul(u64::from(n)));
        match bytes {
            Some(bytes) if bytes <= MAX_BLOCK_BYTES => Ok(()),
            _ => Err(input(format!(
                "geometry: a block is larger than {MAX_BLOCK_BYTES} bytes; lower block_tokens ({})",
                self.block_tokens
            ))),
        }
    }

    /// Bytes of one token in one head of one plane: the contiguous run of every layout.
    pub fn row_bytes(&self) -> usize {
        self.head_dim as usize * self.dtype.bytes()
    }

    /// Planes of all layers.
    pub fn plane_count(&self) -> usize {
        self.layers as usize * self.planes as usize
    }

    /// Bytes of one token over all layers and planes.
    pub fn token_bytes(&self) -> usize {
        self.plane_count() * self.kv_heads as usize * self.row_bytes()
    }

    /// Payload bytes of one block.
    pub fn block_bytes(&self) -> usize {
        self.token_bytes() * self.block_tokens as usize
    }

    /// Where the payload starts in a record or slot.
    pub fn payload_offset(&self) -> usize {
        (RECORD_HEADER_BYTES + 4 * self.block_tokens as usize).next_multiple_of(PAYLOAD_ALIGN)
    }

    /// Bytes of one record with an unencoded payload, padding included; also the size of a slot.
    pub fn record_bytes(&self) -> usize {
        self.record_bytes_of(self.block_bytes())
    }

    /// Bytes of one record with so many bytes of payload, padding included.
    pub(crate) fn record_bytes_of(&self, payload_bytes: usize) -> usize {
        (self.payload_offset() + payload_bytes).next_multiple_of(RECORD_ALIGN)
    }

    /// From its fields in that order; `None`: they make no geometry.
    pub(crate) fn of_words([layers, planes, kv_heads, head_dim, dtype, block_tokens]: [u32; 6]) -> Option<Self> {
        let dtype = *Dtype::ALL.iter().find(|known| **known as u32 == dtype)?;
        let geometry = Self { layers, planes, kv_heads, head_dim, dtype, block_tokens };
        geometry.validate().is_ok().then_some(geometry)
    }

    /// The fields in a fixed order, for hashing and for the superblock.
    pub(crate) fn words(&self) -> [u32; 6] {
        [self.layers, self.planes, self.kv_heads, self.head_dim, self.dtype as u32, self.block_tokens]
    }
}

/// Name of a whole prefix, up to the end of one block. Secret: see the page above.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct BlockHash(pub u128);

impl BlockHash {
    /// The tenant of a namespace whose seed this is.
    pub(crate) fn tenant_tag(self) -> u64 {
        (self.0 >> 64) as u64
    }
}

impl std::fmt::Debug for BlockHash {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("BlockHash(..)")
    }
}

/// A block hash encrypted with the store's secret: what records carry.
pub type Sealed = [u8; 16];

/// The store's secret and what is derived from it.
#[derive(Clone)]
pub struct Secret {
    key: [u8; 32],
    point: u128,
    cipher: Aes128,
}

impl std::fmt::Debug for Secret {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Secret(..)")
    }
}

impl Secret {
    /// Derives the hash point and the seal from a passphrase or random bytes of any length.
    pub fn new(bytes: &[u8]) -> Self {
        let key = blake3::derive_key("stratakv 2026 store secret", bytes);
        let point = blake3::keyed_hash(&key, b"hash point");
        let seal = blake3::keyed_hash(&key, b"seal");
        Self { key, point: first_128(&point).max(2), cipher: Aes128::new(&first_16(&seal).into()) }
    }

    /// A number that tells two secrets apart without telling either.
    pub fn check_value(&self) -> [u8; 16] {
        first_16(&blake3::keyed_hash(&self.key, b"check"))
    }

    /// Names one model's blocks: model, weights version and geometry.
    pub fn fingerprint(&self, model: &str, weights_version: &str, geometry: &Geometry) -> [u8; 16] {
        first_16(&self.hash_fields(b"model", &[model.as_bytes(), weights_version.as_bytes()], geometry))
    }

    /// Names a tenant: the upper half of the seeds of all its namespaces. 0: no tenant.
    pub(crate) fn tenant_tag(&self, tenant: &str) -> u64 {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(b"tenant").update(tenant.as_bytes());
        // Another than that of none.
        if tenant.is_empty() { 0 } else { (first_128(&hasher.finalize()) as u64).max(1) }
    }

    /// Keyed digest of a record that leaves for a tier that others share.
    pub(crate) fn digest(&self, record: &[u8]) -> [u8; 32] {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        hasher.update(b"shared record").update(record);
        *hasher.finalize().as_bytes()
    }

    /// Whether this is the digest of a record; how long that takes tells nothing.
    pub(crate) fn is_digest(&self, record: &[u8], digest: &[u8]) -> bool {
        let mine = self.digest(record);
        // Of BLAKE3's own comparison, which takes the same time for all.
        digest
            .try_into()
            .is_ok_and(|theirs: [u8; 32]| blake3::Hash::from_bytes(mine) == blake3::Hash::from_bytes(theirs))
    }

    /// Encrypts a hash for disk or network.
    pub fn seal(&self, hash: BlockHash) -> Sealed {
        let mut block = hash.0.to_le_bytes().into();
        self.cipher.encrypt_block(&mut block);
        block.into()
    }

    /// Decrypts what [`seal`](Self::seal) encrypted.
    pub fn unseal(&self, sealed: Sealed) -> BlockHash {
        let mut block = sealed.into();
        self.cipher.decrypt_block(&mut block);
        BlockHash(u128::from_le_bytes(block.into()))
    }

    // Each field is preceded by its length, so no two lists of fields read the same.
    fn hash_fields(&self, purpose: &[u8], fields: &[&[u8]], geometry: &Geometry) -> blake3::Hash {
        let mut hasher = blake3::Hasher::new_keyed(&self.key);
        for field in [purpose].iter().chain(fields) {
            hasher.update(&(field.len() as u64).to_le_bytes()).update(field);
        }
        for word in geometry.words() {
            hasher.update(&word.to_le_bytes());
        }
        hasher.finalize()
    }
}

fn first_16(hash: &blake3::Hash) -> [u8; 16] {
    let mut out = [0; 16];
    out.copy_from_slice(&hash.as_bytes()[..16]);
    out
}

fn first_128(hash: &blake3::Hash) -> u128 {
    u128::from_le_bytes(first_16(hash))
}

/// Hashes the tokens of one namespace, block by block.
#[derive(Clone, Debug)]
pub struct Hasher {
    block_tokens: usize,
    seed: BlockHash,
    // What blocks begin with that an engine has named.
    name_seed: BlockHash,
    // powers[j] = x^(j+1); the last one, x^m, moves the chain on.
    powers: Vec<u128>,
}

impl Hasher {
    /// The hasher of a namespace: model, weights version, geometry, adapter and tenant salt.
    pub fn new(
        secret: &Secret,
        model: &str,
        weights_version: &str,
        geometry: &Geometry,
        adapter: &str,
        tenant: &str,
    ) -> Self {
        let fields = [model, weights_version, adapter, tenant].map(str::as_bytes);
        let tag = u128::from(secret.tenant_tag(tenant)) << 64;
        let low = |purpose| first_128(&secret.hash_fields(purpose, &fields, geometry)) & u128::from(u64::MAX);
        let seed = |purpose| BlockHash(tag | low(purpose));
        let block_tokens = geometry.block_tokens as usize;
        let mut powers = vec![secret.point];
        for _ in 1..block_tokens.div_ceil(4) {
            powers.push(gf_mul(powers[powers.len() - 1], secret.point));
        }
        Self { block_tokens, seed: seed(b"namespace"), name_seed: seed(b"names"), powers }
    }

    /// The same namespace after it was dropped so many times: the epoch is one more element before all tokens.
    #[must_use]
    pub fn in_epoch(mut self, epoch: u64) -> Self {
        self.seed.0 ^= u128::from(epoch);
        self.name_seed.0 ^= u128::from(epoch);
        self
    }

    /// What all its sequences of tokens begin with: names the namespace, in this epoch.
    pub fn seed(&self) -> BlockHash {
        self.seed
    }

    /// Hashes of all whole blocks of `tokens`; a partial block at the end has none.
    pub fn hashes(&self, tokens: &[u32]) -> Vec<BlockHash> {
        self.hashes_after(None, tokens)
    }

    /// Hashes of all whole blocks of `tokens`, which follow the block of that hash.
    pub fn hashes_after(&self, last: Option<BlockHash>, tokens: &[u32]) -> Vec<BlockHash> {
        let start = last.unwrap_or(self.seed);
        #[cfg(target_arch = "x86_64")]
        if std::is_x86_feature_detected!("pclmulqdq") {
            // SAFETY: PCLMULQDQ was detected on the line above; SSE2 is part of x86-64.
            return unsafe { clmul::hashes(self, start, tokens) };
        }
        self.hashes_by_definition(start, tokens)
    }

    /// Hash of a block by the name that an engine gave it: the same polynomial, over the name's length and its bytes by
    /// sixteens, from a seed of its own.
    pub fn of_name(&self, name: &[u8]) -> BlockHash {
        let sixteen = |bytes: &[u8]| bytes.iter().rev().fold(0u128, |acc, &byte| acc << 8 | u128::from(byte));
        let elements = std::iter::once(name.len() as u128).chain(name.chunks(16).map(sixteen));
        let hash = elements.fold(self.name_seed.0, |hash, element| multiply(hash, self.powers[0]) ^ element);
        BlockHash(multiply(hash, self.powers[0]))
    }

    fn hashes_by_definition(&self, start: BlockHash, tokens: &[u32]) -> Vec<BlockHash> {
        let degree = self.powers.len();
        let mut hash = start.0;
        let blocks = tokens.chunks_exact(self.block_tokens);
        let next = |block: &[u32]| {
            hash = gf_mul(hash, self.powers[degree - 1]);
            for (j, four) in block.chunks(4).enumerate() {
                let element = four.iter().rev().fold(0u128, |acc, &token| acc << 32 | u128::from(token));
                hash ^= gf_mul(element, self.powers[degree - 1 - j]);
            }
            BlockHash(hash)
        };
        blocks.map(next).collect()
    }
}

fn multiply(a: u128, b: u128) -> u128 {
    #[cfg(target_arch = "x86_64")]
    if std::is_x86_feature_detected!("pclmulqdq") {
        // SAFETY: PCLMULQDQ was detected on the line above; SSE2 is part of x86-64.
        return unsafe { clmul::multiply(a, b) };
    }
    gf_mul(a, b)
}

/// Bit by bit: the definition that the fast path equals.
fn gf_mul(mut a: u128, b: u128) -> u128 {
    let mut product = 0;
    for i in 0..128 {
        if b >> i & 1 == 1 {
            product ^= a;
        }
        a = if a >> 127 == 1 { a << 1 ^ 0x87 } else { a << 1 };
    }
    product
}

/// The same by carry-less multiplication (Gueron & Kounavis, "Intel Carry-Less Multiplication Instruction and its Usage
/// for Computing the GCM Mode", 2010). The products of a block are summed unreduced and reduced once, together with
/// that of the chain: one reduction a block is all that waits for the block before.
#[cfg(target_arch = "x86_64")]
mod clmul {
    use super::{BlockHash, Hasher};
    use std::arch::x86_64::{
        __m128i, _mm_clmulepi64_si128, _mm_cvtsi128_si64, _mm_set_epi32, _mm_set_epi64x, _mm_slli_si128,
        _mm_srli_si128, _mm_unpackhi_epi64, _mm_xor_si128,
    };

    #[target_feature(enable = "pclmulqdq")]
    fn load(v: u128) -> __m128i {
        _mm_set_epi64x((v >> 64) as i64, v as i64)
    }

    #[target_feature(enable = "pclmulqdq")]
    fn store(v: __m128i) -> u128 {
        let high = _mm_cvtsi128_si64(_mm_unpackhi_epi64(v, v)) as u64;
        u128::from(high) << 64 | u128::from(_mm_cvtsi128_si64(v) as u64)
    }

    /// An unreduced product of 255 bits, in three overlapping parts.
    #[derive(Clone, Copy)]
    struct Product {
        low: __m128i,
        middle: __m128i,
        high: __m128i,
    }

    #[target_feature(enable = "pclmulqdq")]
    fn product(a: __m128i, b: __m128i) -> Product {
        Product {
            low: _mm_clmulepi64_si128::<0x00>(a, b),
            middle: _mm_xor_si128(_mm_clmulepi64_si128::<0x01>(a, b), _mm_clmulepi64_si128::<0x10>(a, b)),
            high: _mm_clmulepi64_si128::<0x11>(a, b),
        }
    }

    #[target_feature(enable = "pclmulqdq")]
    fn sum(a: Product, b: Product) -> Product {
        Product {
            low: _mm_xor_si128(a.low, b.low),
            middle: _mm_xor_si128(a.middle, b.middle),
            high: _mm_xor_si128(a.high, b.high),
        }
    }

    #[target_feature(enable = "pclmulqdq")]
    fn reduce(p: Product) -> __m128i {
        let low = _mm_xor_si128(p.low, _mm_slli_si128::<8>(p.middle));
        let high = _mm_xor_si128(p.high, _mm_srli_si128::<8>(p.middle));
        // high * x^128 = high * 0x87: at most 135 bits, so the part above 128 folds once more.
        let fold = _mm_set_epi64x(0, 0x87);
        let (first, second) = (_mm_clmulepi64_si128::<0x00>(high, fold), _mm_clmulepi64_si128::<0x01>(high, fold));
        let over = _mm_clmulepi64_si128::<0x01>(second, fold);
        let folded = _mm_xor_si128(_mm_xor_si128(first, over), _mm_slli_si128::<8>(second));
        _mm_xor_si128(low, folded)
    }

    #[target_feature(enable = "pclmulqdq")]
    pub(super) fn multiply(a: u128, b: u128) -> u128 {
        store(reduce(product(load(a), load(b))))
    }

    #[target_feature(enable = "pclmulqdq")]
    pub(super) fn hashes(hasher: &Hasher, start: BlockHash, tokens: &[u32]) -> Vec<BlockHash> {
        let powers: Vec<__m128i> = hasher.powers.iter().rev().map(|&power| load(power)).collect();
        let mut hash = load(start.0);
        let mut out = Vec::with_capacity(tokens.len() / hasher.block_tokens);
        for block in tokens.chunks_exact(hasher.block_tokens) {
            let (fours, rest) = block.as_chunks::<4>();
            let zero = _mm_set_epi64x(0, 0);
            let mut all = Product { low: zero, middle: zero, high: zero };
            for (&[a, b, c, d], &power) in fours.iter().zip(&powers) {
                let element = _mm_set_epi32(d as i32, c as i32, b as i32, a as i32);
                all = sum(all, product(element, power));
            }
            if !rest.is_empty() {
                let at = |i: usize| rest.get(i).copied().unwrap_or(0) as i32;
                all = sum(all, product(_mm_set_epi32(0, at(2), at(1), at(0)), powers[fours.len()]));
            }
            hash = reduce(sum(all, product(hash, powers[0])));
            out.push(BlockHash(store(hash)));
        }
        out
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use proptest::prelude::*;

    fn geometry() -> Geometry {
        Geometry { layers: 2, planes: 2, kv_heads: 2, head_dim: 8, dtype: Dtype::Fp16, block_tokens: 16 }
    }

    fn hasher(secret: &str, model: &str, version: &str, adapter: &str, tenant: &str) -> Hasher {
        Hasher::new(&Secret::new(secret.as_bytes()), model, version, &geometry(), adapter, tenant)
    }

    proptest! {
        #[test]
        fn fast_hashes_equal_their_definition(
            tokens in prop::collection::vec(any::<u32>(), 0..200), block_tokens in 1u32..40, secret in any::<[u8; 8]>(),
        ) {
            let geometry = Geometry { block_tokens, ..geometry() };
            let hasher = Hasher::new(&Secret::new(&secret), "m", "", &geometry, "", "");
            prop_assert_eq!(hasher.hashes(&tokens), hasher.hashes_by_definition(hasher.seed, &tokens));
        }

        #[test]
        fn the_fast_product_equals_its_definition(a in any::<u128>(), b in any::<u128>()) {
            prop_assert_eq!(multiply(a, b), gf_mul(a, b));
        }

        #[test]
        fn hashes_of_a_sequence_that_grows_are_those_of_the_whole(
            tokens in prop::collection::vec(any::<u32>(), 0..200), block_tokens in 1u32..40, cut in any::<prop::sample::Index>(),
        ) {
            let hasher = Hasher::new(&Secret::new(b"s"), "m", "", &Geometry { block_tokens, ..geometry() }, "", "");
            let cut = cut.index(tokens.len() + 1) / block_tokens as usize * block_tokens as usize;
            let mut grown = hasher.hashes(&tokens[..cut]);
            grown.extend(hasher.hashes_after(grown.last().copied(), &tokens[cut..]));
            prop_assert_eq!(grown, hasher.hashes(&tokens));
        }

        #[test]
        fn a_name_has_one_hash_and_another_name_another(
            name in prop::collection::vec(any::<u8>(), 16..=64), other in prop::collection::vec(any::<u8>(), 16..=64),
        ) {
            let h = hasher("s", "m", "", "", "");
            prop_assert_eq!(h.of_name(&name) == h.of_name(&other), name == other);
            let longer = [&name[..], &[0]].concat();
            prop_assert_ne!(h.of_name(&name), h.of_name(&longer));
            prop_assert_ne!(h.of_name(&name), hasher("s", "m", "", "", "t").of_name(&name));
        }

        #[test]
        fn a_hash_depends_on_every_token_before_it(
            tokens in prop::collection::vec(any::<u32>(), 64), at in 0usize..64, bit in 0u32..32,
        ) {
            let h = hasher("s", "m", "", "", "");
            let mut other = tokens.clone();
            other[at] ^= 1 << bit;
            let (a, b) = (h.hashes(&tokens), h.hashes(&other));
            for i in 0..4 {
                prop_assert_eq!(a[i] == b[i], i < at / 16);
            }
        }

        #[test]
        fn unsealing_gives_back_what_was_sealed(hash in any::<u128>()) {
            let secret = Secret::new(b"s");
            prop_assert_eq!(secret.unseal(secret.seal(BlockHash(hash))), BlockHash(hash));
        }
    }

    #[test]
    fn every_part_of_a_namespace_changes_every_hash() {
        let tokens: Vec<u32> = (0..16).collect();
        let variants = [
            ("s", "m", "v", "a", "t"),
            ("S", "m", "v", "a", "t"),
            ("s", "M", "v", "a", "t"),
            ("s", "m", "V", "a", "t"),
            ("s", "m", "v", "A", "t"),
            ("s", "m", "v", "a", "T"),
            ("s", "mv", "", "a", "t"),
            ("s", "m", "v", "at", ""),
        ];
        let all: std::collections::HashSet<_> =
            variants.iter().map(|(s, m, v, a, t)| hasher(s, m, v, a, t).hashes(&tokens)[0]).collect();
        assert_eq!(all.len(), variants.len());
    }

    #[test]
    fn geometry_names_the_field_that_makes_no_sense() {
        let message = |g: Geometry| g.validate().expect_err("must be refused").to_string();
        assert!(message(Geometry { layers: 0, ..geometry() }).contains("layers"));
        assert!(message(Geometry { planes: 3, ..geometry() }).contains("planes"));
        assert!(message(Geometry { block_tokens: 5000, ..geometry() }).contains("block_tokens"));
        assert!(message(Geometry { head_dim: u32::MAX, ..geometry() }).contains("larger than"));
    }
}
