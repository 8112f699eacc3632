//! Clipping: the few greatest magnitudes of a plane are cut to what most stay below.
//!
//! The bound is the exact percentile of the magnitudes. The k-th greatest of the groups' maxima is a lower bound of the
//! k-th greatest value, so only groups that reach it are looked into, and the maxima are one pass at memory speed.
//!
//! Off unless asked for: with scales per channel and token there is little to gain, and what is cut is lost.

use super::plane::Shape;
use super::{Kernels, scalar};
use crate::error::{Result, input};

/// What values of a plane are clipped to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Clip {
    /// A percentile of the magnitudes of each block.
    Percentile(Percentile),
    /// What was measured once on a sample: the same for every block, and nothing to compute.
    Calibrated,
}

/// Which share of a plane's values is not clipped.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Percentile {
    /// Values clipped of 100 million.
    beyond: u32,
}

const ALL: f64 = 1e8;

impl Percentile {
    /// So many per cent.
    ///
    /// # Errors
    /// Outside (0, 100].
    pub fn new(percent: f64) -> Result<Self> {
        if !(percent > 0.0 && percent <= 100.0) {
            return Err(input(format!("percentile is {percent}, expected a number above 0, up to 100")));
        }
        Ok(Self { beyond: ((100.0 - percent) / 100.0 * ALL).round() as u32 })
    }

    /// The rank of the percentile among so many values, the greatest being 1.
    fn rank(self, values: usize) -> usize {
        (values as f64 * f64::from(self.beyond) / ALL) as usize + 1
    }

    /// The magnitude that this share of the values of some rows is at most; not finite, if a value is not.
    pub(super) fn of(self, kernels: &Kernels, shape: &Shape, rows: &[&[u8]]) -> f32 {
        let row_bytes = shape.dim * scalar::width(shape.dtype);
        let mut most = vec![0.0; rows.len()];
        (kernels.absmax)(rows, row_bytes, &mut most);
        if let Some(bad) = most.iter().find(|most| !most.is_finite()) {
            return *bad;
        }
        let rank = self.rank(rows.len() * shape.dim).min(rows.len() * shape.dim);
        // Fewer groups than values above: then every row may hold one.
        let bound = if rank <= rows.len() { kth_greatest(&mut most.clone(), rank) } else { 0.0 };
        let mut floats = vec![0.0; shape.dim];
        let mut candidates = Vec::new();
        for (row, _) in rows.iter().zip(&most).filter(|&(_, &most)| most >= bound) {
            (kernels.read)(row, &mut floats);
            candidates.extend(floats.iter().map(|value| value.abs()).filter(|&value| value >= bound));
        }
        kth_greatest(&mut candidates, rank)
    }
}

fn kth_greatest(values: &mut [f32], k: usize) -> f32 {
    *values.select_nth_unstable_by(k - 1, |a, b| b.total_cmp(a)).1
}
