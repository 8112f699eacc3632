//! Vectors of the kernels: launches, with memory before and after them. What is expected comes from the codec.

use std::ops::Range;
use stratakv::codec::{Clip, Codec, Granularity, Isa, Layout, Scheme};
use stratakv::{Dtype, Geometry};

/// Numbers from a seed.
pub(crate) struct Chance(pub(crate) u64);

impl Chance {
    pub(crate) fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(0x5851_f42d_4c95_7f2d).wrapping_add(0x1405_7b7e_f767_814f);
        (self.0 >> 33) as u32
    }

    pub(crate) fn below(&mut self, n: usize) -> usize {
        self.next() as usize % n
    }

    pub(crate) fn of<T: Copy>(&mut self, all: &[T]) -> T {
        all[self.below(all.len())]
    }

    pub(crate) fn shuffled(&mut self, n: usize) -> Vec<usize> {
        let mut all: Vec<usize> = (0..n).collect();
        (1..n).rev().for_each(|i| all.swap(i, self.below(i + 1)));
        all
    }

    pub(crate) fn bytes(&mut self, n: usize) -> Vec<u8> {
        (0..n).map(|_| self.next() as u8).collect()
    }
}

/// The address of a byte of another memory, to be put somewhere.
struct Reference {
    at: usize,
    memory: usize,
    offset: u64,
}

/// Bytes that know where addresses belong in them.
#[derive(Default)]
pub(crate) struct Packed {
    bytes: Vec<u8>,
    references: Vec<Reference>,
}

impl Packed {
    pub(crate) fn address(&mut self, memory: usize, offset: u64) {
        self.references.push(Reference { at: self.bytes.len(), memory, offset });
        self.bytes.extend([0; 8]);
    }

    pub(crate) fn words<const N: usize>(&mut self, words: [u32; N]) {
        words.into_iter().for_each(|word| self.bytes.extend(word.to_le_bytes()));
    }

    pub(crate) fn long(&mut self, number: u64) {
        self.bytes.extend(number.to_le_bytes());
    }
}

struct Memory {
    before: Packed,
    after: Option<(Vec<u8>, Vec<Range<usize>>)>,
}

/// One launch.
pub(crate) struct Vector {
    pub(crate) name: String,
    pub(crate) kernel: &'static str,
    pub(crate) grid: usize,
    pub(crate) block: usize,
    pub(crate) parameters: Packed,
    memories: Vec<Memory>,
}

impl Vector {
    pub(crate) fn new(name: String, kernel: &'static str, grid: usize, block: usize) -> Self {
        Self { name, kernel, grid, block, parameters: Packed::default(), memories: Vec::new() }
    }

    /// Memory that nothing may change.
    pub(crate) fn kept(&mut self, before: Packed) -> usize {
        self.memories.push(Memory { before, after: None });
        self.memories.len() - 1
    }

    /// Memory that changes; in some ranges anything may stand.
    pub(crate) fn changed(&mut self, before: Vec<u8>, after: Vec<u8>, anything: Vec<Range<usize>>) -> usize {
        assert_eq!(before.len(), after.len());
        let before = Packed { bytes: before, references: Vec::new() };
        self.memories.push(Memory { before, after: Some((after, anything)) });
        self.memories.len() - 1
    }

    pub(crate) fn kept_bytes(&mut self, bytes: Vec<u8>) -> usize {
        self.kept(Packed { bytes, references: Vec::new() })
    }
}

/// The file that the program reads; `cuda/tests/vectors.cpp` says what is in it.
pub(crate) fn file(vectors: &[Vector]) -> Vec<u8> {
    let word = |out: &mut Vec<u8>, n: usize| out.extend((n as u32).to_le_bytes());
    let text = |out: &mut Vec<u8>, bytes: &[u8]| {
        word(out, bytes.len());
        out.extend(bytes);
    };
    let packed = |out: &mut Vec<u8>, packed: &Packed| {
        text(out, &packed.bytes);
        word(out, packed.references.len());
        for one in &packed.references {
            word(out, one.at);
            word(out, one.memory);
            out.extend(one.offset.to_le_bytes());
        }
    };
    let mut out = b"kvvector".to_vec();
    word(&mut out, vectors.len());
    for vector in vectors {
        text(&mut out, vector.name.as_bytes());
        text(&mut out, vector.kernel.as_bytes());
        word(&mut out, vector.grid);
        word(&mut out, vector.block);
        packed(&mut out, &vector.parameters);
        word(&mut out, vector.memories.len());
        for memory in &vector.memories {
            packed(&mut out, &memory.before);
            word(&mut out, usize::from(memory.after.is_some()));
            let Some((after, anything)) = &memory.after else { continue };
            text(&mut out, after);
            word(&mut out, anything.len());
            for range in anything {
                word(&mut out, range.start);
                word(&mut out, range.len());
            }
        }
    }
    out
}

