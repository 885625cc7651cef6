//! The rotary positions that `config.json` asks for: `rope_parameters`, or `rope_scaling` and `rope_theta` in older files.

use super::families::Family;
use crate::model::{
    fields::Fields,
    rope::{RopeSpec, Scaling},
};
use serde_json::{Map, Value};

/// Rotary positions of layers that see everything, and of those with a window where these are their own.
pub(super) struct Positions {
    pub ropes: Vec<RopeSpec>,
    /// How many positions the scaling makes of those that `max_position_embeddings` names.
    pub context: usize,
}

pub(super) fn positions(
    fields: &Fields<'_>,
    family: &Family,
    head_dim: usize,
    context: usize,
) -> Result<Positions, String> {
    let (new, old) = (fields.object("rope_parameters")?, fields.object("rope_scaling")?);
    let given = match (new, old) {
        (Some(new), Some(old)) if new != old => {
            return Err("`rope_parameters` and `rope_scaling` say different things; remove one of them".to_owned());
        }
        (new, old) => new.or(old),
    };
    let theta = fields.positive_or("rope_theta", family.theta)?;
    let partial = fields.positive_or("partial_rotary_factor", 1.0)?;
    let read = |rope: Option<&Map<String, Value>>, theta: f64| {
        let empty = Map::new();
        let asked = Asked { rope: Fields::new(rope.unwrap_or(&empty)), model: fields, family, head_dim, context };
        asked.read(theta, partial)
    };
    let Some(local_theta) = family.local_theta else {
        let (rope, context) = read(given, theta)?;
        return Ok(Positions { ropes: vec![rope], context });
    };
    let local_theta = fields.positive_or("rope_local_base_freq", local_theta)?;
    // Newer files nest one object for each kind of layer, older ones mean the layers that see everything.
    let nested = given.filter(|given| given.contains_key("full_attention") || given.contains_key("sliding_attention"));
    let (full, local) = match nested {
        None => (given, None),
        Some(given) => {
            let nested = Fields::new(given);
            let both = (nested.object("full_attention")?, nested.object("sliding_attention")?);
            nested.refuse_all_unread("`rope_parameters`")?;
            both
        }
    };
    let (full, context) = read(full, theta)?;
    let (local, _) = read(local, local_theta)?;
    Ok(Positions { ropes: vec![full, local], context })
}

/// One object of rotary parameters, and what else decides about it.
struct Asked<'a> {
    rope: Fields<'a>,
    model: &'a Fields<'a>,
    family: &'a Family,
    head_dim: usize,
    context: usize,
}

impl Asked<'_> {
    /// The rotary positions, and how far they reach.
    fn read(&self, theta: f64, partial: f64) -> Result<(RopeSpec, usize), String> {
        let rope = &self.rope;
        let (new, old) = (rope.text("rope_type")?, rope.text("type")?);
        let kind = new.or(old).unwrap_or("default");
        let theta = rope.positive_or("rope_theta", theta)?;
        let partial = rope.positive_or("partial_rotary_factor", partial)?;
        if partial > 1.0 || (partial < 1.0 && !self.family.partial_rotary) {
            return Err(format!("`partial_rotary_factor` {partial} is not supported for this model_type"));
        }
        let dims = (self.head_dim as f64 * partial) as usize;
        if dims < 4 || !dims.is_multiple_of(2) {
            return Err(format!(
                "of `head_dim` {} numbers {dims} would turn by position; an even number of at least 4 must",
                self.head_dim
            ));
        }
        let (scaling, context) = self.scaling(kind, dims)?;
        rope.refuse_all_unread(&format!("rotary positions of type `{kind}`"))?;
        Ok((RopeSpec { theta, dims, scaling }, context))
    }

    fn scaling(&self, kind: &str, dims: usize) -> Result<(Scaling, usize), String> {
        let (rope, context) = (&self.rope, self.context);
        let scaling = match kind {
            "default" => Scaling::None,
            "linear" => Scaling::Linear { factor: rope.required("factor")? as f32 },
            "dynamic" => {
                let factor = rope.required("factor")?;
                return Ok((Scaling::Dynamic { factor, original: context }, self.stretched(context, factor)?));
            }
            "llama3" => {
                let (low, high) = (rope.required("low_freq_factor")?, rope.required("high_freq_factor")?);
                if low >= high {
                    return Err(format!("`low_freq_factor` {low} must be less than `high_freq_factor` {high}"));
                }
                Scaling::Llama3 {
                    factor: rope.required("factor")? as f32,
                    low: low as f32,
                    high: high as f32,
                    original: self.original()? as f32,
                }
            }
            "yarn" => return self.yarn(),
            // `su` is what the first of these models called it.
            "longrope" | "su" => {
                let original = self.original()?;
                let factor = rope.positive_or("factor", context as f64 / original as f64)?;
                let usual = (1.0 + factor.max(1.0).ln() / (original as f64).ln()).sqrt();
                Scaling::LongRope {
                    short: rope.positives("short_factor", dims / 2)?,
                    long: rope.positives("long_factor", dims / 2)?,
                    original,
                    attention: rope.positive_or("attention_factor", usual)? as f32,
                }
            }
            other => {
                return Err(format!(
                    "rotary positions of type `{other}` are not supported (supported: default, linear, dynamic, llama3, \
                     yarn, longrope)"
                ));
            }
        };
        Ok((scaling, context))
    }

    fn yarn(&self) -> Result<(Scaling, usize), String> {
        let rope = &self.rope;
        let original = self.original()?;
        let factor = rope.required("factor")?;
        // 0.1 · m · ln(factor) + 1, of the paper's appendix, with m = 1 where none is given.
        let stretch = |m: f64| if factor <= 1.0 { 1.0 } else { 0.1 * m * factor.ln() + 1.0 };
        let usual = match (rope.positive("mscale")?, rope.positive("mscale_all_dim")?) {
            (Some(m), Some(all)) => stretch(m) / stretch(all),
            _ => stretch(1.0),
        };
        let scaling = Scaling::Yarn {
            factor: factor as f32,
            original: original as f64,
            beta_fast: rope.positive_or("beta_fast", 32.0)?,
            beta_slow: rope.positive_or("beta_slow", 1.0)?,
            truncate: rope.flag("truncate", true)?,
            attention: rope.positive_or("attention_factor", usual)? as f32,
        };
        Ok((scaling, self.stretched(original, factor)?.max(self.context)))
    }

    /// Positions of the first training. Some files name them outside, and mean it.
    fn original(&self) -> Result<usize, String> {
        let name = "original_max_position_embeddings";
        let inside = self.rope.count_or(name, self.context, self.context)?;
        match self.model.count_or(name, self.context, inside)? {
            1 => Err(format!("`{name}` must be more than 1")),
            original => Ok(original),
        }
    }

    fn stretched(&self, positions: usize, factor: f64) -> Result<usize, String> {
        let reach = positions as f64 * factor;
        if !(1.0..=super::CONTEXT_MAX as f64).contains(&reach) {
            return Err(format!("`factor` {factor} makes {reach} positions of {positions}"));
        }
        Ok((reach as usize).max(positions))
    }
}
