//! `--kv-trace FILE`: every page that is recycled, one JSON object a line.
//!
//! ```text
//! {"step":4096,"layer":3,"first_pos":512,"len":16,"stamp":2210,"mass":0.00002,"tokens":[…]}
//! ```

use std::fs::File;
use std::io::Write as _;
use std::path::Path;

use lemma_engine::session::Session;
use serde_json::json;

use crate::fail::{Failure, Result};
use crate::record;

/// Makes `session` write what it recycles to `path`.
pub(crate) fn install(session: &mut Session, path: &Path) -> Result {
    let mut file = File::create(path).map_err(|e| Failure::file(path, &e))?;
    let name = crate::term::escape_path(path);
    let mut failed = false;
    session.on_recycle(Some(Box::new(move |recycled, tokens| {
        let mut text = String::new();
        for r in recycled {
            let first = (r.page.first_pos as usize).min(tokens.len());
            let end = (first + r.page.len as usize).min(tokens.len());
            let line = json!({
                "step": r.step,
                "layer": r.il,
                "first_pos": r.page.first_pos,
                "len": r.page.len,
                "stamp": r.page.stamp,
                "mass": record::number(f64::from(r.page.w)),
                "tokens": tokens[first..end],
            });
            text.push_str(&format!("{line}\n"));
        }
        // A trace that cannot be written is no reason to stop the reply.
        if let (Err(e), false) = (file.write_all(text.as_bytes()), failed) {
            failed = true;
            log::warn!("{name}: {}", crate::fail::plain(&e));
        }
    })));
    Ok(())
}