/// How a plane is encoded; no codec: as it is.
#[derive(Clone, Copy, Debug)]
pub(crate) struct How {
    pub(crate) codec: Codec,
    pub(crate) by: Granularity,
    pub(crate) bound: f32,
}

impl How {
    pub(crate) const fn new(codec: Codec, by: Granularity) -> Self {
        Self { codec, by, bound: f32::INFINITY }
    }

    /// The last three fields of a plane's record, by its place in the payload.
    fn record(self, at: usize) -> [u32; 4] {
        let coding = match self.codec {
            Codec::Int8Sym => 1,
            Codec::Int8Asym => 2,
            _ => 0,
        };
        let (by, group) = match self.by {
            Granularity::Tensor => (0, 0),
            Granularity::Head => (1, 0),
            Granularity::Token(group) => (2, group),
            Granularity::Channel(group) => (3, group),
        };
        [at as u32, coding | by << 8, group, self.bound.to_bits()]
    }
}

/// Where rows lie.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Place {
    /// By block, as a payload: one run, `[plane][head][token]`.
    Slab,
    /// Pages of so many tokens; a tensor for each plane, `[page][token][head]`.
    TokenFirst(usize),
    /// The same, `[page][head][token]`.
    HeadFirst(usize),
    /// One tensor, `[page][plane][token][head]`.
    PageFirst(usize),
    /// One tensor, `[plane][page][head][token]`, with gaps between rows, heads and pages.
    Gaps(usize),
}

/// Shape of what is encoded, and where it lies.
#[derive(Clone, Debug)]
pub(crate) struct Job {
    pub(crate) dtype: Dtype,
    pub(crate) blocks: usize,
    pub(crate) heads: usize,
    pub(crate) tokens: usize,
    pub(crate) dim: usize,
    pub(crate) place: Place,
    pub(crate) planes: Vec<How>,
    pub(crate) grid: usize,
    pub(crate) block: usize,
}

/// Of each plane the codec's layout and where it begins, in bytes.
type Layouts = (Vec<(Layout, usize)>, usize);

impl Job {
    fn row_bytes(&self) -> usize {
        2 * self.dim
    }

    fn rows(&self) -> usize {
        self.heads * self.tokens
    }

    /// Of each plane alone, as the only one of a model: that is what makes plane by plane of any coding a payload.
    fn layouts(&self) -> Layouts {
        let geometry = Geometry {
            layers: 1,
            planes: 1,
            kv_heads: self.heads as u32,
            head_dim: self.dim as u32,
            dtype: self.dtype,
            block_tokens: self.tokens as u32,
        };
        let mut end = 0;
        let each = |how: &How| {
            let clip = how.bound.is_finite().then_some(Clip::Calibrated);
            let scheme = Scheme { keys: how.by, clip, ..Scheme::new(how.codec, &geometry) };
            let layout = Layout::on(Isa::Scalar, scheme, &geometry).expect("a layout").calibrated([how.bound].into());
            let begin = end;
            // A raw plane's part is padded, too, which counts where its rows are few and short.
            end += layout.bytes();
            (layout, begin)
        };
        (self.planes.iter().map(each).collect(), end)
    }

    fn run_tokens(&self) -> usize {
        match self.place {
            Place::Slab => self.tokens,
            Place::TokenFirst(n) | Place::HeadFirst(n) | Place::PageFirst(n) | Place::Gaps(n) => n,
        }
    }

    fn runs(&self) -> usize {
        self.tokens.div_ceil(self.run_tokens())
    }

