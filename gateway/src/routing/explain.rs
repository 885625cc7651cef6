//! Why callers get the variants they get, for `glassgate routes explain`.

use http::HeaderMap;

use super::{Routing, core};
use crate::config::Unit;
use crate::refusal::Refusal;

/// Why a caller gets the variant they get.
#[derive(Debug, serde::Serialize)]
pub struct Explanation {
    pub route: String,
    pub unit: String,
    pub chosen: Option<String>,
    pub variants: Vec<ExplainedVariant>,
}

#[derive(Debug, serde::Serialize)]
pub struct ExplainedVariant {
    pub name: String,
    pub weight: u32,
    pub share: f64,
    pub available: bool,
    /// −ln(u)/weight; the lowest of the available ones wins.
    pub draw: Option<f64>,
}

impl Routing {
    /// The decision and its reasons, for `glassgate routes explain`.
    ///
    /// # Errors
    /// `UnknownModel` with what there is.
    pub fn explain(&self, route: &str, key_id: &str, session: Option<&str>) -> Result<Explanation, Refusal> {
        let entry = self.entry(route)?;
        let mut headers = HeaderMap::new();
        if let Some(session) = session {
            for unit in &entry.config.sticky {
                if let Unit::Header(name) = unit
                    && let (Ok(name), Ok(value)) = (http::HeaderName::from_bytes(name.as_bytes()), session.parse())
                {
                    headers.insert(name, value);
                }
            }
        }
        let unit = entry.unit(key_id, None, &headers);
        let total: u32 = entry.config.split.iter().map(|(_, weight)| weight).sum();
        let variants: Vec<ExplainedVariant> = entry
            .targets
            .iter()
            .zip(&entry.config.split)
            .map(|(target, (name, weight))| ExplainedVariant {
                name: name.clone(),
                weight: *weight,
                share: f64::from(*weight) / f64::from(total.max(1)),
                available: target.is_able(),
                draw: (*weight > 0).then(|| -core::uniform(route, &unit, name).ln() / f64::from(*weight)),
            })
            .collect();
        let able: Vec<(&str, u32)> = variants
            .iter()
            .filter(|variant| variant.available)
            .map(|variant| (variant.name.as_str(), variant.weight))
            .collect();
        let chosen = core::pick(route, &unit, &able).map(|index| able[index].0.to_owned());
        Ok(Explanation { route: route.to_owned(), unit, chosen, variants })
    }
}
