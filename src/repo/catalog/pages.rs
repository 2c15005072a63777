//! The summaries of very many points, a page at a time.
//!
//! Held are the names of the points (40 bytes each: they say the order, and which points there are),
//! the directories of the segments, and one page of summaries. The points are those that were there
//! when it was opened; one that is collected meanwhile is left out.

use std::sync::Arc;

use super::{Catalog, PointsOf, Summary};
use crate::error::{Kind, Result};
use crate::repo::blobs::Blobs;
use crate::repo::points::PointName;

/// Points of a page: a few megabytes.
const PAGE_POINTS: usize = 8192;

/// Summaries in the repository's order, page by page.
pub struct SummaryPages {
    blobs: Arc<Blobs>,
    catalog: Catalog,
    names: Vec<PointName>,
    at: usize,
}

impl SummaryPages {
    pub(in crate::repo) async fn open(blobs: &Arc<Blobs>, of: PointsOf<'_>) -> Result<Self> {
        let catalog = Catalog::open(blobs).await?;
        let names = catalog.names(of).await?;
        Ok(Self { blobs: Arc::clone(blobs), catalog, names, at: 0 })
    }

    /// The next page; none after the last. A page may be empty. Cancel-safe: the page is given then
    /// when it is asked for again.
    pub async fn next(&mut self) -> Result<Option<Vec<Summary>>> {
        if self.at == self.names.len() {
            return Ok(None);
        }
        let end = (self.at + PAGE_POINTS).min(self.names.len());
        let names = &self.names[self.at..end];
        let page = match self.catalog.summaries(names).await {
            // The collector merged a segment away under us.
            Err(error) if error.kind() == Kind::NotFound => {
                self.catalog = Catalog::open(&self.blobs).await?;
                self.catalog.summaries(names).await?
            }
            page => page?,
        };
        self.at = end;
        Ok(Some(page))
    }

    /// Begins with the first page again.
    pub fn rewind(&mut self) {
        self.at = 0;
    }
}