    /// Bytes of a page, of all planes' tensors, and where each plane begins: tensor, offset, head and token strides.
    fn strides(&self, pages: usize) -> (usize, Vec<usize>, Vec<[usize; 4]>) {
        let (row, planes, run) = (self.row_bytes(), self.planes.len(), self.run_tokens());
        let plane = self.heads * run * row;
        let same = |bytes: usize, head: usize, token: usize| (0..planes).map(|n| [0, n * bytes, head, token]).collect();
        match self.place {
            Place::Slab => (planes * plane, vec![pages * planes * plane], same(plane, run * row, row)),
            Place::PageFirst(_) => (planes * plane, vec![pages * planes * plane], same(plane, row, self.heads * row)),
            Place::TokenFirst(_) | Place::HeadFirst(_) => {
                let token_first = matches!(self.place, Place::TokenFirst(_));
                let (head, token) = if token_first { (row, self.heads * row) } else { (run * row, row) };
                (plane, vec![pages * plane; planes], (0..planes).map(|n| [n, 0, head, token]).collect())
            }
            Place::Gaps(_) => {
                let (token, head) = (row + 16, run * (row + 16) + 48);
                let page = self.heads * head + 80;
                (page, vec![planes * pages * page], same(pages * page, head, token))
            }
        }
    }

    /// A vector, with the places of rows by [block][plane][row]: tensor and offset.
    fn begin(&self, kernel: &'static str, chance: &mut Chance) -> Begun {
        let pages = self.blocks * self.runs() + 1;
        let (page_bytes, tensors, planes) = self.strides(pages);
        let order = chance.shuffled(pages);
        let mut places = Vec::new();
        for block in 0..self.blocks {
            for &[tensor, base, head_stride, token_stride] in &planes {
                for row in 0..self.rows() {
                    let (head, token) = (row / self.tokens, row % self.tokens);
                    let (run, within) = (token / self.run_tokens(), token % self.run_tokens());
                    let page = order[block * self.runs() + run];
                    places.push((tensor, base + page * page_bytes + head * head_stride + within * token_stride));
                }
            }
        }
        let offsets = order[..self.blocks * self.runs()].iter().map(|page| (page * page_bytes) as u64).collect();
        Begun {
            vector: Vector::new(format!("{self:?}"), kernel, self.grid, self.block),
            places,
            tensors,
            planes,
            offsets,
        }
    }

    /// Tables and parameters; the tensors of the rows are there.
    fn end(
        &self,
        begun: Begun,
        layouts: &Layouts,
        tensors: &[usize],
        payloads: &[usize],
        status: Option<usize>,
    ) -> Vector {
        let Begun { mut vector, planes, offsets, .. } = begun;
        let mut table = Packed::default();
        for ((how, (_, at)), [tensor, base, head, token]) in self.planes.iter().zip(&layouts.0).zip(planes) {
            table.address(tensors[tensor], base as u64);
            table.long(head as u64);
            table.long(token as u64);
            table.words(how.record(*at));
        }
        let (mut runs, mut coded) = (Packed::default(), Packed::default());
        offsets.iter().for_each(|offset| runs.long(*offset));
        payloads.iter().for_each(|payload| coded.address(*payload, 0));
        let tables = [table, runs, coded].map(|table| vector.kept(table));
        tables.into_iter().for_each(|table| vector.parameters.address(table, 0));
        match status {
            Some(status) => vector.parameters.address(status, 0),
            None => vector.parameters.long(0),
        }
        let shape = [self.blocks, self.planes.len(), self.heads, self.tokens, self.dim].map(|n| n as u32);
        vector.parameters.words(shape);
        vector.parameters.words([self.dtype as u32, self.runs() as u32, self.run_tokens() as u32]);
        vector
    }

    /// Rows, given by block, plane and row, encoded; and which planes were.
    pub(crate) fn encoded(&self, values: &[Vec<u8>], chance: &mut Chance) -> Vector {
        let (layouts, mut begun) = (self.layouts(), self.begin("kv_encode", chance));
        let mut tensors: Vec<Vec<u8>> = begun.tensors.iter().map(|&bytes| chance.bytes(bytes)).collect();
        for (row, &(tensor, at)) in values.iter().zip(&begun.places) {
            tensors[tensor][at..at + row.len()].copy_from_slice(row);
        }
        let tensors: Vec<usize> = tensors.into_iter().map(|bytes| begun.vector.kept_bytes(bytes)).collect();
        // A bit that somebody else has set stays.
        let (before, mut after) = ([0, 1, 0, 0].repeat(self.blocks), Vec::new());
        let mut payloads = Vec::new();
        for planes in values.chunks_exact(self.rows() * self.planes.len()) {
            let (expected, fit) = self.payload(&layouts, planes);
            let anything = (0..fit.len()).filter(|&n| !fit[n]);
            let anything = anything.map(|n| layouts.0[n].1..layouts.0[n].1 + layouts.0[n].0.bytes()).collect();
            payloads.push(begun.vector.changed(chance.bytes(layouts.1), expected, anything));
            after.extend([u8::from(fit.contains(&false)), 1, 0, 0]);
        }
        let status = begun.vector.changed(before, after, Vec::new());
        self.end(begun, &layouts, &tensors, &payloads, Some(status))
    }

