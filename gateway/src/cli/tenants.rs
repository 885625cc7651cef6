//! `glassgate tenants`: what is known of tenants beyond the names that keys and tokens give them.

use clap::Subcommand;
use serde_json::Value;

use super::{Outcome, Place, actor, text};
use crate::control::{Change, Control, view};
use crate::observe::access_log::timestamp;

#[derive(Subcommand)]
pub enum TenantsCommand {
    /// Say what a tenant is called and its tags; what was said before is replaced
    Put {
        /// As keys and tokens name it
        id: String,
        /// For people
        #[arg(long)]
        name: Option<String>,
        /// A word for all of its keys and tokens, as rules may name it (may be given several times)
        #[arg(long = "tag", value_name = "TAG")]
        tags: Vec<String>,
    },
    /// List tenants that were put or disabled
    List {
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Refuse all keys and tokens of a tenant until it is enabled again
    Disable { id: String },
    /// Let a disabled tenant in again
    Enable { id: String },
}

pub fn run(place: &Place, command: TenantsCommand) -> Outcome {
    let control = place.control()?;
    let apply = |change| control.apply(&actor(), change, None).map(drop).map_err(text);
    match command {
        TenantsCommand::Put { id, name, tags } => apply(Change::PutTenant { id, name, tags }),
        TenantsCommand::Disable { id } => apply(Change::DisableTenant { id }),
        TenantsCommand::Enable { id } => apply(Change::EnableTenant { id }),
        TenantsCommand::List { json } => list(&control, json),
    }
}

fn list(control: &Control, json: bool) -> Outcome {
    let tenants = control.store().map_err(text)?.tenants().map_err(text)?;
    if json {
        println!("{}", Value::from_iter(tenants.iter().map(view::tenant)));
        return Ok(());
    }
    println!("{:20} {:24} {:24} state", "id", "name", "tags");
    for tenant in tenants {
        let state = tenant.disabled_ns.map_or("active".to_owned(), |at| format!("disabled {}", timestamp(at)));
        println!("{:20} {:24} {:24} {state}", tenant.id, tenant.name.as_deref().unwrap_or("-"), tenant.tags.join(", "));
    }
    Ok(())
}