    /// The payload of one block that can be encoded.
    pub(crate) fn payload_of(&self, planes: &[Vec<u8>]) -> Vec<u8> {
        let (payload, fit) = self.payload(&self.layouts(), planes);
        assert!(fit.iter().all(|fit| *fit), "every plane fits");
        payload
    }

    fn payload(&self, layouts: &Layouts, planes: &[Vec<u8>]) -> (Vec<u8>, Vec<bool>) {
        let mut payload = vec![0; layouts.1];
        let each = planes.chunks_exact(self.rows()).zip(&layouts.0).map(|(rows, (layout, at))| {
            let rows: Vec<&[u8]> = rows.iter().map(Vec::as_slice).collect();
            layout.encode(0, &rows, &mut payload[*at..at + layout.bytes()])
        });
        let fit = each.collect();
        (payload, fit)
    }

    /// What rows were encoded to, decoded; `None`: they cannot be encoded.
    pub(crate) fn decoded(&self, values: &[Vec<u8>], chance: &mut Chance) -> Option<Vector> {
        let layouts = self.layouts();
        let blocks = values.chunks_exact(self.rows() * self.planes.len());
        let payloads = blocks.map(|planes| self.payload(&layouts, planes));
        let payloads = payloads.map(|(payload, fit)| fit.iter().all(|fit| *fit).then_some(payload));
        Some(self.decoded_from(payloads.collect::<Option<Vec<_>>>()?, chance))
    }

    /// Payloads of any bytes, but with scales and bases that are finite, decoded.
    pub(crate) fn decoded_from_any(&self, chance: &mut Chance) -> Vector {
        let layouts = self.layouts();
        let payload = |chance: &mut Chance| {
            let mut bytes = chance.bytes(layouts.1);
            for ((layout, at), how) in layouts.0.iter().zip(&self.planes) {
                let codes = layout.bytes() - (self.rows() * self.dim).next_multiple_of(64);
                let bases = if how.codec == Codec::Int8Asym { codes / 2 } else { codes };
                for (n, two) in bytes[*at..at + codes].as_chunks_mut::<2>().0.iter_mut().enumerate() {
                    // The sign, and one bit of the exponent: of what is finite, and no scale is negative.
                    two[1] &= if 2 * n < bases { 0x3f } else { 0xbf };
                    if chance.below(8) == 0 {
                        *two = [0, 0];
                    }
                }
            }
            bytes
        };
        let payloads = (0..self.blocks).map(|_| payload(chance)).collect();
        self.decoded_from(payloads, chance)
    }

    fn decoded_from(&self, payloads: Vec<Vec<u8>>, chance: &mut Chance) -> Vector {
        let (layouts, mut begun) = (self.layouts(), self.begin("kv_decode", chance));
        let before: Vec<Vec<u8>> = begun.tensors.iter().map(|&bytes| chance.bytes(bytes)).collect();
        let mut after = before.clone();
        let mut places = begun.places.chunks_exact(self.rows());
        for payload in &payloads {
            for ((layout, at), places) in layouts.0.iter().zip(&mut places) {
                let mut rows = vec![vec![0; self.row_bytes()]; self.rows()];
                let mut all: Vec<&mut [u8]> = rows.iter_mut().map(Vec::as_mut_slice).collect();
                layout.decode(0, &payload[*at..at + layout.bytes()], &mut all);
                for (row, &(tensor, at)) in rows.iter().zip(places) {
                    after[tensor][at..at + row.len()].copy_from_slice(row);
                }
            }
        }
        let pairs = before.into_iter().zip(after);
        let tensors: Vec<usize> = pairs.map(|(from, to)| begun.vector.changed(from, to, Vec::new())).collect();
        let payloads: Vec<usize> = payloads.into_iter().map(|bytes| begun.vector.kept_bytes(bytes)).collect();
        self.end(begun, &layouts, &tensors, &payloads, None)
    }
}

/// What is known before values are.
struct Begun {
    vector: Vector,
    places: Vec<(usize, usize)>,
    tensors: Vec<usize>,
    planes: Vec<[usize; 4]>,
    offsets: Vec<u64>,
}
